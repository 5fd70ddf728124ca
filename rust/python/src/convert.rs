//! Python's numbers and strings to the core's types.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Seconds as Python gives them. `None` and `inf` mean no limit.
pub(crate) fn duration(name: &str, seconds: Option<f64>) -> PyResult<Option<Duration>> {
    match seconds {
        None => Ok(None),
        Some(seconds) if seconds.is_nan() || seconds < 0.0 => Err(PyValueError::new_err(format!(
            "{name} must be a number of seconds that is not negative, got {seconds}"
        ))),
        // What does not fit is as good as no limit.
        Some(seconds) => Ok(Duration::try_from_secs_f64(seconds).ok()),
    }
}

/// As [`duration`], for what cannot be left out; no limit is the longest duration there is.
pub(crate) fn span(name: &str, seconds: f64) -> PyResult<Duration> {
    Ok(duration(name, Some(seconds))?.unwrap_or(Duration::MAX))
}

/// An environment for the kernel: `NAME=value` each.
pub(crate) fn environment(env: HashMap<PathBuf, PathBuf>) -> PyResult<Vec<CString>> {
    let entry = |(name, value): (PathBuf, PathBuf)| {
        let mut entry = name.into_os_string();
        entry.push("=");
        entry.push(value);
        c_string("env", entry.into())
    };
    env.into_iter().map(entry).collect()
}

/// A string for the kernel: in the file system's encoding, without NUL.
pub(crate) fn c_string(what: &str, text: PathBuf) -> PyResult<CString> {
    let bytes = text.into_os_string().into_vec();
    CString::new(bytes)
        .map_err(|error| PyValueError::new_err(format!("{what} holds a NUL byte at position {}", error.nul_position())))
}
