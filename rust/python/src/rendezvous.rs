//! `RendezvousClient` and its state.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use ferroelastic_core::membership;
use ferroelastic_core::rendezvous::member::{self, Call, Failure};
use ferroelastic_core::rendezvous::message::{self, Introduction};
use ferroelastic_core::sys::lease::LeasePage;
use ferroelastic_core::sys::net::endpoint;
use pyo3::prelude::*;

use crate::convert::span;
use crate::errors::{detached, to_python};
use crate::group::wait_detached;
use crate::policy::{Decision, FailureFacts};

/// A place in a round.
#[pyclass(frozen, get_all, module = "ferroelastic._rust")]
#[derive(Clone)]
pub(crate) struct Place {
    round: u64,
    group_rank: u64,
    group_world_size: u64,
    first_rank: u64,
    world_size: u64,
    first_role_rank: u64,
    role_world_size: u64,
    address: Option<String>,
    failures: u64,
    restarts_used: u64,
    membership_changes: u64,
    cause: Option<Cause>,
}

impl From<message::Place> for Place {
    fn from(place: message::Place) -> Self {
        Self {
            round: place.round,
            group_rank: place.group_rank,
            group_world_size: place.group_world_size,
            first_rank: place.first_rank,
            world_size: place.world_size,
            first_role_rank: place.first_role_rank,
            role_world_size: place.role_world_size,
            address: place.address,
            failures: place.failures,
            restarts_used: place.restarts_used,
            membership_changes: place.membership_changes,
            cause: place.cause.map(Cause::from),
        }
    }
}

/// Why a round ended.
#[pyclass(frozen, get_all, module = "ferroelastic._rust")]
#[derive(Clone)]
pub(crate) struct Cause {
    kind: &'static str,
    node: String,
    at_ns: Option<u64>,
    text: String,
    exit_code: i32,
    is_loss: bool,
}

impl From<message::Cause> for Cause {
    fn from(cause: message::Cause) -> Self {
        let message::Cause { node, at_ns, text, code: exit_code, is_loss, .. } = cause;
        Self { kind: cause.kind.name(), node, at_ns, text, exit_code, is_loss }
    }
}

/// The state of a membership.
#[pyclass(frozen, get_all, module = "ferroelastic._rust")]
pub(crate) struct Membership {
    state: &'static str,
    place: Option<Place>,
    cause: Option<Cause>,
    text: String,
    exit_code: Option<i32>,
    decision: Option<Decision>,
    detail: String,
    is_loss: bool,
}

impl From<member::MembershipState> for Membership {
    fn from(state: member::MembershipState) -> Self {
        use member::MembershipState as S;

        let (place, cause) = match &state {
            S::Placed(place) => (Some(place.clone()), None),
            S::Over(place, cause) => (Some(place.clone()), Some(cause.clone())),
            _ => (None, None),
        };
        let (exit_code, decision, detail, is_loss) = match &state {
            S::Closed { code, decision, detail, is_loss, .. } => {
                (Some(*code), decision.as_deref(), detail.clone(), *is_loss)
            }
            S::Over(_, cause) => (None, cause.decision.as_deref(), cause.detail.clone(), cause.is_loss),
            _ => (None, None, String::new(), false),
        };
        let decision = decision.cloned().map(Decision::from);
        let (state, text) = match state {
            S::Idle => ("idle", String::new()),
            S::Joining => ("joining", String::new()),
            S::Placed(_) => ("placed", String::new()),
            S::Over(_, cause) => ("over", cause.text),
            S::Released => ("released", String::new()),
            S::Closed { text, code: 0, .. } => ("spare", text),
            S::Closed { text, .. } => ("closed", text),
            S::Failed(Failure::TimedOut(text)) => ("timed out", text),
            S::Failed(Failure::Unreachable(text)) => ("unreachable", text),
            S::Failed(Failure::Refused(text)) => ("refused", text),
            S::Failed(Failure::Late(text)) => ("late", text),
        };
        let (place, cause) = (place.map(Place::from), cause.map(Cause::from));
        Self { state, place, cause, text, exit_code, decision, detail, is_loss }
    }
}

/// An agent's membership in a rendezvous.
#[pyclass(frozen, module = "ferroelastic._rust")]
pub(crate) struct RendezvousClient(membership::RendezvousClient);

#[pymethods]
impl RendezvousClient {
    #[new]
    #[pyo3(signature = (host, port, run_id, *, min_nodes=1, max_nodes=1, name=None, node_rank=None, is_host=false,
        connect_timeout_s=60.0, settings=None))]
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    fn new(
        py: Python<'_>,
        host: &str,
        port: u16,
        run_id: String,
        min_nodes: u32,
        max_nodes: u32,
        name: Option<String>,
        node_rank: Option<u32>,
        is_host: bool,
        connect_timeout_s: f64,
        settings: Option<BTreeMap<String, String>>,
    ) -> PyResult<Self> {
        let connect_timeout = span("connect_timeout_s", connect_timeout_s)?;
        let introduction = Introduction::new(run_id, name.unwrap_or_default(), (min_nodes, max_nodes));
        let introduction = Introduction { is_host, node_rank, settings: settings.unwrap_or_default(), ..introduction };
        let settings = member::MemberSettings { endpoint: endpoint(host, port), connect_timeout, is_host };
        detached(py, || membership::RendezvousClient::start(host, port, introduction, settings)).map(Self)
    }

    fn join(&self, py: Python<'_>, role: String, local_world_size: u64, timeout_s: f64) -> PyResult<()> {
        let timeout = span("timeout_s", timeout_s)?;
        self.call(py, Call::Join { role, local_world_size, timeout })
    }

    #[pyo3(signature = (at_ns, text, exit_code, facts, *, detail=""))]
    fn fail(
        &self,
        py: Python<'_>,
        at_ns: u64,
        text: String,
        exit_code: i32,
        facts: &Bound<'_, FailureFacts>,
        detail: &str,
    ) -> PyResult<()> {
        self.call(
            py,
            Call::Failed { at_ns, text, code: exit_code, facts: facts.get().0.clone(), detail: detail.into() },
        )
    }

    fn progress(&self, py: Python<'_>) -> PyResult<()> {
        self.call(py, Call::Progressed)
    }

    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        self.call(py, Call::Finished)
    }

    fn end(&self, py: Python<'_>, text: String, exit_code: i32) -> PyResult<()> {
        self.call(py, Call::Close { text, code: exit_code })
    }

    fn leave(&self, py: Python<'_>, text: String) -> PyResult<()> {
        self.call(py, Call::Leave(text))
    }

    fn membership(&self, py: Python<'_>) -> PyResult<Membership> {
        self.0.state().map(Membership::from).map_err(|error| to_python(py, error))
    }

    #[getter]
    fn generation(&self, py: Python<'_>) -> PyResult<u64> {
        self.0.generation().map_err(|error| to_python(py, error))
    }

    #[getter]
    fn alarm_fd(&self, py: Python<'_>) -> PyResult<RawFd> {
        let alarm = self.0.alarm().map_err(|error| to_python(py, error))?;
        Ok(alarm.as_raw_fd())
    }

    #[getter]
    fn stop_within_s(&self, py: Python<'_>) -> PyResult<Option<f64>> {
        let left = self.0.lapsed_left().map_err(|error| to_python(py, error))?;
        Ok(left.map(|left| left.as_secs_f64()))
    }

    #[getter]
    fn address(&self, py: Python<'_>) -> PyResult<Option<String>> {
        let address = self.0.address().map_err(|error| to_python(py, error))?;
        Ok(address.map(|address| address.to_string()))
    }

    fn take_warnings(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        self.0.take_warnings().map_err(|error| to_python(py, error))
    }

    #[pyo3(signature = (generation, timeout_s=None, wake_fd=None, news_fd=None))]
    fn wait(
        &self,
        py: Python<'_>,
        generation: u64,
        timeout_s: Option<f64>,
        wake_fd: Option<RawFd>,
        news_fd: Option<RawFd>,
    ) -> PyResult<&'static str> {
        wait_detached(py, timeout_s, [wake_fd, news_fd], |timeout, others| self.0.wait(generation, timeout, others))
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.0.close())
    }
}

impl RendezvousClient {
    /// The lease of the workers, for the engine.
    pub(crate) fn lease(&self) -> ferroelastic_core::Result<Arc<LeasePage>> {
        self.0.lease().map(Arc::clone)
    }

    fn call(&self, py: Python<'_>, call: Call) -> PyResult<()> {
        detached(py, || self.0.call(call))
    }
}
