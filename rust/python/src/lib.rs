//! The native module `ferroelastic._rust`, documented in `python/ferroelastic/_rust.pyi`.
//!
//! Converts arguments, calls ferroelastic-core and maps errors. Makes no decisions.

mod console;
mod convert;
mod engine;
mod errors;
mod group;
mod guard;
mod health;
mod log_rules;
mod policy;
mod relay;
mod rendezvous;
mod store;
mod sys;
mod tail;
mod warm;
mod watchdog;

use pyo3::prelude::*;

/// Calls `prctl(PR_SET_PDEATHSIG)` for the calling process.
#[pyfunction]
fn arm_parent_death_signal(signal: i32) -> PyResult<()> {
    Ok(ferroelastic_core::sys::spawn::arm_parent_death_signal(signal)?)
}

/// Stack size of this package's threads in bytes.
#[pyfunction]
fn thread_stack_bytes() -> usize {
    ferroelastic_core::sys::threads::stack_bytes()
}

/// Text of another process without terminal control characters.
#[pyfunction]
fn printable(text: &str) -> String {
    ferroelastic_core::text::printable(text)
}

#[pymodule]
mod _rust {
    #[pymodule_export]
    use super::console::Console;
    #[pymodule_export]
    use super::engine::{Command, Engine};
    #[pymodule_export]
    use super::errors::{ForkedError, SpawnError};
    #[pymodule_export]
    use super::group::{Exit, Group, Leftover, StopFile, StopReport, Survivor};
    #[pymodule_export]
    use super::guard::{Guard, create_cgroup, find_detached, remove_cgroup, stand_guard};
    #[pymodule_export]
    use super::health::HealthServer;
    #[pymodule_export]
    use super::log_rules::{LogFailure, LogRotation, LogRules, LogScan};
    #[pymodule_export]
    use super::policy::{Decision, FailureFacts, RestartPolicy};
    #[pymodule_export]
    use super::relay::{Relay, RelayReport, WorkerEnd};
    #[pymodule_export]
    use super::rendezvous::{Cause, Membership, Place, RendezvousClient};
    #[pymodule_export]
    use super::store::{StoreClient, StoreServer, StoreTimeoutError};
    #[pymodule_export]
    use super::tail::{Tail, TailReport};
    #[pymodule_export]
    use super::warm::{WarmPool, WarmState, Zygote};
    #[pymodule_export]
    use super::watchdog::{BeatSlot, Expiry, Watchdog, WatchdogCounts};
    #[pymodule_export]
    use super::{arm_parent_death_signal, printable, thread_stack_bytes};

    #[pymodule_export]
    #[allow(non_upper_case_globals, reason = "the name is Python's")]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
