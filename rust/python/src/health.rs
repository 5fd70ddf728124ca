//! `HealthServer`.

use ferroelastic_core::engine;
use ferroelastic_core::health::status::{Started, Update};
use pyo3::prelude::*;

use crate::convert::{named_value, span};
use crate::errors::{detached, to_python};

/// Answers health checks over HTTP.
#[pyclass(frozen, module = "ferroelastic._rust")]
pub(crate) struct HealthServer(engine::HealthServer);

impl HealthServer {
    pub(crate) fn new(server: engine::HealthServer) -> Self {
        Self(server)
    }

    fn update(&self, py: Python<'_>, update: Update) -> PyResult<()> {
        self.0.update(update).map_err(|error| to_python(py, error))
    }
}

#[pymethods]
impl HealthServer {
    #[getter]
    fn host(&self) -> String {
        self.0.address().ip().to_string()
    }

    #[getter]
    fn port(&self) -> u16 {
        self.0.address().port()
    }

    fn next_question(&self, py: Python<'_>) -> PyResult<bool> {
        let asked = detached(py, || self.0.next_question())?;
        if asked {
            // Attached again: this thread holds the GIL.
            self.0.started().map_err(|error| to_python(py, error))?;
        }
        Ok(asked)
    }

    fn answer(&self, py: Python<'_>, progress: f64) -> PyResult<()> {
        self.0.answer(Ok(progress)).map_err(|error| to_python(py, error))
    }

    fn answer_failed(&self, py: Python<'_>, reason: String) -> PyResult<()> {
        self.0.answer(Err(reason)).map_err(|error| to_python(py, error))
    }

    fn set_job(&self, py: Python<'_>, run_id: String, role: String) -> PyResult<()> {
        self.update(py, Update::Job { run_id, role })
    }

    fn set_state(&self, py: Python<'_>, state: &str) -> PyResult<()> {
        self.update(py, Update::State(named_value(state)?))
    }

    fn set_workers(&self, py: Python<'_>, workers: Vec<(u64, u64, i32)>) -> PyResult<()> {
        let started = |(local_rank, rank, pid)| Started { local_rank, rank, pid };
        self.update(py, Update::Workers(workers.into_iter().map(started).collect()))
    }

    fn note_restart(&self, py: Python<'_>, cause: &str, reason: String) -> PyResult<()> {
        self.update(py, Update::Restart { cause: named_value(cause)?, reason })
    }

    fn note_decision(&self, py: Python<'_>, reason: &str, text: String) -> PyResult<()> {
        self.update(py, Update::Decision { reason: named_value(reason)?, text })
    }

    fn note_warm_refusal(&self, py: Python<'_>, reason: String) -> PyResult<()> {
        self.update(py, Update::WarmRefusal(reason))
    }

    fn observe_phase(&self, py: Python<'_>, phase: &str, duration_s: f64) -> PyResult<()> {
        let duration = span("duration_s", duration_s)?;
        self.update(py, Update::Phase { phase: named_value(phase)?, took: duration })
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.0.close())
    }
}
