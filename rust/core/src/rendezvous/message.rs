//! What agents and the host of a rendezvous say to each other.
//!
//! An agent begins like any client of the store, so that a store which is not ours can be told from no store at all, and then sends the
//! opcode [`UPGRADE`](crate::store::wire::UPGRADE). From there on both sides send frames: a length of 4 bytes, little-endian, and as much JSON.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned};

use crate::text::printable;
use crate::vocabulary::RestartCause;

/// Version of the messages. Agents of another version are refused.
pub const PROTOCOL: u32 = 2;

/// Longest frame. The longest message carries the cause of a failure.
pub const MOST_FRAME_BYTES: usize = 64 * 1024;

/// Longest text that somebody else has written into a message.
pub const MOST_TEXT_BYTES: usize = 8 * 1024;

/// Who an agent is, and what job it was started for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Introduction {
    /// Version of the messages.
    pub protocol: u32,
    /// The job.
    pub run_id: String,
    /// Address of the node, or what the user calls it.
    #[serde(deserialize_with = "shown")]
    pub name: String,
    /// Process id there.
    pub pid: u32,
    /// Which membership this is: the same in all its connections, and no other's. Two agents of one process look alike otherwise.
    pub membership: u64,
    /// Which connection of the membership this is; later ones have larger numbers.
    pub connection: u64,
    /// Whether it runs in the process that hosts the rendezvous.
    pub is_host: bool,
    /// Fewest and most nodes of a round, as it was told.
    pub nodes: (u32, u32),
    /// The rank it was given beforehand (static rendezvous).
    pub node_rank: Option<u32>,
    /// Other settings that must be the same on all nodes, by the name of their option.
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
}

impl Introduction {
    /// Of a new membership of this process.
    #[must_use]
    pub fn new(run_id: String, name: String, nodes: (u32, u32)) -> Self {
        let pid = std::process::id();
        // Forked processes have the same random state, and each its own pid.
        let membership = RandomState::new().hash_one((pid, SystemTime::now()));
        let protocol = PROTOCOL;
        let settings = BTreeMap::new();
        Self {
            protocol,
            run_id,
            name,
            pid,
            membership,
            connection: 0,
            is_host: false,
            nodes,
            node_rank: None,
            settings,
        }
    }
}

/// An agent is ready for a round: its workers of the former one are gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    /// The round it took part in last.
    pub after: Option<u64>,
    /// Role of its workers.
    pub role: String,
    /// How many it starts.
    pub local_world_size: u64,
    /// How long it waits for the round to begin.
    pub timeout: Duration,
}

/// From an agent to the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgentMessage {
    /// The first message.
    Enter(Introduction),
    /// Take me into the next round.
    Join(Join),
    /// A worker of mine has failed in this round.
    Failed {
        /// The round.
        round: u64,
        /// When, as nanoseconds of the wall clock.
        at_ns: u64,
        /// Who, and how.
        #[serde(deserialize_with = "shown")]
        text: String,
        /// Exit code of the job if this failure ends it.
        code: i32,
        /// I will not come back.
        is_final: bool,
    },
    /// All my workers of this round have succeeded.
    Finished {
        /// The round.
        round: u64,
    },
    /// There shall be no other round.
    Close {
        /// Why.
        #[serde(deserialize_with = "shown")]
        text: String,
        /// Exit code of the job.
        code: i32,
    },
    /// I go; the others may go on.
    Leave {
        /// Why.
        #[serde(deserialize_with = "shown")]
        text: String,
    },
    /// I am there.
    Beat {
        /// Which beat of this connection.
        number: u64,
    },
}

/// A place in a round.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The round, from 0.
    pub round: u64,
    /// Rank of the node.
    pub group_rank: u64,
    /// Number of nodes.
    pub group_world_size: u64,
    /// Global rank of its first worker.
    pub first_rank: u64,
    /// Number of workers.
    pub world_size: u64,
    /// Rank of its first worker among those of its role.
    pub first_role_rank: u64,
    /// Number of workers of its role.
    pub role_world_size: u64,
    /// Address that workers find their store at, where the host's user has said one. The port is the host's.
    pub address: Option<String>,
    /// How many rounds ended because a worker failed.
    pub failures: u64,
    /// How many rounds ended because nodes came or went.
    pub membership_changes: u64,
    /// Why the round before this one ended.
    pub cause: Option<Cause>,
}

/// Why a round ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cause {
    /// The kind of cause.
    pub kind: RestartCause,
    /// The node it happened on, as [`Introduction::name`].
    #[serde(deserialize_with = "shown")]
    pub node: String,
    /// When, as nanoseconds of the wall clock, where that is known.
    pub at_ns: Option<u64>,
    /// What happened.
    #[serde(deserialize_with = "shown")]
    pub text: String,
    /// Exit code of the job, if it ends of this.
    pub code: i32,
}

impl Cause {
    /// Whether this is known to have happened before `other`, of which it may not be known when it happened.
    #[must_use]
    pub fn is_before(&self, other: &Self) -> bool {
        self.at_ns.is_some_and(|at_ns| other.at_ns.is_none_or(|other| at_ns < other))
    }
}

/// From the host to an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostMessage {
    /// The answer to the first message.
    Welcome {
        /// The other side is taken for lost after so much silence.
        silence: Duration,
    },
    /// A round begins.
    Begin(Place),
    /// The round is over: stop your workers and join again.
    Over {
        /// The round.
        round: u64,
        /// Why.
        cause: Cause,
    },
    /// The round did not begin in time.
    TimedOut {
        /// Nodes that are there.
        #[serde(deserialize_with = "shown_list")]
        waiting: Vec<String>,
        /// Why the round before it ended.
        #[serde(deserialize_with = "shown_option")]
        cause: Option<String>,
    },
    /// All workers of all nodes have succeeded.
    Released,
    /// There will be no other round.
    Closed {
        /// Why.
        #[serde(deserialize_with = "shown")]
        text: String,
        /// Exit code of the job; 0 for a spare of a job that has succeeded.
        code: i32,
    },
    /// The job has ended, or was about to, when the agent came.
    Late {
        /// How it ended.
        #[serde(deserialize_with = "shown")]
        text: String,
    },
    /// The host does not want this agent.
    Refused {
        /// Why.
        #[serde(deserialize_with = "shown")]
        text: String,
    },
    /// The host has taken this agent for lost. It may come again, as another one.
    Dropped {
        /// Why.
        #[serde(deserialize_with = "shown")]
        text: String,
    },
    /// Something that people should know.
    Remark {
        /// What.
        #[serde(deserialize_with = "shown")]
        text: String,
    },
    /// The answer to a beat.
    Beat {
        /// That of the beat.
        number: u64,
    },
    /// Needs no answer but that of the machine, which acknowledges it.
    Probe,
}

/// Why what came is no message.
#[derive(Debug, thiserror::Error)]
pub enum Garbled {
    /// It announces more than a message has.
    #[error("a message of {0} bytes is over the limit of {MOST_FRAME_BYTES}")]
    TooLong(usize),
    /// It is not one.
    #[error("it is not understood: {0}")]
    NotUnderstood(#[from] serde_json::Error),
}

/// Appends a message as a frame.
pub fn encode(message: &impl Serialize, frames: &mut Vec<u8>) {
    let start = frames.len();
    frames.extend_from_slice(&[0; 4]);
    // Strings, numbers and lists of them: there is nothing to fail, and a vector takes everything.
    if serde_json::to_writer(&mut *frames, message).is_err() {
        return frames.truncate(start);
    }
    let length = u32::try_from(frames.len() - start - 4).unwrap_or(u32::MAX);
    frames[start..start + 4].copy_from_slice(&length.to_le_bytes());
}

/// Takes the first message off the front of `frames`; `None` until it is complete.
pub fn decode<M: DeserializeOwned>(frames: &mut Vec<u8>) -> Result<Option<M>, Garbled> {
    let Some(length) = frames.first_chunk() else { return Ok(None) };
    let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
    if length > MOST_FRAME_BYTES {
        return Err(Garbled::TooLong(length));
    }
    let Some(frame) = frames.get(4..4 + length) else { return Ok(None) };
    let message = serde_json::from_slice(frame)?;
    frames.drain(..4 + length);
    Ok(Some(message))
}

/// Text of another process, which is shown to people.
fn shown<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    String::deserialize(deserializer).map(|text| printable(&text))
}

fn shown_list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    Vec::<String>::deserialize(deserializer).map(|texts| texts.iter().map(|text| printable(text)).collect())
}

fn shown_option<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Option::<String>::deserialize(deserializer).map(|text| text.as_deref().map(printable))
}
