//! `RestartPolicy`, its facts and its decisions.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ferroelastic_core::rendezvous::policy::{self, PolicySettings, RestartVerdict};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::convert::span;

/// The facts of a failure.
#[pyclass(frozen, module = "ferroelastic._rust")]
pub(crate) struct FailureFacts(pub(crate) policy::FailureFacts);

#[pymethods]
impl FailureFacts {
    #[new]
    #[pyo3(signature = (status=None, causes=Vec::new(), *, has_progressed=false, is_exhausted=false, final_reason=None, delay_s=None))]
    fn new(
        status: Option<i32>,
        causes: Vec<String>,
        has_progressed: bool,
        is_exhausted: bool,
        final_reason: Option<String>,
        delay_s: Option<f64>,
    ) -> PyResult<Self> {
        let verdict = match (final_reason, delay_s) {
            (Some(reason), _) => RestartVerdict::Final(reason),
            _ if is_exhausted => RestartVerdict::Exhausted,
            (None, Some(delay_s)) => RestartVerdict::Delay(span("delay_s", delay_s)?),
            (None, None) => RestartVerdict::Default,
        };
        Ok(Self(policy::FailureFacts { status, causes, has_progressed, verdict }))
    }
}

/// A decision after a failure.
#[pyclass(frozen, get_all, module = "ferroelastic._rust")]
#[derive(Clone)]
pub(crate) struct Decision {
    reason: &'static str,
    text: String,
    delay_s: Option<f64>,
}

impl From<policy::Decision> for Decision {
    fn from(decision: policy::Decision) -> Self {
        let delay_s = decision.after.as_ref().map(Duration::as_secs_f64);
        Self { reason: decision.reason.name(), text: decision.text, delay_s }
    }
}

/// A restart policy with the clock of this machine.
#[pyclass(frozen, module = "ferroelastic._rust")]
pub(crate) struct RestartPolicy(Mutex<policy::RestartPolicy>);

#[pymethods]
impl RestartPolicy {
    #[new]
    #[expect(clippy::needless_pass_by_value, reason = "extracted from a Python object")]
    fn new(settings: BTreeMap<String, String>, seed: &str) -> PyResult<Self> {
        let settings =
            PolicySettings::parse(&settings).map_err(|invalid| PyValueError::new_err(invalid.to_string()))?;
        Ok(Self(Mutex::new(policy::RestartPolicy::new(settings, seed))))
    }

    #[pyo3(signature = (elapsed_s=0.0))]
    fn begin_round(&self, elapsed_s: f64) -> PyResult<()> {
        let (now, elapsed) = (Instant::now(), span("elapsed_s", elapsed_s)?);
        self.with(|policy| policy.begin_round(now.checked_sub(elapsed).unwrap_or(now)));
        Ok(())
    }

    fn note_membership_change(&self) {
        self.with(|policy| policy.note_membership_change(Instant::now()));
    }

    fn decide(&self, facts: &Bound<'_, FailureFacts>) -> Decision {
        self.with(|policy| policy.decide(Instant::now(), &facts.get().0)).into()
    }

    #[getter]
    fn used(&self) -> u64 {
        self.with(|policy| policy.used())
    }
}

impl RestartPolicy {
    fn with<T>(&self, call: impl FnOnce(&mut policy::RestartPolicy) -> T) -> T {
        call(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
