//! `Engine` and `Command`.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ferroelastic_core::logs::{RotationLimits, TailSpec};
use ferroelastic_core::sys::fd;
use ferroelastic_core::sys::probe::Support;
use ferroelastic_core::sys::spawn::{self, Stdio};
use ferroelastic_core::warm::WarmSpec;
use ferroelastic_core::watchdog::Config;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::convert::{c_string, environment, span};
use crate::errors::{detached, os, to_python};
use crate::group::{Group, StopFile};
use crate::guard::Guard;
use crate::health::HealthServer;
use crate::log_rules::LogRotation;
use crate::relay::{Relay, WorkerEnd};
use crate::rendezvous::RendezvousClient;
use crate::tail::Tail;
use crate::warm::WarmPool;
use crate::watchdog::Watchdog;

/// Destination of a standard stream.
#[derive(FromPyObject)]
enum Destination {
    #[pyo3(transparent, annotation = "WorkerEnd")]
    WorkerEnd(Py<WorkerEnd>),
    #[pyo3(transparent, annotation = "path")]
    File(PathBuf),
}

impl From<Destination> for Stdio {
    fn from(destination: Destination) -> Self {
        match destination {
            Destination::File(path) => Self::File(path),
            Destination::WorkerEnd(end) => Self::Fd(Arc::clone(&end.get().0)),
        }
    }
}

/// The specification of a process to start.
#[pyclass(frozen, module = "ferroelastic._rust")]
pub(crate) struct Command(pub(crate) spawn::Command);

#[pymethods]
impl Command {
    #[new]
    #[pyo3(signature = (argv, env, *, stdout=None, stderr=None, cwd=None, cpus=None, open_files=None))]
    fn new(
        argv: Vec<PathBuf>,
        env: HashMap<PathBuf, PathBuf>,
        stdout: Option<Destination>,
        stderr: Option<Destination>,
        cwd: Option<PathBuf>,
        cpus: Option<Vec<usize>>,
        open_files: Option<u64>,
    ) -> PyResult<Self> {
        if argv.is_empty() {
            return Err(PyValueError::new_err("argv must name a program, got an empty sequence"));
        }
        if cpus.as_ref().is_some_and(Vec::is_empty) {
            return Err(PyValueError::new_err("cpus must name a CPU or be None, got an empty sequence"));
        }
        let stdio = |destination: Option<Destination>| destination.map_or(Stdio::Inherit, Stdio::from);
        Ok(Self(spawn::Command {
            argv: argv.into_iter().map(|word| c_string("argv", word)).collect::<PyResult<_>>()?,
            env: environment(env)?,
            stdout: stdio(stdout),
            stderr: stdio(stderr),
            cwd: cwd.map(|cwd| c_string("cwd", cwd)).transpose()?,
            cpus,
            open_files,
            ..spawn::Command::default()
        }))
    }
}

/// Owner of the supervision thread.
#[pyclass(frozen, module = "ferroelastic._rust")]
pub(crate) struct Engine(ferroelastic_core::Engine);

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (*, pidfd=true))]
    fn new(py: Python<'_>, pidfd: bool) -> PyResult<Self> {
        let started = detached(py, || {
            if pidfd {
                ferroelastic_core::Engine::start()
            } else {
                ferroelastic_core::Engine::start_with(Support::NONE)
            }
        });
        started.map(Self)
    }

    #[getter]
    fn backend(&self) -> &'static str {
        if self.0.support().pidfd { "pidfd" } else { "thread" }
    }

    #[pyo3(signature = (commands, pool=None, stop_file=None))]
    fn spawn(
        &self,
        py: Python<'_>,
        commands: Vec<Py<Command>>,
        pool: Option<&WarmPool>,
        stop_file: Option<&StopFile>,
    ) -> PyResult<Group> {
        let commands = commands.into_iter().map(|command| command.get().0.clone()).collect();
        let stop_file = stop_file.map(StopFile::share);
        detached(py, || self.0.start_group(commands, pool.map(|pool| &pool.0), stop_file)).map(Group::new)
    }

    #[pyo3(signature = (command, configuration, *, children, timeout_s))]
    fn warm_pool(
        &self,
        py: Python<'_>,
        command: &Command,
        configuration: Vec<u8>,
        children: usize,
        timeout_s: f64,
    ) -> PyResult<WarmPool> {
        let timeout = span("timeout_s", timeout_s)?;
        let spec = WarmSpec { command: command.0.clone(), configuration, children, timeout };
        detached(py, || self.0.warm_pool(spec)).map(WarmPool)
    }

    #[pyo3(signature = (pids, sentinels=None, stop_file=None))]
    fn observe(
        &self,
        py: Python<'_>,
        pids: Vec<i32>,
        sentinels: Option<Vec<RawFd>>,
        stop_file: Option<&StopFile>,
    ) -> PyResult<Group> {
        let mut processes: Vec<(i32, Option<OwnedFd>)> = pids.into_iter().map(|pid| (pid, None)).collect();
        for (process, sentinel) in processes.iter_mut().zip(sentinels.into_iter().flatten()) {
            process.1 = Some(duplicate(py, "sentinel", sentinel)?);
        }
        let stop_file = stop_file.map(StopFile::share);
        detached(py, || self.0.observe(processes, stop_file)).map(Group::new)
    }

    #[pyo3(
        signature = (files, *, console_fd, only_lines_with=vec![], whole_lines_only=false, is_json=false),
        text_signature = "($self, files, *, console_fd, only_lines_with=(), whole_lines_only=False, is_json=False)"
    )]
    fn tail(
        &self,
        py: Python<'_>,
        files: Vec<(PathBuf, String)>,
        console_fd: RawFd,
        only_lines_with: Vec<String>,
        whole_lines_only: bool,
        is_json: bool,
    ) -> PyResult<Tail> {
        let spec = TailSpec {
            files: files.into_iter().map(|(path, prefix)| (path, prefix.into_bytes())).collect(),
            console: duplicate(py, "console_fd", console_fd)?,
            only_lines_with: only_lines_with.into_iter().map(String::into_bytes).collect(),
            whole_lines_only,
            is_json,
        };
        detached(py, || self.0.tail(spec)).map(Tail::new)
    }

    #[pyo3(signature = (streams, *, console_fd, successor=None))]
    fn relay(&self, py: Python<'_>, streams: usize, console_fd: RawFd, successor: Option<&Command>) -> PyResult<Relay> {
        let console = duplicate(py, "console_fd", console_fd)?;
        let successor = successor.map(|command| command.0.clone());
        detached(py, || self.0.relay(console.as_fd(), streams, successor)).map(Relay::new)
    }

    #[pyo3(signature = (files, *, max_size, max_files))]
    fn rotate_logs(
        &self,
        py: Python<'_>,
        files: Vec<PathBuf>,
        max_size: u64,
        max_files: usize,
    ) -> PyResult<LogRotation> {
        let limits = RotationLimits { max_size, max_files };
        detached(py, || self.0.rotate_logs(files, limits)).map(LogRotation)
    }

    #[pyo3(signature = (path, *, evidence_s=0.0, py_spy=None))]
    fn watchdog(&self, py: Python<'_>, path: PathBuf, evidence_s: f64, py_spy: Option<PathBuf>) -> PyResult<Watchdog> {
        let config = Config { path, evidence: span("evidence_s", evidence_s)?, py_spy };
        detached(py, || self.0.watchdog(config)).map(Watchdog::new)
    }

    fn health_server(&self, py: Python<'_>, host: &str, port: u16, timeout_s: f64) -> PyResult<HealthServer> {
        let timeout = span("timeout_s", timeout_s)?;
        detached(py, || self.0.health_server(host, port, timeout)).map(HealthServer::new)
    }

    fn adopt_guard(&self, py: Python<'_>, guard: &Guard) -> PyResult<()> {
        let (guard, program) = guard.take(py)?;
        detached(py, || self.0.adopt_guard(guard, program))
    }

    fn watch_lease(&self, py: Python<'_>, client: &RendezvousClient) -> PyResult<()> {
        detached(py, || self.0.watch_lease(client.lease()?))
    }

    fn own_orphans(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.0.own_orphans())
    }

    fn use_cgroup(&self, py: Python<'_>, folder: Option<&str>) -> PyResult<bool> {
        detached(py, || self.0.use_cgroup(folder.map(Path::new)))
    }

    fn dismiss_guard(&self, py: Python<'_>, timeout_s: f64) -> PyResult<bool> {
        let timeout = span("timeout_s", timeout_s)?;
        detached(py, || self.0.dismiss_guard(timeout))
    }

    fn take_warnings(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        self.0.take_warnings().map_err(|error| to_python(py, error))
    }

    #[pyo3(signature = (timeout_s=5.0))]
    fn close(&self, py: Python<'_>, timeout_s: f64) -> PyResult<bool> {
        let timeout = span("timeout_s", timeout_s)?;
        detached(py, || self.0.close(timeout))
    }
}

/// Duplicates a descriptor that Python owns.
pub(crate) fn duplicate(py: Python<'_>, name: &str, fd: RawFd) -> PyResult<OwnedFd> {
    fd::duplicate(fd).map_err(|source| to_python(py, os("duplicate", format!("{name} {fd}"), source)))
}
