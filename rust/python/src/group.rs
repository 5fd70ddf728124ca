//! `Group` and its reports.

use std::os::fd::{AsFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ferroelastic_core::engine;
use ferroelastic_core::logs::ScanFile;
use ferroelastic_core::published::{CallerFds, Wake};
use ferroelastic_core::supervise::{self, StopPlan};
use ferroelastic_core::sys::fd::duplicate;
use ferroelastic_core::sys::stop_file;
use ferroelastic_core::sys::wait::ExitStatus;
use ferroelastic_core::vocabulary::StopReason;
use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;

use crate::convert::{duration, named_value, span};
use crate::errors::{detached, os, to_python};
use crate::log_rules::{LogFailure, LogRules, LogScan};

/// How one process ended.
#[pyclass(frozen, get_all, module = "ferroelastic._rust")]
pub(crate) struct Exit {
    index: usize,
    pid: i32,
    order: usize,
    code: Option<i32>,
    signal: Option<i32>,
    core_dumped: bool,
    returncode: Option<i32>,
    stopped: bool,
    monotonic_ns: u64,
    realtime_ns: u64,
    user_time_s: f64,
    system_time_s: f64,
    max_rss_bytes: u64,
}

impl From<supervise::Exit> for Exit {
    fn from(exit: supervise::Exit) -> Self {
        let (code, signal, core_dumped) = match exit.status {
            ExitStatus::Exited(code) => (Some(i32::from(code)), None, false),
            ExitStatus::Signalled { signal, core_dumped } => (None, Some(signal), core_dumped),
            ExitStatus::Unknown => (None, None, false),
        };
        Self {
            index: exit.index,
            pid: exit.pid,
            order: exit.order,
            code,
            signal,
            core_dumped,
            returncode: code.or(signal.map(|signal| -signal)),
            stopped: exit.stopped,
            monotonic_ns: exit.at.monotonic_ns,
            realtime_ns: exit.at.realtime_ns,
            user_time_s: exit.usage.user_time.as_secs_f64(),
            system_time_s: exit.usage.system_time.as_secs_f64(),
            max_rss_bytes: exit.usage.max_rss_bytes,
        }
    }
}

#[pymethods]
impl Exit {
    fn __repr__(&self) -> String {
        let returncode = self.returncode.map_or_else(|| "None".to_owned(), |code| code.to_string());
        format!(
            "Exit(index={}, pid={}, order={}, returncode={returncode}, stopped={})",
            self.index, self.pid, self.order, self.stopped
        )
    }
}

/// A process that was still alive when the stop timed out.
#[pyclass(frozen, get_all, module = "ferroelastic._rust")]
#[derive(Clone)]
pub(crate) struct Survivor {
    index: usize,
    pid: i32,
    state: String,
    wait_channel: String,
}

/// A process that was signalled because it had not exited within the linger time.
#[pyclass(frozen, get_all, module = "ferroelastic._rust")]
#[derive(Clone)]
pub(crate) struct Leftover {
    index: usize,
    pid: i32,
    command: String,
}

/// The report of a finished stop.
#[pyclass(frozen, get_all, module = "ferroelastic._rust")]
pub(crate) struct StopReport {
    signalled_ns: u64,
    elapsed_s: f64,
    killed: Vec<usize>,
    overdue: Vec<Leftover>,
    survivors: Vec<Survivor>,
}

impl From<engine::StopReport> for StopReport {
    fn from(report: engine::StopReport) -> Self {
        let survivor = |survivor: engine::Survivor| Survivor {
            index: survivor.index,
            pid: survivor.pid,
            state: survivor.state.to_string(),
            wait_channel: survivor.wait_channel,
        };
        let leftover = |leftover: engine::Leftover| Leftover {
            index: leftover.index,
            pid: leftover.pid,
            command: leftover.command,
        };
        Self {
            signalled_ns: report.signalled_ns,
            elapsed_s: report.elapsed.as_secs_f64(),
            killed: report.killed,
            overdue: report.overdue.into_iter().map(leftover).collect(),
            survivors: report.survivors.into_iter().map(survivor).collect(),
        }
    }
}

/// Processes that were started together.
#[pyclass(frozen, module = "ferroelastic._rust")]
pub(crate) struct Group(engine::Group);

impl Group {
    pub(crate) fn new(group: engine::Group) -> Self {
        Self(group)
    }
}

/// Waits detached from the interpreter. Waits on duplicates of the descriptors, because other threads may close the originals meanwhile.
pub(crate) fn wait_detached(
    py: Python<'_>,
    timeout_s: Option<f64>,
    fds: [Option<RawFd>; 2],
    wait: impl FnOnce(Option<Duration>, CallerFds<'_>) -> ferroelastic_core::Result<Wake> + Send,
) -> PyResult<&'static str> {
    let timeout = duration("timeout_s", timeout_s)?;
    let mut others = [None, None];
    for (other, fd) in others.iter_mut().zip(fds) {
        let Some(fd) = fd else { continue };
        let copy = duplicate(fd);
        *other = Some(copy.map_err(|source| to_python(py, os("duplicate", format!("descriptor {fd}"), source)))?);
    }
    let woken = detached(py, || wait(timeout, others.each_ref().map(|fd| fd.as_ref().map(AsFd::as_fd))))?;
    Ok(woken.name())
}

/// The file in which workers read the deadline of their stop.
#[pyclass(frozen, module = "ferroelastic._rust")]
pub(crate) struct StopFile(Arc<stop_file::StopFile>);

impl StopFile {
    pub(crate) fn share(&self) -> Arc<stop_file::StopFile> {
        Arc::clone(&self.0)
    }
}

#[pymethods]
impl StopFile {
    #[new]
    fn new(py: Python<'_>) -> PyResult<Self> {
        let created = stop_file::StopFile::create();
        created
            .map(|file| Self(Arc::new(file)))
            .map_err(|source| to_python(py, os("create", "a stop file".to_owned(), source)))
    }

    #[getter]
    fn path(&self) -> String {
        self.0.path().display().to_string()
    }
}

#[pymethods]
impl Group {
    #[getter]
    fn pids(&self) -> Vec<i32> {
        self.0.pids().to_vec()
    }

    #[getter]
    fn warm(&self) -> Vec<usize> {
        self.0.warm().to_vec()
    }

    #[getter]
    fn generation(&self, py: Python<'_>) -> PyResult<u64> {
        self.0.generation().map_err(|error| to_python(py, error))
    }

    fn scan_logs(&self, py: Python<'_>, files: Vec<(PathBuf, usize, String)>, rules: &LogRules) -> PyResult<LogScan> {
        let files = files.into_iter().map(|(path, worker, label)| ScanFile { path, worker, label });
        let (files, rules) = (files.collect(), Arc::clone(&rules.0));
        detached(py, || self.0.scan_logs(files, rules)).map(LogScan)
    }

    fn log_failures(&self, py: Python<'_>) -> PyResult<Vec<LogFailure>> {
        let failures = self.0.log_failures().map_err(|error| to_python(py, error))?;
        Ok(failures.into_iter().map(LogFailure::from).collect())
    }

    #[pyo3(signature = (since=0))]
    fn exits(&self, py: Python<'_>, since: usize) -> PyResult<Vec<Exit>> {
        let exits = self.0.exits(since).map_err(|error| to_python(py, error))?;
        Ok(exits.into_iter().map(Exit::from).collect())
    }

    #[pyo3(signature = (generation, timeout_s=None, wake_fd=None, news_fd=None))]
    fn wait(
        &self,
        py: Python<'_>,
        generation: u64,
        timeout_s: Option<f64>,
        wake_fd: Option<RawFd>,
        news_fd: Option<RawFd>,
    ) -> PyResult<&'static str> {
        wait_detached(py, timeout_s, [wake_fd, news_fd], |timeout, others| self.0.wait(generation, timeout, others))
    }

    #[pyo3(signature = (index, signal, *, leader_only=false))]
    fn signal(&self, py: Python<'_>, index: usize, signal: i32, leader_only: bool) -> PyResult<bool> {
        if index >= self.0.pids().len() {
            return Err(PyIndexError::new_err(format!("no worker {index} in a group of {}", self.0.pids().len())));
        }
        detached(py, || self.0.signal(index, signal, leader_only))
    }

    #[pyo3(signature = (signal, grace_s, kill_wait_s, *, linger_s=0.0, target="group", reason="shutdown"))]
    #[allow(clippy::too_many_arguments, reason = "the signature is Python's")]
    fn stop(
        &self,
        py: Python<'_>,
        signal: i32,
        grace_s: f64,
        kill_wait_s: f64,
        linger_s: f64,
        target: &str,
        reason: &str,
    ) -> PyResult<()> {
        let plan = StopPlan {
            linger: span("linger_s", linger_s)?,
            signal,
            target: named_value(target)?,
            grace: span("grace_s", grace_s)?,
            kill_wait: span("kill_wait_s", kill_wait_s)?,
            reason: named_value(reason)?,
        };
        detached(py, || self.0.stop(plan))
    }

    #[pyo3(signature = (signal, grace_s, kill_wait_s, *, target="group"))]
    fn stop_on_failure(
        &self,
        py: Python<'_>,
        signal: i32,
        grace_s: f64,
        kill_wait_s: f64,
        target: &str,
    ) -> PyResult<()> {
        let plan = StopPlan {
            linger: Duration::ZERO,
            signal,
            target: named_value(target)?,
            grace: span("grace_s", grace_s)?,
            kill_wait: span("kill_wait_s", kill_wait_s)?,
            reason: StopReason::Failure,
        };
        detached(py, || self.0.stop_on_failure(plan))
    }

    fn end_grace(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.0.end_grace())
    }

    fn stop_report(&self, py: Python<'_>) -> PyResult<Option<StopReport>> {
        let report = self.0.stop_report().map_err(|error| to_python(py, error))?;
        Ok(report.map(StopReport::from))
    }
}
