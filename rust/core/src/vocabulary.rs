//! Enumerations that have names outside of this crate: in Python, in health checks and in messages between nodes.

use std::fmt;

/// A name that no value of an enumeration has.
#[derive(Debug, PartialEq, Eq)]
pub struct UnknownName {
    name: String,
    what: &'static str,
    known: Vec<&'static str>,
}

impl UnknownName {
    pub(crate) fn new(name: &str, what: &'static str, known: Vec<&'static str>) -> Self {
        Self { name: name.to_owned(), what, known }
    }
}

impl fmt::Display for UnknownName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?} is not a {}; use one of {}", self.name, self.what, self.known.join(", "))
    }
}

impl std::error::Error for UnknownName {}

/// Defines an enumeration whose values have names.
macro_rules! named_values {
    (
        $(#[$attribute:meta])* $type:ident, $what:literal:
        $($(#[$documentation:meta])* $word:ident = $name:literal,)+
    ) => {
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $type {
            $($(#[$documentation])* $word,)+
        }

        impl $type {
            /// All values.
            pub const ALL: [Self; [$($name),+].len()] = [$(Self::$word),+];

            /// The name of the value.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$word => $name,)+
                }
            }
        }

        impl std::str::FromStr for $type {
            type Err = $crate::vocabulary::UnknownName;

            fn from_str(name: &str) -> std::result::Result<Self, Self::Err> {
                let unknown = || $crate::vocabulary::UnknownName::new(name, $what, vec![$($name),+]);
                Self::ALL.into_iter().find(|word| word.name() == name).ok_or_else(unknown)
            }
        }
    };
}

pub(crate) use named_values;

named_values! {
    /// What the agent is doing.
    AgentState, "state":
    /// The agent has not reported a state.
    Unknown = "unknown",
    /// Before the first rendezvous.
    Starting = "starting",
    /// Waiting for the other nodes in a rendezvous.
    Rendezvous = "rendezvous",
    /// Starting the workers.
    Spawning = "spawning",
    /// The workers run.
    Running = "running",
    /// Stopping the workers.
    Stopping = "stopping",
    /// The workers have succeeded; waiting for the other nodes.
    ExitBarrier = "exit barrier",
}

named_values! {
    /// The kind of cause that ends a round and restarts the workers.
    #[derive(serde::Serialize, serde::Deserialize)]
    RestartCause, "cause of a restart":
    /// A worker failed. `--max-restarts` limits how often.
    Failure = "failure",
    /// A node joined, left or was lost.
    Membership = "membership",
}

named_values! {
    /// A phase of a restart, whose duration is measured.
    RestartPhase, "phase of a restart":
    /// From the first failure, as the engine saw it, to the agent's reaction.
    Detect = "detect",
    /// From the first signal to the moment when every process group is empty.
    Stop = "stop",
    /// Waiting for the other nodes in a rendezvous.
    Rendezvous = "rendezvous",
    /// Starting the workers.
    Spawn = "spawn",
}

named_values! {
    /// Why the server closed a connection of a probe.
    DropReason, "reason to drop a connection":
    /// A newer connection needed its place.
    Room = "room",
    /// Its deadline passed.
    Deadline = "deadline",
    /// It left too many bytes of answers unread.
    Unread = "unread",
}

named_values! {
    /// The state of a worker.
    WorkerState, "state of a worker":
    /// It runs.
    Running = "running",
    /// Exit code 0.
    Succeeded = "succeeded",
    /// It exited with another code, or a signal killed it.
    Failed = "failed",
    /// The agent stopped it.
    Stopped = "stopped",
    /// It ended, and only the process that started it knows its status.
    Ended = "ended",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_and_others_are_refused_with_a_list() {
        for state in AgentState::ALL {
            assert_eq!(state.name().parse(), Ok(state));
        }
        for phase in RestartPhase::ALL {
            assert_eq!(phase.name().parse(), Ok(phase));
        }
        let refused = "fail".parse::<RestartCause>().expect_err("unknown").to_string();
        assert_eq!(refused, "\"fail\" is not a cause of a restart; use one of failure, membership");
    }
}
