//! `Watchdog`, its reports, and `BeatSlot`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use ferroelastic_core::Error;
use ferroelastic_core::sys::beats;
use ferroelastic_core::watchdog::{self, WorkerProcess, wire};
use ferroelastic_core::{engine, error};
use pyo3::prelude::*;

use crate::errors::{detached, to_python};

type Row = (i32, String, f64, i32);

/// Counts of the requests that a watchdog has received.
#[pyclass(frozen, get_all, module = "ferroelastic._rust")]
pub(crate) struct WatchdogCounts {
    requests: u64,
    broken: u64,
    oversized: u64,
    unknown_version: u64,
    refused: u64,
    expired: u64,
    armed: usize,
    last_broken: String,
}

/// A timer that expired, and the outcome of its signal.
#[pyclass(frozen, get_all, module = "ferroelastic._rust")]
pub(crate) struct Expiry {
    pid: i32,
    scope: String,
    expiration_time: f64,
    signal: i32,
    late_ns: u64,
    signalled_ns: u64,
    outcome: &'static str,
    worker: i32,
    evidence: Vec<OsString>,
}

impl From<watchdog::Expiry> for Expiry {
    fn from(expiry: watchdog::Expiry) -> Self {
        Self {
            pid: expiry.pid,
            scope: expiry.scope,
            expiration_time: expiry.expiration_time,
            signal: expiry.signal,
            late_ns: expiry.late_ns,
            signalled_ns: expiry.signalled_ns,
            outcome: expiry.outcome.name(),
            worker: expiry.worker,
            evidence: expiry.evidence.into_iter().map(PathBuf::into_os_string).collect(),
        }
    }
}

#[pymethods]
impl Expiry {
    fn __repr__(&self) -> String {
        let Self { pid, scope, outcome, late_ns, .. } = self;
        format!("Expiry(pid={pid}, scope={scope:?}, outcome={outcome:?}, late_ns={late_ns})")
    }
}

/// Enforces deadlines that processes set for themselves through a named pipe.
#[pyclass(frozen, module = "ferroelastic._rust")]
pub(crate) struct Watchdog(engine::Watchdog);

impl Watchdog {
    pub(crate) fn new(watchdog: engine::Watchdog) -> Self {
        Self(watchdog)
    }
}

#[pymethods]
impl Watchdog {
    #[getter]
    fn path(&self) -> OsString {
        self.0.path().into()
    }

    fn start(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.0.start())
    }

    fn set_workers(&self, py: Python<'_>, workers: Vec<(i32, String, PathBuf)>) -> PyResult<()> {
        let workers = workers.into_iter().map(|(pid, label, folder)| WorkerProcess { pid, label, folder }).collect();
        detached(py, || self.0.set_workers(workers))
    }

    fn register(&self, py: Python<'_>, requests: Vec<Row>) -> PyResult<()> {
        let requests = requests.into_iter().map(|(pid, scope, expiration_time, signal)| wire::TimerRequest {
            pid,
            scope,
            expiration_time,
            signal,
            heartbeat: None,
        });
        let requests = requests.collect();
        detached(py, || self.0.register(requests))
    }

    fn clear(&self, py: Python<'_>, pids: Vec<i32>) -> PyResult<()> {
        detached(py, || self.0.clear(pids))
    }

    fn timers(&self, py: Python<'_>) -> PyResult<Vec<Row>> {
        let timers = detached(py, || self.0.timers())?;
        let row = |timer: wire::TimerRequest| (timer.pid, timer.scope, timer.expiration_time, timer.signal);
        Ok(timers.into_iter().map(row).collect())
    }

    fn expiry(&self, py: Python<'_>, pid: i32) -> PyResult<Option<Expiry>> {
        Ok(detached(py, || self.0.cause(pid))?.map(Expiry::from))
    }

    fn counts(&self, py: Python<'_>) -> PyResult<WatchdogCounts> {
        let counts = detached(py, || self.0.counts())?;
        Ok(WatchdogCounts {
            requests: counts.requests,
            broken: counts.broken,
            oversized: counts.oversized,
            unknown_version: counts.unknown_version,
            refused: counts.refused,
            expired: counts.expired,
            armed: counts.armed,
            last_broken: counts.last_broken,
        })
    }

    fn last_request_age_s(&self, py: Python<'_>, pid: i32) -> PyResult<Option<f64>> {
        Ok(detached(py, || self.0.last_heard(pid))?.map(|age| age.as_secs_f64()))
    }

    fn overdue_s(&self, py: Python<'_>) -> PyResult<f64> {
        Ok(detached(py, || self.0.overdue())?.as_secs_f64())
    }

    fn next_expiries(&self, py: Python<'_>) -> PyResult<Vec<Expiry>> {
        Ok(detached(py, || self.0.next_expiries())?.into_iter().map(Expiry::from).collect())
    }

    fn drain(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.0.drain())
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.0.close())
    }
}

/// A word of shared memory with which a process reports its heartbeats.
#[pyclass(frozen, module = "ferroelastic._rust")]
pub(crate) struct BeatSlot {
    slot: beats::BeatSlot,
    closed: AtomicBool,
}

impl BeatSlot {
    fn check_owner(&self, py: Python<'_>) -> PyResult<()> {
        if self.slot.is_own() {
            return Ok(());
        }
        Err(to_python(py, Error::Forked { owner: self.slot.owner(), caller: std::process::id() }))
    }
}

#[pymethods]
impl BeatSlot {
    #[new]
    #[expect(clippy::needless_pass_by_value, reason = "extracted from a Python object")]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let object = || format!("a slot of {}", path.display());
        let claimed = beats::BeatSlot::claim(&path);
        let slot = claimed
            .map_err(|source| to_python(py, error::Error::Os { operation: "take", object: object(), source }))?;
        Ok(Self { slot, closed: AtomicBool::new(false) })
    }

    #[getter]
    fn index(&self) -> u32 {
        self.slot.index()
    }

    fn beat(&self, py: Python<'_>) -> PyResult<()> {
        self.check_owner(py)?;
        if !self.closed.load(Ordering::Relaxed) {
            self.slot.beat();
        }
        Ok(())
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.check_owner(py)?;
        if !self.closed.swap(true, Ordering::Relaxed) {
            self.slot.release();
        }
        Ok(())
    }
}
