//! Calls of the interpreter that pyo3 does not wrap. The only `unsafe` of this crate.

use std::io;

use ferroelastic_core::sys::fork::{Forked, fork_sibling};
use pyo3::ffi;
use pyo3::prelude::*;

/// Forks the interpreter as `os.fork` does, but the child's parent is the parent of this process.
pub(crate) fn fork_interpreter(_attached: Python<'_>) -> io::Result<Forked> {
    // SAFETY: the thread is attached to the interpreter. CPython asks for these calls around a fork.
    unsafe { ffi::PyOS_BeforeFork() };
    let forked = fork_sibling();
    // SAFETY: as above.
    unsafe {
        if matches!(forked, Ok(Forked::Child)) {
            ffi::PyOS_AfterFork_Child();
        } else {
            ffi::PyOS_AfterFork_Parent();
        }
    }
    forked
}

/// Gives an object back to the garbage collector, after `gc.freeze` has taken all objects from it.
pub(crate) fn track(object: &Bound<'_, PyAny>) {
    // SAFETY: the thread is attached to the interpreter, and the object is alive. Modules and dictionaries support garbage collection, and
    // are complete.
    unsafe {
        ffi::PyObject_GC_UnTrack(object.as_ptr().cast());
        ffi::PyObject_GC_Track(object.as_ptr().cast());
    }
}
