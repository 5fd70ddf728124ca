//! A cgroup of our own for a run: nobody leaves it, whatever they do to their session, their environment or their parent.
//!
//! Only version 2, and only where this process may make one below its own: as root, or where the part of the tree it is in was delegated to
//! its user. No controller is enabled, so processes of both levels do not conflict, and nothing is accounted differently.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

/// Makes a cgroup below that of this process and returns its folder.
pub fn create(name: &str) -> io::Result<PathBuf> {
    let own = own_folder().ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, "this process is in no cgroup of version 2 that it can see")
    })?;
    let folder = own.join(name);
    fs::create_dir(&folder)?;
    // On any other file system a folder can be made as well, and holds no processes.
    if folder.join("cgroup.procs").exists() {
        return Ok(folder);
    }
    fs::remove_dir(&folder)?;
    Err(io::Error::new(io::ErrorKind::Unsupported, "not a cgroup file system"))
}

/// A descriptor of the folder, for `CLONE_INTO_CGROUP`.
pub fn open(folder: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(folder, flags, Mode::empty())?)
}

/// The processes in a cgroup and below it.
#[must_use]
pub fn members(folder: &Path) -> Vec<i32> {
    let own = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
    let mut pids: Vec<i32> = own.lines().filter_map(|line| line.parse().ok()).collect();
    for below in folders_below(folder) {
        pids.extend(members(&below));
    }
    pids
}

/// Removes a cgroup. Processes that live on go to the one above it.
pub fn remove(folder: &Path) -> io::Result<()> {
    for below in folders_below(folder) {
        remove(&below)?;
    }
    if let Some(above) = folder.parent() {
        for pid in members(folder) {
            // One that has ended meanwhile is not to be moved.
            let _ = fs::write(above.join("cgroup.procs"), pid.to_string());
        }
    }
    fs::remove_dir(folder)
}

fn folders_below(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}

/// The folder of this process's cgroup.
fn own_folder() -> Option<PathBuf> {
    folder_in(&fs::read_to_string("/proc/self/mountinfo").ok()?, &fs::read_to_string("/proc/self/cgroup").ok()?)
}

/// Puts together where version 2 is mounted (`/proc/PID/mountinfo`) and which cgroup of it a process is in (`/proc/PID/cgroup`).
fn folder_in(mountinfo: &str, cgroup: &str) -> Option<PathBuf> {
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::"))?;
    let (root, mount_point) = mountinfo.lines().find_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        let mut fields = place.split(' ').skip(3);
        let mount = (fields.next()?, fields.next()?);
        kind.starts_with("cgroup2 ").then_some(mount)
    })?;
    // A namespace may show a part of the tree that the process is not in: as `/..`.
    let below = Path::new(path).strip_prefix(root).ok()?;
    let is_inside = below.components().all(|part| matches!(part, std::path::Component::Normal(_)));
    is_inside.then(|| Path::new(mount_point).join(below))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIFIED: &str =
        "25 1 0:22 / /sys rw - sysfs sysfs rw\n31 25 0:27 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw\n";
    const HYBRID: &str =
        "30 25 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup rw\n";
    const SHARED: &str = "31 25 0:27 /docker/1 /sys/fs/cgroup ro - cgroup2 cgroup rw\n";

    #[test]
    fn the_folder_is_found() {
        let of = |mounts, cgroup| folder_in(mounts, cgroup).map(|folder| folder.display().to_string());
        assert_eq!(of(UNIFIED, "0::/user.slice/a.scope\n").as_deref(), Some("/sys/fs/cgroup/user.slice/a.scope"));
        assert_eq!(of(HYBRID, "4:memory:/x\n0::/\n").as_deref(), Some("/sys/fs/cgroup/unified/"));
        assert_eq!(of(SHARED, "0::/docker/1/a\n").as_deref(), Some("/sys/fs/cgroup/a"));
    }

    #[test]
    fn what_cannot_be_seen_is_no_folder() {
        assert_eq!(folder_in(UNIFIED, "4:memory:/x\n"), None);
        assert_eq!(folder_in("25 1 0:22 / /sys rw - sysfs sysfs rw\n", "0::/\n"), None);
        assert_eq!(folder_in(SHARED, "0::/docker/2\n"), None);
        assert_eq!(folder_in(UNIFIED, "0::/../b\n"), None);
        assert_eq!(folder_in("31 25 0:27\n - cgroup2 \n", "0::/\n"), None);
    }
}
