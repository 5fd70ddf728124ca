//! The messages between agents and the host of a rendezvous.
//!
//! An agent begins like a client of the store, which lets it distinguish a foreign store from no store. Then it sends the opcode
//! [`UPGRADE`](crate::store::wire::UPGRADE). After that both sides send frames: a length of 4 bytes, little-endian, and that many bytes of
//! JSON.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned};

use super::policy::{Decision, FailureFacts};
use crate::text::{printable, printable_string};
use crate::vocabulary::RestartCause;

/// Version of the messages. Agents of another version are refused.
pub const PROTOCOL: u32 = 3;

/// Maximum length of a frame. The longest message carries the cause of a failure. JSON within JSON has twice its length at most.
pub const MAX_FRAME_BYTES: usize = 128 * 1024;

/// Maximum length of a text from another process within a message.
pub const MAX_TEXT_BYTES: usize = 8 * 1024;

/// Maximum length of the explanation of a failure within a message.
pub const MAX_DETAIL_BYTES: usize = 32 * 1024;

/// The identity of an agent, and the settings of its job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Introduction {
    /// Version of the messages.
    pub protocol: u32,
    /// Id of the job.
    pub run_id: String,
    /// Address of the node, or the name that the user has given it.
    #[serde(deserialize_with = "printable_string")]
    pub name: String,
    /// Process id of the agent.
    pub pid: u32,
    /// Identifies the membership. It is the same for all connections of the membership and distinguishes two agents of one process.
    pub membership: u64,
    /// Number of the connection within the membership. It grows with each connection.
    pub connection: u64,
    /// Whether it runs in the process that hosts the rendezvous.
    pub is_host: bool,
    /// Minimum and maximum number of nodes of a round.
    pub nodes: (u32, u32),
    /// The rank that the user has assigned to this node (static rendezvous).
    pub node_rank: Option<u32>,
    /// Other settings that must be the same on all nodes, by option name.
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
}

impl Introduction {
    /// The introduction of a new membership of this process.
    #[must_use]
    pub fn new(run_id: String, name: String, nodes: (u32, u32)) -> Self {
        let pid = std::process::id();
        // Forked processes share the random state but not the pid.
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

/// A request to join a round. The workers of the former round are gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    /// The last round that the agent took part in.
    pub after: Option<u64>,
    /// Role of its workers.
    pub role: String,
    /// Number of its workers.
    pub local_world_size: u64,
    /// How long it waits for the round to begin.
    pub timeout: Duration,
}

/// A message from an agent to the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgentMessage {
    /// The introduction; always the first message.
    Enter(Introduction),
    /// Request to join the next round.
    Join(Join),
    /// A worker of this agent has failed.
    Failed {
        /// The round.
        round: u64,
        /// Time of the failure in nanoseconds of the wall clock.
        at_ns: u64,
        /// The worker and its exit status, as text.
        #[serde(deserialize_with = "printable_string")]
        text: String,
        /// Exit code of the job if this failure ends it.
        code: i32,
        /// The facts for the restart policy.
        facts: FailureFacts,
        /// The explanation of the failure for the report on all nodes. Rust does not interpret it.
        #[serde(deserialize_with = "bounded_detail")]
        detail: String,
    },
    /// The workers of this agent have made progress in this round.
    Progressed {
        /// The round.
        round: u64,
    },
    /// All workers of this agent have succeeded in this round.
    Finished {
        /// The round.
        round: u64,
    },
    /// End the job: no further round begins.
    Close {
        /// The reason.
        #[serde(deserialize_with = "printable_string")]
        text: String,
        /// Exit code of the job.
        code: i32,
    },
    /// The agent leaves. The other nodes may go on.
    Leave {
        /// The reason.
        #[serde(deserialize_with = "printable_string")]
        text: String,
    },
    /// A heartbeat.
    Beat {
        /// Number of the heartbeat on this connection.
        number: u64,
    },
}

/// The place of a node in a round.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Number of the round, from 0.
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
    /// Address of the workers' store, if the host was given one. The port is that of the endpoint.
    pub address: Option<String>,
    /// Number of rounds that ended because a worker failed.
    pub failures: u64,
    /// Number of restarts that count against the limit.
    pub restarts_used: u64,
    /// Number of rounds that ended because nodes joined, left or were lost.
    pub membership_changes: u64,
    /// Why the round before this one ended.
    pub cause: Option<Cause>,
}

/// Why a round ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cause {
    /// The kind of cause.
    pub kind: RestartCause,
    /// The node where it happened, as [`Introduction::name`].
    #[serde(deserialize_with = "printable_string")]
    pub node: String,
    /// Time in nanoseconds of the wall clock, if known.
    pub at_ns: Option<u64>,
    /// What happened.
    #[serde(deserialize_with = "printable_string")]
    pub text: String,
    /// Exit code of the job if this ends it.
    pub code: i32,
    /// The decision of the restart policy on a failure.
    pub decision: Option<Box<Decision>>,
    /// The explanation of a worker's failure, or empty.
    #[serde(deserialize_with = "bounded_detail")]
    pub detail: String,
    /// Whether a node was lost or has left.
    pub is_loss: bool,
}

impl Cause {
    /// A change of the membership, without a time.
    #[must_use]
    pub fn membership(node: String, text: String) -> Self {
        let (at_ns, decision, detail) = (None, None, String::new());
        Self { kind: RestartCause::Membership, node, at_ns, text, code: 1, decision, detail, is_loss: false }
    }

    /// The loss or the departure of a node.
    #[must_use]
    pub fn loss(node: String, text: String) -> Self {
        Self { is_loss: true, ..Self::membership(node, text) }
    }

    /// A failure without a time and an explanation.
    #[must_use]
    pub fn failure(node: String, text: String) -> Self {
        Self { kind: RestartCause::Failure, ..Self::membership(node, text) }
    }

    /// Whether this cause has a timestamp that precedes `other`'s. A cause without a timestamp counts as later.
    #[must_use]
    pub fn is_before(&self, other: &Self) -> bool {
        self.at_ns.is_some_and(|at_ns| other.at_ns.is_none_or(|other| at_ns < other))
    }
}

/// A message from the host to an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostMessage {
    /// The answer to the introduction.
    Welcome {
        /// Either side declares the other lost after this time without a message.
        silence: Duration,
    },
    /// A round begins; the agent has this place.
    Begin(Place),
    /// The round has ended: stop the workers and join again.
    Over {
        /// The round.
        round: u64,
        /// The cause.
        cause: Cause,
    },
    /// The round did not begin in time.
    TimedOut {
        /// Names of the nodes that have joined.
        #[serde(deserialize_with = "printable_strings")]
        waiting: Vec<String>,
        /// Why the round before it ended.
        #[serde(deserialize_with = "optional_printable_string")]
        cause: Option<String>,
    },
    /// All workers of all nodes have succeeded.
    Released,
    /// There will be no further round.
    Closed {
        /// The reason.
        #[serde(deserialize_with = "printable_string")]
        text: String,
        /// Exit code of the job; 0 for a spare of a job that has succeeded.
        code: i32,
        /// The decision of the restart policy, if a failure ended the job.
        decision: Option<Box<Decision>>,
        /// The explanation of the worker's failure that ended the job, or empty.
        #[serde(deserialize_with = "bounded_detail")]
        detail: String,
        /// Whether the loss of a node ended the job.
        is_loss: bool,
    },
    /// The job had ended, or was about to end, when the agent came.
    Late {
        /// How the job ended.
        #[serde(deserialize_with = "printable_string")]
        text: String,
    },
    /// The host refuses this agent.
    Refused {
        /// The reason.
        #[serde(deserialize_with = "printable_string")]
        text: String,
    },
    /// The host has declared this agent lost. The agent may connect again as a new member.
    Dropped {
        /// The reason.
        #[serde(deserialize_with = "printable_string")]
        text: String,
    },
    /// A warning for the user.
    #[serde(rename = "Remark")]
    Warning {
        /// The warning.
        #[serde(deserialize_with = "printable_string")]
        text: String,
    },
    /// The answer to a heartbeat.
    Beat {
        /// Number of the heartbeat.
        number: u64,
    },
    /// A probe: the agent does not reply, but its kernel acknowledges the bytes.
    Probe,
}

/// Why received bytes are not a message.
#[derive(Debug, thiserror::Error)]
pub enum InvalidMessage {
    /// The announced length exceeds the limit.
    #[error("a message of {0} bytes is over the limit of {MAX_FRAME_BYTES}")]
    TooLong(usize),
    /// The frame is not a valid message.
    #[error("it cannot be parsed: {0}")]
    Malformed(#[from] serde_json::Error),
}

/// Appends a message as a frame.
pub fn encode(message: &impl Serialize, frames: &mut Vec<u8>) {
    let start = frames.len();
    frames.extend_from_slice(&[0; 4]);
    // Cannot fail: the messages hold strings, numbers and lists of them, and a vector accepts all bytes.
    if serde_json::to_writer(&mut *frames, message).is_err() {
        return frames.truncate(start);
    }
    let length = u32::try_from(frames.len() - start - 4).unwrap_or(u32::MAX);
    frames[start..start + 4].copy_from_slice(&length.to_le_bytes());
}

/// Removes the first message from the front of `frames`; `None` until it is complete.
pub fn decode<M: DeserializeOwned>(frames: &mut Vec<u8>) -> Result<Option<M>, InvalidMessage> {
    let Some(length) = frames.first_chunk() else { return Ok(None) };
    let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
    if length > MAX_FRAME_BYTES {
        return Err(InvalidMessage::TooLong(length));
    }
    let Some(frame) = frames.get(4..4 + length) else { return Ok(None) };
    let message = serde_json::from_slice(frame)?;
    frames.drain(..4 + length);
    Ok(Some(message))
}

/// Drops an explanation that is too long: a part of it is not valid.
fn bounded_detail<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let mut detail = String::deserialize(deserializer)?;
    if detail.len() > MAX_DETAIL_BYTES {
        detail.clear();
    }
    Ok(detail)
}

fn printable_strings<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    Vec::<String>::deserialize(deserializer).map(|texts| texts.iter().map(|text| printable(text)).collect())
}

fn optional_printable_string<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Option::<String>::deserialize(deserializer).map(|text| text.as_deref().map(printable))
}
