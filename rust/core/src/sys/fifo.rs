//! The reading end of a named pipe: `mkfifo(3)`, owned by one process at a time.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, FlockOperation, Mode, OFlags, flock, fstat, mknodat, open};
use rustix::io::Errno;

/// A named pipe that this process reads. Removed when it is dropped, unless somebody else has put another file there.
#[derive(Debug)]
pub struct Fifo {
    path: PathBuf,
    reader: OwnedFd,
    /// A writer of one's own: without any, the end of the pipe would be readable for ever.
    _writer: OwnedFd,
}

impl Fifo {
    /// Makes the pipe, or takes over one that a dead process has left. `AddrInUse` if somebody reads it, `AlreadyExists` if
    /// there is a file that is no pipe and not empty.
    pub fn create(path: &Path) -> io::Result<Self> {
        loop {
            match mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0) {
                Ok(()) => {}
                Err(Errno::EXIST) => {
                    let found = match fs::symlink_metadata(path) {
                        Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                        found => found?,
                    };
                    if found.is_file() && found.len() == 0 {
                        // The placeholder of `mkstemp(3)`.
                        fs::remove_file(path)?;
                        continue;
                    }
                    if !found.file_type().is_fifo() {
                        return Err(io::ErrorKind::AlreadyExists.into());
                    }
                    if has_reader(path)? {
                        return Err(io::ErrorKind::AddrInUse.into());
                    }
                }
                Err(error) => return Err(error.into()),
            }
            if let Some(fifo) = Self::take(path)? {
                return Ok(fifo);
            }
        }
    }

    /// Opens the pipe at `path` and locks it; `None` if it was replaced meanwhile.
    fn take(path: &Path) -> io::Result<Option<Self>> {
        let ours = OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let reader = match open(path, OFlags::RDONLY | ours, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            reader => reader?,
        };
        match flock(&reader, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Err(io::ErrorKind::AddrInUse.into()),
            locked => locked?,
        }
        if !is_at(&reader, path) {
            return Ok(None);
        }
        let writer = open(path, OFlags::WRONLY | ours, Mode::empty())?;
        let fifo = Self { path: path.to_owned(), reader, _writer: writer };
        // What the clients of a dead server have left is of nobody's interest.
        let mut stale = [0; 4096];
        while fifo.read(&mut stale)? > 0 {}
        Ok(Some(fifo))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is still to be found at its path.
    #[must_use]
    pub fn is_in_place(&self) -> bool {
        is_at(&self.reader, &self.path)
    }

    /// Reads what there is, without waiting; 0 if there is nothing.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match rustix::io::read(&self.reader, buffer) {
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            read => Ok(read?),
        }
    }
}

impl AsFd for Fifo {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}

impl Drop for Fifo {
    fn drop(&mut self) {
        if self.is_in_place() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Whether a process has the pipe open for reading: otherwise it cannot be opened for writing without waiting.
fn has_reader(path: &Path) -> io::Result<bool> {
    match open(path, OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty()) {
        Ok(_) => Ok(true),
        Err(Errno::NXIO | Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn is_at(fd: &OwnedFd, path: &Path) -> bool {
    let (Ok(open), Ok(there)) = (fstat(fd), fs::symlink_metadata(path)) else {
        return false;
    };
    (open.st_dev, open.st_ino) == (there.dev(), there.ino())
}
