//! Enumerations whose names are visible outside this crate: in Python, in health checks and in messages between nodes.

use std::fmt;

/// A name that belongs to no value of an enumeration.
#[derive(Debug, PartialEq, Eq)]
pub struct UnknownName {
    name: String,
    description: &'static str,
    known: Vec<&'static str>,
}

impl UnknownName {
    pub(crate) fn new(name: &str, description: &'static str, known: Vec<&'static str>) -> Self {
        Self { name: name.to_owned(), description, known }
    }
}

impl fmt::Display for UnknownName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?} is not a {}; use one of {}", self.name, self.description, self.known.join(", "))
    }
}

impl std::error::Error for UnknownName {}

/// Defines an enumeration whose values have names.
macro_rules! named_values {
    (
        $(#[$attribute:meta])* $type:ident, $description:literal:
        $($(#[$documentation:meta])* $variant:ident = $name:literal,)+
    ) => {
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $type {
            $($(#[$documentation])* $variant,)+
        }

        impl $type {
            /// All values.
            pub const ALL: [Self; [$($name),+].len()] = [$(Self::$variant),+];

            /// The name of the value.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }
        }

        impl std::str::FromStr for $type {
            type Err = $crate::vocabulary::UnknownName;

            fn from_str(name: &str) -> std::result::Result<Self, Self::Err> {
                let unknown = || $crate::vocabulary::UnknownName::new(name, $description, vec![$($name),+]);
                Self::ALL.into_iter().find(|value| value.name() == name).ok_or_else(unknown)
            }
        }
    };
}

pub(crate) use named_values;

named_values! {
    /// The current activity of the agent.
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
    /// The kind of event that ends a round and restarts the workers.
    #[derive(serde::Serialize, serde::Deserialize)]
    RestartCause, "cause of a restart":
    /// A worker failed. `--max-restarts` limits these restarts.
    Failure = "failure",
    /// A node joined, left or was lost. `max_membership_changes` limits these restarts.
    Membership = "membership",
}

named_values! {
    /// The rule that decided whether a failure is followed by a restart.
    #[derive(serde::Serialize, serde::Deserialize)]
    RestartReason, "reason of a restart decision":
    /// Restart without a delay.
    AtOnce = "at_once",
    /// Restart after a back-off, because the workers fail again and again right after their start.
    Backoff = "backoff",
    /// The program's own restart policy decided.
    Program = "program",
    /// End: no restart is left.
    MaxRestarts = "max_restarts",
    /// End: too many restarts within the period.
    RestartRate = "restart_rate",
    /// End: the script forbids a restart by its exit code.
    NoRestartCode = "no_restart_code",
    /// End: the exit code or signal is final.
    FatalExitCode = "fatal_exit_code",
    /// End: the cause is final.
    FatalCause = "fatal_cause",
    /// End: the first start failed too early.
    MinUptime = "min_uptime",
    /// End: restarts without progress.
    NoProgress = "no_progress",
    /// End: a node was lost or has left.
    NodeFailure = "node_failure",
}

named_values! {
    /// A phase of a restart. Its duration is measured.
    RestartPhase, "phase of a restart":
    /// From the time at which the engine noticed the first failure to the agent's reaction.
    Detect = "detect",
    /// From the first signal until every process group is empty.
    Stop = "stop",
    /// Waiting for the other nodes in a rendezvous.
    Rendezvous = "rendezvous",
    /// Starting the workers, at least one as a new process.
    Spawn = "spawn",
    /// Starting the workers, all from parked processes.
    Release = "release",
}

named_values! {
    /// The receivers of the signal that requests the end of a worker.
    SignalTarget, "signal target":
    /// The worker and all other processes of its process group.
    Group = "group",
    /// The worker alone. The rest of its process group gets SIGTERM after the worker has ended.
    Leader = "leader",
}

named_values! {
    /// Why the workers are stopped.
    StopReason, "reason for a stop":
    /// The agent got a signal that ends the job.
    Signal = "signal",
    /// A worker failed, on this node or on another one.
    Failure = "failure",
    /// A node joined, left or was lost.
    Membership = "membership",
    /// All workers of the node have succeeded. Processes that they left behind are stopped.
    Success = "success",
    /// The program that embeds the agent ends the workers.
    Shutdown = "shutdown",
}

named_values! {
    /// Why the health server closed a connection.
    DropReason, "reason to drop a connection":
    /// The connection limit was reached and a newer connection took its place.
    Room = "room",
    /// Its deadline passed.
    Deadline = "deadline",
    /// The client left too many response bytes unread.
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
    /// It ended, but the engine cannot get its exit status.
    Ended = "ended",
}

named_values! {
    /// The effect of a log line that matches a pattern.
    LogEffect, "effect of a log line":
    /// The worker has failed.
    Fail = "fail",
    /// A warning.
    Warn = "warn",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_to_their_values_and_unknown_names_list_the_known_ones() {
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
