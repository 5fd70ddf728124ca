//! Waiting for many descriptors: `epoll(7)`, level-triggered.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll;
use rustix::event::{PollFd, PollFlags, Timespec};

/// The readiness that a registration reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Bytes to read, a signalled eventfd, an expired timer, or an ended process.
    Readable,
    /// Room to write.
    Writable,
    /// Only errors and hang-ups, which epoll always reports.
    Hangup,
}

impl Interest {
    fn flags(self) -> epoll::EventFlags {
        match self {
            Self::Readable => epoll::EventFlags::IN,
            Self::Writable => epoll::EventFlags::OUT,
            Self::Hangup => epoll::EventFlags::empty(),
        }
    }
}

/// An epoll instance. A registration carries a `u64` of the caller's choice.
#[derive(Debug)]
pub struct Poller {
    epoll: OwnedFd,
}

impl Poller {
    /// Creates an instance that is closed on exec.
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)? })
    }

    /// Starts watching `fd`; its readiness is reported as `token` until [`Poller::remove`].
    pub fn add(&self, fd: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token), interest.flags())?)
    }

    /// Changes the token and the interest of a watched `fd`.
    pub fn modify(&self, fd: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, fd, epoll::EventData::new_u64(token), interest.flags())?)
    }

    /// Stops watching `fd`.
    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.epoll, fd)?)
    }

    /// Appends the ready tokens, in the order in which they became ready. With `block`, waits until there is at least one, or for a signal.
    pub fn wait(&self, block: bool, ready: &mut Vec<u64>) -> io::Result<()> {
        const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut buffer = [MaybeUninit::<epoll::Event>::uninit(); 128];
        let timeout = if block { None } else { Some(&NOW) };
        match epoll::wait(&self.epoll, &mut buffer, timeout) {
            Ok((events, _)) => ready.extend(events.iter().map(|event| event.data.u64())),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

/// Blocks the calling thread until one of `fds` is readable (`poll(2)`). Returns whether each is readable; all `false` means a timeout.
///
/// A `timeout` of `None` waits without a limit. A wait that a signal interrupts returns as after a timeout.
pub fn wait_readable<const N: usize>(fds: [Option<&dyn AsFd>; N], timeout: Option<Duration>) -> io::Result<[bool; N]> {
    let mut polled: Vec<PollFd<'_>> =
        fds.iter().flatten().map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)).collect();
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    match rustix::event::poll(&mut polled, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let mut readable = polled.iter().map(|fd| !fd.revents().is_empty());
    Ok(fds.map(|fd| fd.is_some() && readable.next().unwrap_or(false)))
}
