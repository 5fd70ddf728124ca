//! A cgroup for one run. Processes stay in it even if they change their session, their environment or their parent.
//!
//! Supports version 2 only. This process must be allowed to create a cgroup below its own: it runs as root, or its part of the tree was
//! delegated to its user. No controller is enabled: processes may then be in both levels, and the accounting does not change.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

/// Creates a cgroup below that of this process and returns its folder.
pub fn create(name: &str) -> io::Result<PathBuf> {
    let own = own_folder()
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "this process is in no visible cgroup of version 2"))?;
    let folder = own.join(name);
    fs::create_dir(&folder)?;
    // On another file system `create_dir` succeeds too, but the folder cannot hold processes.
    if folder.join("cgroup.procs").exists() {
        return Ok(folder);
    }
    fs::remove_dir(&folder)?;
    Err(io::Error::new(io::ErrorKind::Unsupported, format!("{} is not on a cgroup file system", own.display())))
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

/// Removes a cgroup and the cgroups below it. Moves processes that are still alive to its parent.
pub fn remove(folder: &Path) -> io::Result<()> {
    for below in folders_below(folder) {
        remove(&below)?;
    }
    if let Some(above) = folder.parent() {
        for pid in members(folder) {
            // Fails if the process has ended in the meantime.
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

/// Joins the mount point of version 2 (from `/proc/PID/mountinfo`) and the cgroup of the process (from `/proc/PID/cgroup`).
fn folder_in(mountinfo: &str, cgroup: &str) -> Option<PathBuf> {
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::"))?;
    let (root, mount_point) = mountinfo.lines().find_map(|line| {
        let (location, kind) = line.split_once(" - ")?;
        let mut fields = location.split(' ').skip(3);
        let mount = (fields.next()?, fields.next()?);
        kind.starts_with("cgroup2 ").then_some(mount)
    })?;
    // In a cgroup namespace the process may be outside the visible part of the tree. Its path then begins with `/..`.
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
    fn the_folder_joins_mount_point_and_path() {
        let of = |mounts, cgroup| folder_in(mounts, cgroup).map(|folder| folder.display().to_string());
        assert_eq!(of(UNIFIED, "0::/user.slice/a.scope\n").as_deref(), Some("/sys/fs/cgroup/user.slice/a.scope"));
        assert_eq!(of(HYBRID, "4:memory:/x\n0::/\n").as_deref(), Some("/sys/fs/cgroup/unified/"));
        assert_eq!(of(SHARED, "0::/docker/1/a\n").as_deref(), Some("/sys/fs/cgroup/a"));
    }

    #[test]
    fn a_cgroup_outside_the_mounted_tree_has_no_folder() {
        assert_eq!(folder_in(UNIFIED, "4:memory:/x\n"), None);
        assert_eq!(folder_in("25 1 0:22 / /sys rw - sysfs sysfs rw\n", "0::/\n"), None);
        assert_eq!(folder_in(SHARED, "0::/docker/2\n"), None);
        assert_eq!(folder_in(UNIFIED, "0::/../b\n"), None);
        assert_eq!(folder_in("31 25 0:27\n - cgroup2 \n", "0::/\n"), None);
    }
}
