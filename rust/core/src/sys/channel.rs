//! Messages with descriptors between processes of this host: `SOCK_SEQPACKET` and `SCM_RIGHTS`.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

/// Maximum number of descriptors in a message.
pub const MAX_FDS: usize = 64;

/// One end of a channel. Closed on exec.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// Both ends of a new channel.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self(one), Self(other)))
    }

    /// Sends one message with up to [`MAX_FDS`] descriptors. Never blocks: fails with `WouldBlock` if the receiver does not read, and with
    /// `EMSGSIZE` if the message is larger than the socket's buffer.
    pub fn send(&self, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        rustix::net::sendmsg(&self.0, &[IoSlice::new(message)], &mut ancillary, flags)?;
        Ok(())
    }

    /// Sends as [`Channel::send`] does, but waits while the receiver does not read.
    pub fn send_blocking(&self, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        loop {
            match self.send(message, fds) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    match rustix::event::poll(&mut [PollFd::new(&self.0, PollFlags::OUT)], None) {
                        Ok(_) | Err(Errno::INTR) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                sent => return sent,
            }
        }
    }

    /// Receives one message into `buffer`; returns its length and its descriptors. The length is 0 when the other end is closed.
    ///
    /// With `block`, waits for a message; a signal interrupts the wait. Fails with `InvalidData` if the message does not fit.
    pub fn receive(&self, buffer: &mut [u8], block: bool) -> io::Result<(usize, Vec<OwnedFd>)> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | if block { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        let received = rustix::net::recvmsg(&self.0, &mut [IoSliceMut::new(buffer)], &mut ancillary, flags)?;
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        if received.flags.contains(ReturnFlags::TRUNC) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok((received.bytes, fds))
    }
}

impl From<OwnedFd> for Channel {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.0
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_arrives_whole_with_its_descriptors() {
        let (one, other) = Channel::pair().expect("pair");
        let (reader, writer) = rustix::pipe::pipe().expect("pipe");
        one.send(b"hello", &[writer.as_fd()]).expect("sent");
        drop(writer);
        let mut buffer = [0; 8];
        let (length, fds) = other.receive(&mut buffer, true).expect("received");
        assert_eq!(&buffer[..length], b"hello");
        rustix::io::write(&fds[0], b"x").expect("the pipe is open");
        let mut byte = [0; 1];
        rustix::io::read(&reader, &mut byte).expect("read");
        assert_eq!(&byte, b"x");
        drop(one);
        assert_eq!(other.receive(&mut buffer, true).expect("the end").0, 0);
    }

    #[test]
    fn a_blocking_send_waits_for_a_receiver_that_does_not_read() {
        let (one, other) = Channel::pair().expect("pair");
        let mut sent: u32 = 0;
        while one.send(&sent.to_ne_bytes(), &[]).is_ok() {
            sent += 1;
        }
        let sender = std::thread::spawn(move || one.send_blocking(&sent.to_ne_bytes(), &[]));
        for expected in 0..=sent {
            let mut buffer = [0; 4];
            other.receive(&mut buffer, true).expect("received");
            assert_eq!(u32::from_ne_bytes(buffer), expected);
        }
        sender.join().expect("thread").expect("sent");
    }

    #[test]
    fn a_blocking_send_ends_with_the_receiver() {
        let (one, other) = Channel::pair().expect("pair");
        while one.send(b"x", &[]).is_ok() {}
        let sender = std::thread::spawn(move || one.send_blocking(b"x", &[]));
        drop(other);
        sender.join().expect("thread").expect_err("there is no receiver");
    }

    #[test]
    fn a_message_that_does_not_fit_is_an_error() {
        let (one, other) = Channel::pair().expect("pair");
        one.send(b"hello", &[]).expect("sent");
        let error = other.receive(&mut [0; 4], true).expect_err("too long");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        let error = other.receive(&mut [0; 4], false).expect_err("nothing there");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}
