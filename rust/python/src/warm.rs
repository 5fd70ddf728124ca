//! `WarmPool` and `WarmState` of an agent, and `Zygote`: the calls of the zygote's own process.

use std::collections::HashMap;
use std::ffi::{CString, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use ferroelastic_core::engine::WarmPool as Pool;
use ferroelastic_core::sys::fork::Forked;
use ferroelastic_core::warm::{self, ImportedFiles, zygote};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::convert::span;
use crate::engine;
use crate::errors::{detached, os, to_python};
use crate::group::wait_detached;
use crate::sys;

/// Arguments and environment of a released worker.
type Command = (Vec<OsString>, Vec<(OsString, OsString)>);

/// The state of a pool of warm workers.
#[pyclass(frozen, get_all, module = "ferroelastic._rust")]
pub(crate) struct WarmState {
    phase: &'static str,
    reason: String,
    shortage: String,
    zygote: i32,
    parked: usize,
    released: u64,
    ready_after_s: Option<f64>,
}

impl From<warm::WarmState> for WarmState {
    fn from(state: warm::WarmState) -> Self {
        Self {
            phase: state.phase.name(),
            reason: state.reason,
            shortage: state.shortage,
            zygote: state.zygote,
            parked: state.parked,
            released: state.released,
            ready_after_s: state.ready_after.map(|after| after.as_secs_f64()),
        }
    }
}

/// A zygote and its parked children.
#[pyclass(frozen, module = "ferroelastic._rust")]
pub(crate) struct WarmPool(pub(crate) Pool);

#[pymethods]
impl WarmPool {
    fn state(&self, py: Python<'_>) -> PyResult<WarmState> {
        self.0.state().map(WarmState::from).map_err(|error| to_python(py, error))
    }

    #[getter]
    fn generation(&self, py: Python<'_>) -> PyResult<u64> {
        self.0.generation().map_err(|error| to_python(py, error))
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

    fn find_changed(&self, py: Python<'_>) -> PyResult<Option<OsString>> {
        detached(py, || self.0.find_changed()).map(|path| path.map(PathBuf::into_os_string))
    }

    #[pyo3(signature = (children, *, delayed=false))]
    fn resize(&self, py: Python<'_>, children: usize, delayed: bool) -> PyResult<()> {
        detached(py, || self.0.resize(children, delayed))
    }

    fn release(
        &self,
        py: Python<'_>,
        command: &engine::Command,
        descriptors: HashMap<RawFd, RawFd>,
    ) -> PyResult<Option<i32>> {
        let fds = descriptors
            .into_iter()
            .map(|(number, own)| Ok((number, engine::duplicate(py, "descriptor", own)?)))
            .collect::<PyResult<_>>()?;
        detached(py, || self.0.release(command.0.clone(), fds))
    }

    fn close(&self, py: Python<'_>, timeout_s: f64) -> PyResult<bool> {
        let timeout = span("timeout_s", timeout_s)?;
        detached(py, || self.0.close(timeout))
    }
}

/// The zygote's own end of a pool.
#[pyclass(module = "ferroelastic._rust")]
pub(crate) struct Zygote(Option<zygote::Zygote>);

impl Zygote {
    fn channel(&mut self) -> PyResult<&mut zygote::Zygote> {
        self.0.as_mut().ok_or_else(|| PyRuntimeError::new_err("this process is not a zygote any more"))
    }
}

#[pymethods]
impl Zygote {
    #[new]
    fn new(py: Python<'_>) -> PyResult<Self> {
        let started = zygote::Zygote::start();
        started.map(Some).map(Self).map_err(|source| to_python(py, os("use", "standard input".into(), source)))
    }

    fn receive(&mut self) -> PyResult<Option<Vec<u8>>> {
        Ok(self.channel()?.receive()?)
    }

    fn next_order(&mut self) -> PyResult<Option<u32>> {
        Ok(self.channel()?.next_order()?)
    }

    #[expect(clippy::needless_pass_by_value, reason = "extracted from a Python object")]
    fn report_ready(&mut self, imported: Vec<PathBuf>) -> PyResult<()> {
        let snapshot = ImportedFiles::take(imported.iter().map(PathBuf::as_path))?;
        Ok(self.channel()?.report_ready(&snapshot)?)
    }

    fn report_refusal(&mut self, reason: &str) -> PyResult<()> {
        Ok(self.channel()?.report_refusal(reason)?)
    }

    fn report_shortage(&mut self, reason: &str) -> PyResult<()> {
        Ok(self.channel()?.report_shortage(reason)?)
    }

    fn fork(&mut self, py: Python<'_>) -> PyResult<bool> {
        let forked = self.channel()?.fork(|| sys::fork_interpreter(py))?;
        Ok(matches!(forked, Forked::Child))
    }

    /// Gives a module and its dictionary back to the garbage collector.
    #[staticmethod]
    fn track_module(module: &Bound<'_, PyModule>) {
        sys::track(module);
        sys::track(&module.dict());
    }

    fn separate(&mut self) -> PyResult<()> {
        Ok(self.channel()?.separate()?)
    }

    fn park(&mut self) -> PyResult<Option<Command>> {
        self.channel()?;
        let Some(release) = self.0.take().map_or(Ok(None), zygote::Zygote::park)? else { return Ok(None) };
        let text = |string: CString| OsString::from_vec(string.into_bytes());
        let pair = |entry: CString| {
            let entry = entry.into_bytes();
            let at = entry.iter().position(|byte| *byte == b'=').unwrap_or(entry.len());
            let value = entry.get(at + 1..).unwrap_or_default().to_vec();
            (OsString::from_vec(entry[..at].to_vec()), OsString::from_vec(value))
        };
        Ok(Some((release.argv.into_iter().map(text).collect(), release.env.into_iter().map(pair).collect())))
    }
}
