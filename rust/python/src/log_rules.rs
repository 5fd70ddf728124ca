//! `LogRules` and its results, and `LogRotation`.

use std::sync::Arc;

use ferroelastic_core::engine;
use ferroelastic_core::logs::{self, LogRule};
use ferroelastic_core::vocabulary::LogEffect;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::convert::span;
use crate::errors::detached;

/// Compiled rules for log lines.
#[pyclass(frozen, module = "ferroelastic._rust")]
pub(crate) struct LogRules(pub(crate) Arc<logs::LogRules>);

#[pymethods]
impl LogRules {
    #[new]
    #[pyo3(
        signature = (fail=vec![], warn=vec![]),
        text_signature = "(fail=(), warn=())"
    )]
    fn new(fail: Vec<(String, String)>, warn: Vec<(String, String)>) -> PyResult<Self> {
        let rules = [(LogEffect::Fail, fail), (LogEffect::Warn, warn)].into_iter().flat_map(|(effect, rules)| {
            rules.into_iter().map(move |(pattern, reason)| LogRule { effect, pattern, reason })
        });
        let compiled = logs::LogRules::compile(rules.collect());
        let failed = |error: logs::PatternError| PyValueError::new_err((error.to_string(), error.pattern));
        compiled.map(|rules| Self(Arc::new(rules))).map_err(failed)
    }
}

/// A worker that has failed because of a line in its log.
#[pyclass(frozen, get_all, module = "ferroelastic._rust")]
pub(crate) struct LogFailure {
    index: usize,
    reason: String,
    stream: String,
    line: String,
    realtime_ns: u64,
}

impl From<engine::LogFailure> for LogFailure {
    fn from(failure: engine::LogFailure) -> Self {
        let engine::LogFailure { index, reason, stream, line, realtime_ns } = failure;
        Self { index, reason, stream, line, realtime_ns }
    }
}

/// A search of log files.
#[pyclass(frozen, module = "ferroelastic._rust")]
pub(crate) struct LogScan(pub(crate) logs::LogScan);

#[pymethods]
impl LogScan {
    fn finish(&self, py: Python<'_>, timeout_s: f64) -> PyResult<bool> {
        let timeout = span("timeout_s", timeout_s)?;
        detached(py, || self.0.finish(timeout))
    }
}

/// Size limits of log files.
#[pyclass(frozen, module = "ferroelastic._rust")]
pub(crate) struct LogRotation(pub(crate) engine::LogRotation);

#[pymethods]
impl LogRotation {
    fn close(&self, py: Python<'_>, timeout_s: f64) -> PyResult<bool> {
        let timeout = span("timeout_s", timeout_s)?;
        detached(py, || self.0.close(timeout))
    }
}
