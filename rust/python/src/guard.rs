//! `Guard`, and the functions that the guard process calls.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use ferroelastic_core::Owner;
use ferroelastic_core::sys::cgroup;
use ferroelastic_core::sys::fd;
use ferroelastic_core::sys::guard::{self, Orders, Program};
use ferroelastic_core::sys::leftovers::{Mark, Query, find};
use ferroelastic_core::sys::spawn::SpawnStack;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::convert::{c_string, environment};
use crate::errors::{os, to_python};

/// A process that kills the processes that a killed agent leaves behind.
#[pyclass(frozen, module = "ferroelastic._rust")]
pub(crate) struct Guard {
    #[pyo3(get)]
    pid: i32,
    #[pyo3(get)]
    forked: bool,
    owner: Owner,
    parts: Mutex<Option<(guard::Guard, Program)>>,
}

impl Guard {
    /// Passes the guard to the engine. A forked child may have copied a locked mutex, so the owner is checked first.
    pub(crate) fn take(&self, py: Python<'_>) -> PyResult<(guard::Guard, Program)> {
        self.owner.check().map_err(|error| to_python(py, error))?;
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner).take();
        parts.ok_or_else(|| {
            PyValueError::new_err(format!("the guard process {} has already been passed to an engine", self.pid))
        })
    }
}

#[pymethods]
impl Guard {
    #[new]
    #[pyo3(signature = (name, token, argv, env, *, keep_detached=false, cgroup=None))]
    fn new(
        py: Python<'_>,
        name: String,
        token: String,
        argv: Vec<PathBuf>,
        env: HashMap<PathBuf, PathBuf>,
        keep_detached: bool,
        cgroup: Option<PathBuf>,
    ) -> PyResult<Self> {
        let program = Program {
            argv: argv.into_iter().map(|word| c_string("argv", word)).collect::<PyResult<_>>()?,
            env: environment(env)?,
        };
        let failed = |source| to_python(py, os("start", "the guard process".into(), source));
        let forked = ferroelastic_core::sys::threads::is_single().map_err(failed)?;
        let guard = if forked {
            guard::Guard::fork(&Orders { mark: Mark { name, token }, keep_detached, cgroup }).map_err(failed)?
        } else {
            py.detach(|| guard::Guard::execute(&program, true, &mut SpawnStack::new()))
                .map_err(|error| to_python(py, error))?
        };
        Ok(Self { pid: guard.pid(), forked, owner: Owner::this_process(), parts: Mutex::new(Some((guard, program))) })
    }
}

/// The main function of a guard process that was started as a program.
#[pyfunction]
#[pyo3(signature = (name, token, *, keep_detached=false, cgroup=None))]
pub(crate) fn stand_guard(
    py: Python<'_>,
    name: String,
    token: String,
    keep_detached: bool,
    cgroup: Option<PathBuf>,
) -> PyResult<()> {
    let connection = fd::duplicate(0).map_err(|source| to_python(py, os("use", "descriptor 0".into(), source)))?;
    py.detach(|| guard::stand(connection, &Orders { mark: Mark { name, token }, keep_detached, cgroup }));
    Ok(())
}

/// Creates a cgroup below this process's own, for the workers of a run.
#[pyfunction]
pub(crate) fn create_cgroup(py: Python<'_>, name: &str) -> PyResult<OsString> {
    let created = py.detach(|| cgroup::create(name));
    // Not a `PathBuf`: its conversion would import pathlib.
    created.map(PathBuf::into_os_string).map_err(|source| to_python(py, os("create", format!("cgroup {name}"), source)))
}

/// Removes a cgroup. Its live processes move to the parent cgroup.
#[pyfunction]
pub(crate) fn remove_cgroup(py: Python<'_>, folder: &str) -> PyResult<()> {
    let removed = py.detach(|| cgroup::remove(Path::new(folder)));
    removed.map_err(|source| to_python(py, os("remove", format!("cgroup {folder}"), source)))
}

/// Finds the live processes of a run that are in no worker's process group.
#[pyfunction]
#[pyo3(signature = (name, token, *, sessions=vec![], cgroup=None, not_in_sessions=vec![]), text_signature = "(name, token, *, sessions=(), cgroup=None, not_in_sessions=())")]
#[expect(clippy::needless_pass_by_value, reason = "made from Python's list")]
pub(crate) fn find_detached(
    py: Python<'_>,
    name: String,
    token: String,
    sessions: Vec<i32>,
    cgroup: Option<&str>,
    not_in_sessions: Vec<i32>,
) -> Vec<(i32, String)> {
    use ferroelastic_core::sys::leftovers::Session;
    use ferroelastic_core::sys::procfs::command;

    py.detach(|| {
        let mark = Mark { name, token };
        let sessions: Vec<Session> =
            sessions.into_iter().map(|leader| Session { leader, pidfd: None, started: None }).collect();
        let not_in_sessions = not_in_sessions.as_slice();
        let query = match cgroup.map(Path::new) {
            Some(cgroup) => {
                Query { mark: None, sessions: &[], cgroup: Some(cgroup), not_in_sessions, spares_warm: true }
            }
            None => Query { mark: Some(&mark), sessions: &sessions, cgroup: None, not_in_sessions, spares_warm: true },
        };
        find(&query).into_iter().map(|found| (found.pid, command(found.pid))).collect()
    })
}
