//! Conversions from Python's numbers and strings to the types of the core.

use std::collections::HashMap;
use std::ffi::CString;
use std::fmt::Display;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Converts seconds from Python. `None` and `inf` mean no limit.
pub(crate) fn duration(name: &str, seconds: Option<f64>) -> PyResult<Option<Duration>> {
    match seconds {
        None => Ok(None),
        Some(seconds) if seconds.is_nan() || seconds < 0.0 => {
            Err(PyValueError::new_err(format!("{name} must be a non-negative number of seconds, got {seconds}")))
        }
        // A value beyond the range of `Duration` is as good as no limit.
        Some(seconds) => Ok(Duration::try_from_secs_f64(seconds).ok()),
    }
}

/// Like [`duration`], for required arguments. `inf` becomes `Duration::MAX`.
pub(crate) fn span(name: &str, seconds: f64) -> PyResult<Duration> {
    Ok(duration(name, Some(seconds))?.unwrap_or(Duration::MAX))
}

/// Converts an environment to `NAME=value` strings for the kernel.
pub(crate) fn environment(env: HashMap<PathBuf, PathBuf>) -> PyResult<Vec<CString>> {
    let entry = |(name, value): (PathBuf, PathBuf)| {
        let mut entry = name.into_os_string();
        entry.push("=");
        entry.push(value);
        c_string("env", entry.into())
    };
    env.into_iter().map(entry).collect()
}

/// Converts a string for the kernel: file system encoding, no NUL byte.
pub(crate) fn c_string(name: &str, text: PathBuf) -> PyResult<CString> {
    let bytes = text.into_os_string().into_vec();
    CString::new(bytes)
        .map_err(|error| PyValueError::new_err(format!("{name} holds a NUL byte at position {}", error.nul_position())))
}

/// Parses a named value of the core.
pub(crate) fn named_value<T: FromStr<Err: Display>>(text: &str) -> PyResult<T> {
    text.parse().map_err(|error: T::Err| PyValueError::new_err(error.to_string()))
}
