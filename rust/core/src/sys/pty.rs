//! Pseudo-terminals that pass bytes unchanged and control no session.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize};

/// Both ends of a pseudo-terminal.
#[derive(Debug)]
pub struct Pty {
    /// The end of the agent. It does not block.
    pub agent_end: OwnedFd,
    /// The end of the worker.
    pub worker_end: OwnedFd,
}

impl Pty {
    /// Opens a pseudo-terminal in raw mode: no echo, no signals, no conversion of line ends.
    pub fn open() -> io::Result<Self> {
        // Without NOCTTY, an agent that leads a session would get this terminal as its controlling terminal.
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let agent_end = openpt(flags)?;
        unlockpt(&agent_end)?;
        let worker_end = ioctl_tiocgptpeer(&agent_end, flags)?;
        let mut mode = tcgetattr(&worker_end)?;
        mode.make_raw();
        tcsetattr(&worker_end, OptionalActions::Now, &mode)?;
        rustix::io::ioctl_fionbio(&agent_end, true)?;
        Ok(Self { agent_end, worker_end })
    }
}

/// Gives the terminal `to` the window size of `from`. The kernel does nothing if it has that size.
pub fn copy_size(from: impl AsFd, to: impl AsFd) -> io::Result<()> {
    Ok(tcsetwinsize(to, tcgetwinsize(from)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_pass_unchanged() {
        let pty = Pty::open().expect("a pseudo-terminal");
        assert!(rustix::termios::isatty(&pty.worker_end));
        let bytes = b"a\nb\r\n\x03\x04\x11\xff\0";
        rustix::io::write(&pty.worker_end, bytes).expect("written");
        let mut read = [0; 64];
        let length = rustix::io::read(&pty.agent_end, &mut read).expect("read");
        assert_eq!(&read[..length], bytes);
        assert_eq!(rustix::io::read(&pty.agent_end, &mut read), Err(rustix::io::Errno::AGAIN));
    }

    #[test]
    fn the_agents_end_has_an_error_after_the_last_byte_of_a_closed_workers_end() {
        let Pty { agent_end, worker_end } = Pty::open().expect("a pseudo-terminal");
        rustix::io::write(&worker_end, b"last").expect("written");
        drop(worker_end);
        let mut read = [0; 64];
        assert_eq!(rustix::io::read(&agent_end, &mut read), Ok(4));
        assert_eq!(rustix::io::read(&agent_end, &mut read), Err(rustix::io::Errno::IO));
    }

    #[test]
    fn the_window_size_is_copied() {
        let (first, second) = (Pty::open().expect("a terminal"), Pty::open().expect("a terminal"));
        let mut size = tcgetwinsize(&first.worker_end).expect("a size");
        (size.ws_row, size.ws_col) = (33, 99);
        tcsetwinsize(&first.worker_end, size).expect("set");
        copy_size(&first.worker_end, &second.agent_end).expect("copied");
        let copied = tcgetwinsize(&second.worker_end).expect("a size");
        assert_eq!((copied.ws_row, copied.ws_col), (33, 99));
    }
}
