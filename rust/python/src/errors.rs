//! Conversion of the core's errors to Python exceptions.

use std::io;

use ferroelastic_core::Error;
use pyo3::exceptions::{PyOSError, PyRuntimeError};
use pyo3::prelude::*;
use pyo3::{create_exception, intern};

create_exception!(
    ferroelastic._rust,
    ForkedError,
    PyRuntimeError,
    "A native object was used in a process other than the one that created it."
);
create_exception!(ferroelastic._rust, SpawnError, PyOSError, "A process could not be started.");

/// The exception for an error of the core.
pub(crate) fn to_python(py: Python<'_>, error: Error) -> PyErr {
    match error {
        Error::Os { ref source, .. } => match source.raw_os_error() {
            Some(errno) => PyOSError::new_err((errno, error.to_string())),
            None => PyOSError::new_err(error.to_string()),
        },
        Error::Spawn(failed) => {
            let message = failed.to_string();
            let exception = match failed.source.raw_os_error() {
                Some(errno) => SpawnError::new_err((errno, message)),
                None => SpawnError::new_err(message),
            };
            let value = exception.value(py);
            let attributes = value
                .setattr(intern!(py, "index"), failed.index)
                .and_then(|()| value.setattr(intern!(py, "stage"), failed.stage));
            attributes.err().unwrap_or(exception)
        }
        Error::Forked { .. } => ForkedError::new_err(error.to_string()),
        Error::Closed | Error::Failed(_) | Error::Panicked { .. } => PyRuntimeError::new_err(error.to_string()),
    }
}

/// Runs a call of the core detached from the interpreter.
pub(crate) fn detached<T: Send>(
    py: Python<'_>,
    call: impl FnOnce() -> ferroelastic_core::Result<T> + Send,
) -> PyResult<T> {
    py.detach(call).map_err(|error| to_python(py, error))
}

/// The error of a system call that the binding itself made.
pub(crate) fn os(operation: &'static str, object: String, source: io::Error) -> Error {
    Error::Os { operation, object, source }
}
