//! Parses the stream of an agent into messages and checks their order. Pure.

use crate::rendezvous::message::{self, AgentMessage, Garbled, MOST_FRAME_BYTES};
use crate::store::wire::empty;

/// Most workers of a node. The sum over all nodes fits the type of a world size.
const MOST_WORKERS: u64 = 1 << 20;

/// Why the connection of an agent is closed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Breach {
    #[error("its message is garbled: {0}")]
    Garbled(#[from] Garbled),
    #[error("it did not say who it is first")]
    Unknown,
    #[error("it said a second time who it is")]
    Again,
    #[error("{0} workers on one node are over the limit of {MOST_WORKERS}")]
    TooManyWorkers(u64),
}

/// The messages of one agent.
#[derive(Debug)]
pub(super) struct AgentFrames {
    bytes: Vec<u8>,
    /// How many of them were parsed.
    used: usize,
    has_entered: bool,
}

impl AgentFrames {
    /// Starts with the bytes received so far.
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, used: 0, has_entered: false }
    }

    /// Whether the agent has introduced itself.
    pub(super) fn has_entered(&self) -> bool {
        self.has_entered
    }

    /// Takes the next bytes of the stream.
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        // Drops the parsed bytes once they are at least half of the buffer: amortised O(1) per byte.
        if self.used > 0 && self.used * 2 >= self.bytes.len() {
            self.bytes.drain(..self.used);
            self.used = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The next message; `None` until more bytes arrive.
    pub(super) fn next(&mut self) -> Result<Option<AgentMessage>, Breach> {
        let Some(mut frame) = self.frame() else { return Ok(None) };
        let size = frame.len();
        let Some(request) = message::decode(&mut frame)? else { return Ok(None) };
        self.used += size;
        if self.used == self.bytes.len() {
            empty(&mut self.bytes);
            self.used = 0;
        }
        self.check(&request)?;
        Ok(Some(request))
    }

    /// A copy of the next frame. Removing it from the front would move all following frames each time.
    fn frame(&self) -> Option<Vec<u8>> {
        let rest = &self.bytes[self.used..];
        let header = rest.first_chunk()?;
        let length = usize::try_from(u32::from_le_bytes(*header)).unwrap_or(usize::MAX);
        // A frame that announces too great a length is refused at once, without waiting for its bytes.
        let size = header.len() + if length > MOST_FRAME_BYTES { 0 } else { length };
        rest.get(..size).map(<[u8]>::to_vec)
    }

    fn check(&mut self, request: &AgentMessage) -> Result<(), Breach> {
        match request {
            AgentMessage::Enter(_) if self.has_entered => return Err(Breach::Again),
            AgentMessage::Enter(_) => self.has_entered = true,
            _ if !self.has_entered => return Err(Breach::Unknown),
            AgentMessage::Join(join) if join.local_world_size > MOST_WORKERS => {
                return Err(Breach::TooManyWorkers(join.local_world_size));
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

    fn stream(requests: &[AgentMessage]) -> Vec<u8> {
        let mut frames = Vec::new();
        for request in requests {
            encode(request, &mut frames);
        }
        frames
    }

    fn heard(frames: &mut AgentFrames) -> Result<Vec<AgentMessage>, Breach> {
        let mut requests = Vec::new();
        while let Some(request) = frames.next()? {
            requests.push(request);
        }
        Ok(requests)
    }

    #[test]
    fn how_the_stream_is_cut_makes_no_difference() {
        let said = [
            enter(),
            join(8),
            AgentMessage::Beat { number: 1 },
            AgentMessage::Finished { round: 3 },
            AgentMessage::Beat { number: 1 },
        ];
        let stream = stream(&said);
        for size in 1..stream.len() {
            let (mut frames, mut requests) = (AgentFrames::new(stream[..size].to_vec()), Vec::new());
            requests.extend(heard(&mut frames).expect("well said"));
            for piece in stream[size..].chunks(size) {
                frames.feed(piece);
                requests.extend(heard(&mut frames).expect("well said"));
            }
            assert_eq!(requests, said);
            assert!(frames.bytes.is_empty());
        }
    }

    #[test]
    fn many_small_messages_cost_what_each_costs() {
        const MANY: usize = 400_000;
        let beats = stream(&[AgentMessage::Beat { number: 1 }]).repeat(MANY);
        let mut frames = AgentFrames::new(stream(&[enter()]));
        frames.feed(&beats);
        let begin = Instant::now();
        assert_eq!(heard(&mut frames).expect("well said").len(), MANY + 1);
        // With all that follow moved each time, this takes minutes.
        assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    }

    #[test]
    fn who_says_what_may_not_be_said_is_in_breach() {
        let breach =
            |said: &[AgentMessage]| heard(&mut AgentFrames::new(stream(said))).expect_err("a breach").to_string();
        assert_eq!(breach(&[AgentMessage::Beat { number: 1 }]), "it did not say who it is first");
        assert_eq!(breach(&[enter(), join(1), enter()]), "it said a second time who it is");
        assert!(heard(&mut AgentFrames::new(stream(&[enter(), join(MOST_WORKERS)]))).is_ok());
        assert_eq!(
            breach(&[enter(), join(u64::MAX)]),
            format!("{} workers on one node are over the limit of 1048576", u64::MAX)
        );
        let long = u32::try_from(MOST_FRAME_BYTES + 1).expect("small").to_le_bytes().to_vec();
        assert!(matches!(heard(&mut AgentFrames::new(long)), Err(Breach::Garbled(Garbled::TooLong(_)))));
        assert!(matches!(heard(&mut AgentFrames::new(b"\x02\0\0\0{}".to_vec())), Err(Breach::Garbled(_))));
    }
}
