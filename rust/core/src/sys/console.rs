//! Writing to somebody else's pipe, terminal, socket or file without ever waiting for its reader.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{FileType, Mode, OFlags};

/// What a pipe is asked to hold: the most that an unprivileged process may ask for.
const PIPE_SIZE: usize = 1 << 20;

/// How a descriptor is kept from blocking the writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WriteMode {
    /// A file never makes the writer wait for a reader.
    File,
    /// Our own non-blocking description of a pipe or terminal. The one that was inherited is shared with others, whose
    /// writes must not start to fail with EAGAIN.
    Reopened,
    /// A socket takes the wish with each write.
    Socket,
    /// What could not be opened again: asked for room first, and given no more than a pipe takes in one piece.
    Asked,
}

/// A console that lines are written to.
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
                    // With 64 KiB, reader and writer wait for each other half of the time. Refused where the user's limit is reached.
                    let _ = rustix::pipe::fcntl_setpipe_size(&shared, PIPE_SIZE);
                }
                let path = format!("/proc/self/fd/{}", shared.as_raw_fd());
                let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
                match rustix::fs::open(path, flags, Mode::empty()) {
                    Ok(own) => Self { fd: own, mode: WriteMode::Reopened },
                    Err(_) => Self { fd: shared, mode: WriteMode::Asked },
                }
            }
        })
    }

    /// Writes what can be written now. `WouldBlock` means that nothing can.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let written = match self.mode {
            WriteMode::File | WriteMode::Reopened => rustix::io::write(&self.fd, bytes)?,
            WriteMode::Asked => {
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
