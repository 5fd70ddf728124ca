//! `Tail`.

use ferroelastic_core::logs;
use pyo3::prelude::*;

use crate::convert::span;
use crate::errors::detached;

/// The report of a finished tail.
#[pyclass(frozen, get_all, module = "ferroelastic._rust")]
pub(crate) struct TailReport {
    lines: u64,
    bytes: u64,
    broken_lines: u64,
    dropped_bytes: u64,
    console_error: Option<String>,
    unread: Vec<(String, String)>,
}

impl From<logs::TailReport> for TailReport {
    fn from(report: logs::TailReport) -> Self {
        Self {
            lines: report.lines,
            bytes: report.bytes,
            broken_lines: report.broken_lines,
            dropped_bytes: report.dropped_bytes,
            console_error: report.console_error,
            unread: report.unread.into_iter().map(|(path, why)| (path.display().to_string(), why)).collect(),
        }
    }
}

/// Follows growing log files.
#[pyclass(frozen, module = "ferroelastic._rust")]
pub(crate) struct Tail(logs::Tail);

impl Tail {
    pub(crate) fn new(tail: logs::Tail) -> Self {
        Self(tail)
    }
}

#[pymethods]
impl Tail {
    fn finish(&self, py: Python<'_>, timeout_s: f64) -> PyResult<TailReport> {
        let timeout = span("timeout_s", timeout_s)?;
        detached(py, || self.0.finish(timeout)).map(TailReport::from)
    }
}
