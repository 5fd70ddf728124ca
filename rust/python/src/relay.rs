//! `Relay`.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use ferroelastic_core::logs;
use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;

use crate::convert::span;
use crate::errors::{detached, to_python};

/// The report of a finished relay.
#[pyclass(frozen, get_all, module = "ferroelastic._rust")]
pub(crate) struct RelayReport {
    bytes: u64,
    dropped_bytes: u64,
    console_error: Option<String>,
}

/// The worker's end of a stream.
#[pyclass(frozen, module = "ferroelastic._rust")]
pub(crate) struct WorkerEnd(pub(crate) Arc<OwnedFd>);

#[pymethods]
impl WorkerEnd {
    fn fileno(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Copies streams of workers to a console.
#[pyclass(frozen, module = "ferroelastic._rust")]
pub(crate) struct Relay(logs::Relay);

impl Relay {
    pub(crate) fn new(relay: logs::Relay) -> Self {
        Self(relay)
    }
}

#[pymethods]
impl Relay {
    #[getter]
    fn is_terminal(&self) -> bool {
        self.0.is_terminal()
    }

    fn worker_end(&self, py: Python<'_>, index: usize) -> PyResult<WorkerEnd> {
        let end = self.0.worker_end(index).map_err(|error| to_python(py, error))?;
        end.map(WorkerEnd).ok_or_else(|| PyIndexError::new_err(format!("the relay has no open stream {index}")))
    }

    fn last(&self, py: Python<'_>, index: usize) -> PyResult<Vec<u8>> {
        self.0.last(index).map_err(|error| to_python(py, error))
    }

    fn flush(&self, py: Python<'_>, timeout_s: f64) -> PyResult<()> {
        let timeout = span("timeout_s", timeout_s)?;
        detached(py, || self.0.flush(timeout))
    }

    fn finish(&self, py: Python<'_>, timeout_s: f64) -> PyResult<RelayReport> {
        let timeout = span("timeout_s", timeout_s)?;
        let report = detached(py, || self.0.finish(timeout))?;
        Ok(RelayReport {
            bytes: report.bytes,
            dropped_bytes: report.dropped_bytes,
            console_error: report.console_error,
        })
    }
}
