//! The settings of a rendezvous, its events and its actions.

use std::time::Duration;

use super::Id;
use crate::rendezvous::message::{AgentMessage, HostMessage, Introduction, Join};
use crate::rendezvous::policy::FailureFacts;

/// Settings of the rendezvous on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostSettings {
    /// Id of the job.
    pub run_id: String,
    /// Minimum number of nodes of a round.
    pub min_nodes: u32,
    /// Maximum number of nodes of a round. Further nodes wait as spares.
    pub max_nodes: u32,
    /// How long a round with the minimum number of nodes waits for further nodes.
    pub last_call: Duration,
    /// A node is lost after this time without a message.
    pub silence: Duration,
    /// Address of the host for workers. If `None`, workers use the endpoint address that their agent was given.
    pub address: Option<String>,
    /// Maximum number of membership changes; `None` means no limit.
    pub max_membership_changes: Option<u64>,
}

/// An event at the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostEvent {
    /// An agent has connected and introduced itself.
    Entered(Id, Introduction),
    /// An agent is ready for a round.
    Joined(Id, Join),
    /// A worker of an agent has failed.
    Failed {
        /// The agent.
        id: Id,
        /// The round.
        round: u64,
        /// Time of the failure in nanoseconds of the wall clock.
        at_ns: u64,
        /// The worker and its exit status, as text.
        text: String,
        /// Exit code of the job if this failure ends it.
        code: i32,
        /// The facts for the restart policy.
        facts: FailureFacts,
        /// The explanation of the failure.
        detail: String,
    },
    /// All workers of an agent have succeeded in this round.
    Finished(Id, u64),
    /// An agent ends the job with this text and exit code.
    Closed(Id, String, i32),
    /// An agent leaves; the text is its reason.
    Left(Id, String),
    /// The connection of an agent has ended; the text is the reason.
    Lost(Id, String),
    /// A heartbeat of an agent, with its number.
    Beat(Id, u64),
    /// A worker has announced a failure through a key of the store.
    FailureAnnounced {
        /// Description of the announcement.
        text: String,
        /// How long the worker has to exit by itself.
        grace: Duration,
    },
    /// A peer that is not an agent of ferrorun connected to the endpoint.
    ForeignPeer(String),
    /// The result of [`HostAction::CheckProbe`]: whether the agent's machine has acknowledged all bytes sent to it.
    ProbeChecked(Id, bool),
    /// The workers of an agent have made progress in this round.
    Progressed(Id, u64),
    /// A deadline may have passed.
    Tick,
}

/// An action for the caller to carry out.
#[expect(clippy::large_enum_variant, reason = "few actions exist at a time, and most of them are messages")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostAction {
    /// Empty the workers' store. Precedes the `Begin` messages of a round.
    RenewStore,
    /// Send a message to an agent.
    Send(Id, HostMessage),
    /// Check whether the agent's machine has acknowledged the probe, and report it with [`HostEvent::ProbeChecked`].
    CheckProbe(Id),
    /// Close the connection.
    Disconnect(Id),
}

impl HostEvent {
    /// The event for a message of an agent.
    #[must_use]
    pub fn from_message(id: Id, message: AgentMessage) -> Self {
        match message {
            AgentMessage::Enter(agent) => Self::Entered(id, agent),
            AgentMessage::Join(join) => Self::Joined(id, join),
            AgentMessage::Failed { round, at_ns, text, code, facts, detail } => {
                Self::Failed { id, round, at_ns, text, code, facts, detail }
            }
            AgentMessage::Progressed { round } => Self::Progressed(id, round),
            AgentMessage::Finished { round } => Self::Finished(id, round),
            AgentMessage::Close { text, code } => Self::Closed(id, text, code),
            AgentMessage::Leave { text } => Self::Left(id, text),
            AgentMessage::Beat { number } => Self::Beat(id, number),
        }
    }
}
