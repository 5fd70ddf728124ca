//! The file in which workers read the deadline of their stop.
//!
//! A `memfd_create(2)`, so writing it cannot hang on a disk, no worker can delete it, and nothing remains of it after a SIGKILL. Its path is
//! an entry in `/proc/PID/fd`, which exists as long as this process and the value. It is empty before a stop.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, MemfdFlags, Mode, SealFlags, fallocate, fchmod, fcntl_add_seals, memfd_create};

/// Memory that is allocated in advance, so a stop needs no allocation.
const RESERVED: u64 = 4096;

/// The file, open for writing.
#[derive(Debug)]
pub struct StopFile {
    fd: OwnedFd,
    path: PathBuf,
}

impl StopFile {
    /// Creates an empty file that other processes of this user can read.
    pub fn create() -> io::Result<Self> {
        let fd = memfd_create("ferroelastic-stop", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        fallocate(&fd, FallocateFlags::KEEP_SIZE, 0, RESERVED)?;
        fchmod(&fd, Mode::from_raw_mode(0o444))?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::SEAL)?;
        let path = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd()));
        Ok(Self { fd, path })
    }

    /// The path under which other processes open the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends a line in one write. Its readers see the whole line or nothing of it.
    pub fn append(&self, line: &str) -> io::Result<()> {
        let written = rustix::io::write(&self.fd, line.as_bytes())?;
        if written == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_open_the_file_by_its_path_and_see_each_line() {
        let file = StopFile::create().expect("a file");
        let read = || std::fs::read_to_string(file.path()).expect("readable");
        assert_eq!(read(), "");
        file.append("one\n").expect("written");
        assert_eq!(read(), "one\n");
        file.append("two\n").expect("written");
        assert_eq!(read(), "one\ntwo\n");
    }

    #[test]
    fn no_process_can_shorten_or_remove_the_file() {
        let file = StopFile::create().expect("a file");
        file.append("one\n").expect("written");
        assert!(std::fs::remove_file(file.path()).is_err());
        // The permissions already refuse this, but not to root.
        assert!(std::fs::File::create(file.path()).is_err());
        assert_eq!(std::fs::read_to_string(file.path()).expect("readable"), "one\n");
    }

    #[test]
    fn the_path_ends_with_the_value() {
        let file = StopFile::create().expect("a file");
        let path = file.path().to_owned();
        drop(file);
        assert!(!std::fs::read_link(path).is_ok_and(|target| target.to_string_lossy().contains("ferroelastic-stop")));
    }
}
