//! Parses the stream of an agent into messages and checks their order. Pure.

use crate::rendezvous::message::{self, AgentMessage, InvalidMessage, MAX_FRAME_BYTES};
use crate::store::wire::reset_buffer;

/// Maximum number of workers of a node. The sum over all nodes fits the type of a world size.
const MAX_WORKERS: u64 = 1 << 20;

/// Why the connection of an agent is closed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProtocolViolation {
    #[error("it sent an invalid message: {0}")]
    InvalidMessage(#[from] InvalidMessage),
    #[error("its first message is not an introduction")]
    NotIntroduced,
    #[error("it introduced itself twice")]
    IntroducedTwice,
    #[error("{0} workers on one node are over the limit of {MAX_WORKERS}")]
    TooManyWorkers(u64),
}

/// The messages of one agent.
#[derive(Debug)]
pub(super) struct AgentFrames {
    bytes: Vec<u8>,
    /// Number of parsed bytes.
    parsed: usize,
    is_introduced: bool,
}

impl AgentFrames {
    /// Starts with the bytes received so far.
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, parsed: 0, is_introduced: false }
    }

    /// Whether the agent has introduced itself.
    pub(super) fn is_introduced(&self) -> bool {
        self.is_introduced
    }

    /// Takes the next bytes of the stream.
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        // Drops the parsed bytes once they are at least half of the buffer: amortised O(1) per byte.
        if self.parsed > 0 && self.parsed * 2 >= self.bytes.len() {
            self.bytes.drain(..self.parsed);
            self.parsed = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The next message; `None` until more bytes arrive.
    pub(super) fn next(&mut self) -> Result<Option<AgentMessage>, ProtocolViolation> {
        let Some(mut frame) = self.frame() else { return Ok(None) };
        let size = frame.len();
        let Some(message) = message::decode(&mut frame)? else { return Ok(None) };
        self.parsed += size;
        if self.parsed == self.bytes.len() {
            reset_buffer(&mut self.bytes);
            self.parsed = 0;
        }
        self.check(&message)?;
        Ok(Some(message))
    }

    /// A copy of the next frame. Removing it from the front of the buffer would move all following frames each time.
    fn frame(&self) -> Option<Vec<u8>> {
        let rest = &self.bytes[self.parsed..];
        let header = rest.first_chunk()?;
        let length = usize::try_from(u32::from_le_bytes(*header)).unwrap_or(usize::MAX);
        // A frame that announces too great a length is refused at once, without waiting for its bytes.
        let size = header.len() + if length > MAX_FRAME_BYTES { 0 } else { length };
        rest.get(..size).map(<[u8]>::to_vec)
    }

    fn check(&mut self, message: &AgentMessage) -> Result<(), ProtocolViolation> {
        match message {
            AgentMessage::Enter(_) if self.is_introduced => return Err(ProtocolViolation::IntroducedTwice),
            AgentMessage::Enter(_) => self.is_introduced = true,
            _ if !self.is_introduced => return Err(ProtocolViolation::NotIntroduced),
            AgentMessage::Join(join) if join.local_world_size > MAX_WORKERS => {
                return Err(ProtocolViolation::TooManyWorkers(join.local_world_size));
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::rendezvous::message::{Introduction, Join, encode};

    fn enter() -> AgentMessage {
        AgentMessage::Enter(Introduction::new("job".into(), "a".into(), (1, 1)))
    }

    fn join(local_world_size: u64) -> AgentMessage {
        AgentMessage::Join(Join { after: None, role: "default".into(), local_world_size, timeout: Duration::ZERO })
    }

    fn stream(messages: &[AgentMessage]) -> Vec<u8> {
        let mut frames = Vec::new();
        for message in messages {
            encode(message, &mut frames);
        }
        frames
    }

    fn read_all(frames: &mut AgentFrames) -> Result<Vec<AgentMessage>, ProtocolViolation> {
        let mut messages = Vec::new();
        while let Some(message) = frames.next()? {
            messages.push(message);
        }
        Ok(messages)
    }

    #[test]
    fn fragmentation_does_not_change_the_messages() {
        let sent = [
            enter(),
            join(8),
            AgentMessage::Beat { number: 1 },
            AgentMessage::Finished { round: 3 },
            AgentMessage::Beat { number: 1 },
        ];
        let stream = stream(&sent);
        for size in 1..stream.len() {
            let (mut frames, mut messages) = (AgentFrames::new(stream[..size].to_vec()), Vec::new());
            messages.extend(read_all(&mut frames).expect("valid messages"));
            for piece in stream[size..].chunks(size) {
                frames.feed(piece);
                messages.extend(read_all(&mut frames).expect("valid messages"));
            }
            assert_eq!(messages, sent);
            assert!(frames.bytes.is_empty());
        }
    }

    #[test]
    fn reading_many_small_messages_takes_linear_time() {
        const MANY: usize = 400_000;
        let beats = stream(&[AgentMessage::Beat { number: 1 }]).repeat(MANY);
        let mut frames = AgentFrames::new(stream(&[enter()]));
        frames.feed(&beats);
        let begin = Instant::now();
        assert_eq!(read_all(&mut frames).expect("valid messages").len(), MANY + 1);
        // If each message moved all following ones, this would take minutes.
        assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    }

    #[test]
    fn protocol_violations_are_errors() {
        let violation =
            |sent: &[AgentMessage]| read_all(&mut AgentFrames::new(stream(sent))).expect_err("a violation").to_string();
        assert_eq!(violation(&[AgentMessage::Beat { number: 1 }]), "its first message is not an introduction");
        assert_eq!(violation(&[enter(), join(1), enter()]), "it introduced itself twice");
        assert!(read_all(&mut AgentFrames::new(stream(&[enter(), join(MAX_WORKERS)]))).is_ok());
        assert_eq!(
            violation(&[enter(), join(u64::MAX)]),
            format!("{} workers on one node are over the limit of 1048576", u64::MAX)
        );
        let long = u32::try_from(MAX_FRAME_BYTES + 1).expect("small").to_le_bytes().to_vec();
        assert!(matches!(
            read_all(&mut AgentFrames::new(long)),
            Err(ProtocolViolation::InvalidMessage(InvalidMessage::TooLong(_)))
        ));
        assert!(matches!(
            read_all(&mut AgentFrames::new(b"\x02\0\0\0{}".to_vec())),
            Err(ProtocolViolation::InvalidMessage(_))
        ));
    }
}
