//! The words of health checks: each is shown, and set, by its name.

use std::fmt;
use std::str::FromStr;

/// A name that none of the words has.
#[derive(Debug, PartialEq, Eq)]
pub struct UnknownName {
    name: String,
    what: &'static str,
    known: Vec<&'static str>,
}

impl fmt::Display for UnknownName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?} is not a {}; use one of {}", self.name, self.what, self.known.join(", "))
    }
}

impl std::error::Error for UnknownName {}

macro_rules! words {
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
            /// Every word.
            pub const ALL: [Self; [$($name),+].len()] = [$(Self::$word),+];

            /// The name by which it is shown and set.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$word => $name,)+
                }
            }
        }

        impl FromStr for $type {
            type Err = UnknownName;

            fn from_str(name: &str) -> Result<Self, UnknownName> {
                let unknown = || UnknownName { name: name.to_owned(), what: $what, known: vec![$($name),+] };
                Self::ALL.into_iter().find(|word| word.name() == name).ok_or_else(unknown)
            }
        }
    };
}

words! {
    /// What the agent is doing.
    State, "state":
    /// No agent has said anything.
    Unknown = "unknown",
    /// Before the first rendezvous.
    Starting = "starting",
    /// Meeting the other nodes.
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

words! {
    /// Why workers were started again.
    Cause, "cause of a restart":
    /// A worker failed.
    Failure = "failure",
    /// A node came or went.
    Membership = "membership",
}

words! {
    /// A part of a restart, whose duration is measured.
    Phase, "phase of a restart":
    /// From the engine's note of the first failure to the agent's look at it.
    Detect = "detect",
    /// From the first signal to the moment when every process group is empty.
    Stop = "stop",
    /// Meeting the other nodes.
    Rendezvous = "rendezvous",
    /// Starting the workers.
    Spawn = "spawn",
}

words! {
    /// Why a connection was ended before its peer did.
    Dropped, "reason to drop a connection":
    /// Another needed its place.
    Room = "room",
    /// Its time was over.
    Deadline = "deadline",
    /// Too much was left unread, by it and others.
    Unread = "unread",
}

words! {
    /// How a worker is, or how it ended.
    Outcome, "state of a worker":
    /// It runs.
    Running = "running",
    /// Exit code 0.
    Succeeded = "succeeded",
    /// Any other end of its own.
    Failed = "failed",
    /// The agent stopped it.
    Stopped = "stopped",
    /// It ended, and its status is known to whoever started it.
    Ended = "ended",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_and_others_are_refused_with_a_list() {
        for state in State::ALL {
            assert_eq!(state.name().parse(), Ok(state));
        }
        for phase in Phase::ALL {
            assert_eq!(phase.name().parse(), Ok(phase));
        }
        let refused = "fail".parse::<Cause>().expect_err("unknown").to_string();
        assert_eq!(refused, "\"fail\" is not a cause of a restart; use one of failure, membership");
    }
}
