//! The reading end of a named pipe (`mkfifo(3)`). One process at a time owns it.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, FlockOperation, Mode, OFlags, flock, fstat, mknodat, open};
use rustix::io::Errno;

/// A named pipe that this process reads. Dropping it removes the file, unless another file has replaced it.
#[derive(Debug)]
pub struct Fifo {
    path: PathBuf,
    reader: OwnedFd,
    /// Kept open, because a pipe without a writer is always readable (end of file).
    _writer: OwnedFd,
}

impl Fifo {
    /// Creates the pipe, or takes over an existing pipe without a reader. Fails with `AddrInUse` if the pipe has a reader, and with
    /// `AlreadyExists` if the path is another kind of file than a pipe or an empty file.
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
            if let Some(fifo) = Self::open_and_lock(path)? {
                return Ok(fifo);
            }
        }
    }

    /// Opens the pipe at `path` and locks it; `None` if it was removed or replaced in the meantime.
    fn open_and_lock(path: &Path) -> io::Result<Option<Self>> {
        let flags = OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let reader = match open(path, OFlags::RDONLY | flags, Mode::empty()) {
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
        let writer = open(path, OFlags::WRONLY | flags, Mode::empty())?;
        let fifo = Self { path: path.to_owned(), reader, _writer: writer };
        // Discard unread bytes from clients of a former server.
        let mut stale = [0; 4096];
        while fifo.read(&mut stale)? > 0 {}
        Ok(Some(fifo))
    }

    /// Path of the pipe.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether its path still refers to this pipe.
    #[must_use]
    pub fn is_in_place(&self) -> bool {
        is_at(&self.reader, &self.path)
    }

    /// Reads available bytes without blocking; 0 if there are none.
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

/// Whether a process has the pipe open for reading. Without a reader, a non-blocking open for writing fails with ENXIO.
fn has_reader(path: &Path) -> io::Result<bool> {
    match open(path, OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty()) {
        Ok(_) => Ok(true),
        Err(Errno::NXIO | Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn is_at(fd: &OwnedFd, path: &Path) -> bool {
    let (Ok(open), Ok(found)) = (fstat(fd), fs::symlink_metadata(path)) else {
        return false;
    };
    (open.st_dev, open.st_ino) == (found.dev(), found.ino())
}
