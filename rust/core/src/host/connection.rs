//! A connection at the host: its protocol and its unsent bytes.

use std::io::{self, ErrorKind};
use std::time::Instant;

use super::frames::AgentFrames;
use crate::store::wire::{Decoder, reset_buffer};
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
    /// When it was accepted; `None` once it has sent bytes.
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

    /// The buffer for bytes to send.
    pub(super) fn output(&mut self) -> &mut Vec<u8> {
        self.compact(0);
        &mut self.output
    }

    pub(super) fn reply(&mut self, bytes: Vec<u8>) {
        if self.output.is_empty() && bytes.len() > self.output.capacity() {
            self.output = bytes;
        } else {
            self.compact(bytes.len());
            self.output.extend_from_slice(&bytes);
        }
    }

    /// Compacts the buffer once at least half of it has been sent, so that a slow reader cannot make it grow. Amortised O(1) per byte.
    fn compact(&mut self, additional: usize) {
        if self.sent > 0 && self.sent >= self.unsent() {
            let mut rest = Vec::with_capacity(self.unsent() + additional);
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
        reset_buffer(&mut self.output);
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
    pub(super) fn is_introduced(&self) -> bool {
        if let Protocol::Agent(frames) = &self.protocol { frames.is_introduced() } else { false }
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
    fn a_slow_reader_costs_memory_for_unsent_bytes_only() {
        const REPLY: usize = 700 << 10;
        let listener = Listener::bind("127.0.0.1:0".parse().expect("an address")).expect("bind");
        let mut reader = TcpStream::connect(listener.address()).expect("connect");
        let stream = listener.accept().expect("a connection");
        // A send buffer smaller than the unsent bytes that the loop leaves.
        set_socket_send_buffer_size(&stream, 64 << 10).expect("set");
        stream.set_nodelay().expect("set");
        let mut connection = Connection::new(stream, Decoder::new(Limits::default()));
        let (mut expected, mut read, mut buffer) = (0, 0, vec![0; 64 << 10]);
        for number in 0..30u8 {
            connection.reply(vec![number; REPLY]);
            while connection.unsent() > 300 << 10 {
                connection.send().expect("send");
                let size = reader.read(&mut buffer).expect("read");
                for byte in &buffer[..size] {
                    assert_eq!(usize::from(*byte), read / REPLY);
                    read += 1;
                }
            }
            assert!(connection.unsent() > 0, "nothing is unsent: the reader has caught up");
            expected += REPLY;
            let held = connection.output.capacity();
            assert!(held < 3 * REPLY, "{held} bytes for {} unsent, after {expected}", connection.unsent());
        }
    }
}
