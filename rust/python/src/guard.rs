//! `Guard`.

use std::sync::{Mutex, PoisonError};

use ferroelastic_core::sys::guard;
use pyo3::prelude::*;

use crate::errors::{os, to_python};

/// A process that ends what a killed agent leaves behind.
#[pyclass(frozen, module = "ferroelastic._rust")]
pub(crate) struct Guard {
    #[pyo3(get)]
    pid: i32,
    guard: Mutex<Option<guard::Guard>>,
}

#[pymethods]
impl Guard {
    #[new]
    fn new(py: Python<'_>, name: &str, value: &str) -> PyResult<Self> {
        let started = guard::Guard::start(format!("{name}={value}").as_bytes());
        let guard = started.map_err(|source| to_python(py, os("start", "the guard process".into(), source)))?;
        Ok(Self { pid: guard.pid(), guard: Mutex::new(Some(guard)) })
    }

    fn dismiss(&self, py: Python<'_>) -> PyResult<()> {
        let guard = self.guard.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(guard) = guard else { return Ok(()) };
        let dismissed = py.detach(|| guard.dismiss());
        dismissed.map_err(|source| to_python(py, os("dismiss", format!("the guard process {}", self.pid), source)))
    }
}
