//! `Console`.

use std::io;
use std::os::fd::{AsFd, RawFd};

use ferroelastic_core::sys::console;
use ferroelastic_core::sys::fd::duplicate;
use pyo3::prelude::*;

use crate::errors::{os, to_python};

/// Writes to a terminal, pipe, socket or file of another owner without waiting for its reader.
#[pyclass(frozen, module = "ferroelastic._rust")]
pub(crate) struct Console(console::Console);

#[pymethods]
impl Console {
    #[new]
    fn new(py: Python<'_>, fd: RawFd) -> PyResult<Self> {
        let opened = duplicate(fd).and_then(|fd| console::Console::new(fd.as_fd()));
        opened.map(Self).map_err(|source| to_python(py, os("open", format!("descriptor {fd} as a console"), source)))
    }

    fn write(&self, py: Python<'_>, data: &[u8]) -> PyResult<usize> {
        let mut written = 0;
        while written < data.len() {
            match self.0.write(&data[written..]) {
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(to_python(py, os("write to", "the console".into(), source))),
            }
        }
        Ok(written)
    }
}
