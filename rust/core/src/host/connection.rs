//! A connection at the host: its protocol and its unsent bytes.

use std::io::{self, ErrorKind};
use std::time::Instant;

use super::frames::AgentFrames;
use crate::store::wire::{Decoder, empty};
use crate::sys::net::Stream;
use crate::sys::poller::Interest;

/// The protocol of a connection.
#[derive(Debug)]
pub(super) enum Protocol {
    Store(Decoder),
    Agent(AgentFrames),
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) stream: Stream,
    pub(super) protocol: Protocol,
    output: Vec<u8>,
    sent: usize,
    pub(super) interest: Interest,
    /// When it was accepted, as long as it has sent nothing.
    pub(super) silent_since: Option<Instant>,
}

impl Connection {
    pub(super) fn new(stream: Stream, decoder: Decoder) -> Self {
        let protocol = Protocol::Store(decoder);
        let silent_since = Some(Instant::now());
        Self { stream, protocol, output: Vec::new(), sent: 0, interest: Interest::Readable, silent_since }
    }

    pub(super) fn unsent(&self) -> usize {
        self.output.len() - self.sent
    }

    /// The buffer to append bytes to send.
    pub(super) fn output(&mut self) -> &mut Vec<u8> {
        self.forget_sent(0);
        &mut self.output
    }

    pub(super) fn reply(&mut self, bytes: Vec<u8>) {
        if self.output.is_empty() && bytes.len() > self.output.capacity() {
            self.output = bytes;
        } else {
            self.forget_sent(bytes.len());
            self.output.extend_from_slice(&bytes);
        }
    }

    /// Compacts the buffer once at least half of it has been sent, so that a slow reader cannot make it grow. Amortised O(1) per byte.
    fn forget_sent(&mut self, coming: usize) {
        if self.sent > 0 && self.sent >= self.unsent() {
            let mut rest = Vec::with_capacity(self.unsent() + coming);
            rest.extend_from_slice(&self.output[self.sent..]);
            self.output = rest;
            self.sent = 0;
        }
    }

    /// Sends as much as the kernel takes.
    pub(super) fn send(&mut self) -> io::Result<()> {
        while self.unsent() > 0 {
            match self.stream.write(&self.output[self.sent..]) {
                Ok(sent) => self.sent += sent,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        empty(&mut self.output);
        self.sent = 0;
        Ok(())
    }

    pub(super) fn is_agent(&self) -> bool {
        matches!(self.protocol, Protocol::Agent(_))
    }

    /// The messages of an agent.
    pub(super) fn frames(&mut self) -> Option<&mut AgentFrames> {
        if let Protocol::Agent(frames) = &mut self.protocol { Some(frames) } else { None }
    }

    /// Whether it is an agent that has introduced itself.
    pub(super) fn has_entered(&self) -> bool {
        if let Protocol::Agent(frames) = &self.protocol { frames.has_entered() } else { false }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpStream;

    use rustix::net::sockopt::set_socket_send_buffer_size;

    use super::*;
    use crate::store::wire::Limits;
    use crate::sys::net::Listener;

    #[test]
    fn who_reads_slowly_for_ever_costs_what_is_unsent() {
        const REPLY: usize = 700 << 10;
        let listener = Listener::bind("127.0.0.1:0".parse().expect("an address")).expect("bind");
        let mut reader = TcpStream::connect(listener.address()).expect("connect");
        let stream = listener.accept().expect("a connection");
        // There is less room in the kernel than is always left to send.
        set_socket_send_buffer_size(&stream, 64 << 10).expect("set");
        stream.set_nodelay().expect("set");
        let mut connection = Connection::new(stream, Decoder::new(Limits::default()));
        let (mut expected, mut read, mut buffer) = (0, 0, vec![0; 64 << 10]);
        for number in 0..30u8 {
            connection.reply(vec![number; REPLY]);
            while connection.unsent() > 300 << 10 {
                connection.send().expect("room or none");
                let size = reader.read(&mut buffer).expect("some");
                for byte in &buffer[..size] {
                    assert_eq!(usize::from(*byte), read / REPLY);
                    read += 1;
                }
            }
            assert!(connection.unsent() > 0, "it has caught up");
            expected += REPLY;
            let held = connection.output.capacity();
            assert!(held < 3 * REPLY, "{held} bytes for {} unsent, after {expected}", connection.unsent());
        }
    }
}
