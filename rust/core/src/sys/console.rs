//! Writing to an inherited pipe, terminal, socket or file without blocking on its reader.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{FileType, Mode, OFlags};

/// Requested capacity of a pipe: the default maximum for unprivileged processes.
const PIPE_SIZE: usize = 1 << 20;

/// How writes to a descriptor avoid blocking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WriteMode {
    /// Plain writes: a file has no reader to wait for.
    File,
    /// The pipe or terminal was opened again, with `O_NONBLOCK`. Setting it on the inherited file description instead would make the
    /// writes of other processes fail with EAGAIN.
    Reopened,
    /// `MSG_DONTWAIT` with each write.
    Socket,
    /// The descriptor could not be opened again. Each write polls for room first and is at most `PIPE_BUF` bytes long.
    Polled,
}

/// A non-blocking output.
#[derive(Debug)]
pub struct Console {
    fd: OwnedFd,
    mode: WriteMode,
}

impl Console {
    /// A console on a duplicate of `fd`.
    pub fn new(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let shared = rustix::io::fcntl_dupfd_cloexec(fd, 3)?;
        Ok(match FileType::from_raw_mode(rustix::fs::fstat(&shared)?.st_mode) {
            FileType::RegularFile => Self { fd: shared, mode: WriteMode::File },
            FileType::Socket => Self { fd: shared, mode: WriteMode::Socket },
            kind => {
                if kind == FileType::Fifo {
                    // With the default of 64 KiB, reader and writer would often wait for each other. Fails at the user's limit.
                    let _ = rustix::pipe::fcntl_setpipe_size(&shared, PIPE_SIZE);
                }
                let path = format!("/proc/self/fd/{}", shared.as_raw_fd());
                let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
                match rustix::fs::open(path, flags, Mode::empty()) {
                    Ok(own) => Self { fd: own, mode: WriteMode::Reopened },
                    Err(_) => Self { fd: shared, mode: WriteMode::Polled },
                }
            }
        })
    }

    /// Writes as much of `bytes` as possible without blocking, and returns the number of bytes. Fails with `WouldBlock` if it is 0.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let written = match self.mode {
            WriteMode::File | WriteMode::Reopened => rustix::io::write(&self.fd, bytes)?,
            WriteMode::Polled => {
                if !self.has_room()? {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                rustix::io::write(&self.fd, &bytes[..bytes.len().min(rustix::pipe::PIPE_BUF)])?
            }
            WriteMode::Socket => {
                // SAFETY: the slice is valid for reads, the descriptor is open.
                let sent = unsafe {
                    libc::send(
                        self.fd.as_raw_fd(),
                        bytes.as_ptr().cast(),
                        bytes.len(),
                        libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
                    )
                };
                usize::try_from(sent).map_err(|_| io::Error::last_os_error())?
            }
        };
        Ok(written)
    }

    fn has_room(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
        Ok(rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))? > 0)
    }
}

impl AsFd for Console {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
