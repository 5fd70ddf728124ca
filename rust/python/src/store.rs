//! `StoreServer`.

use std::net::IpAddr;

use ferroelastic_core::rendezvous::rounds::Settings;
use ferroelastic_core::store;
use ferroelastic_core::store::wire::Limits;
use pyo3::prelude::*;

use crate::convert::span;
use crate::errors::detached;

/// A store that clients of torch's `TCPStore` can use, and the host of a rendezvous.
#[pyclass(frozen, module = "ferroelastic._rust")]
pub(crate) struct StoreServer(store::StoreServer);

#[pymethods]
impl StoreServer {
    #[new]
    #[pyo3(signature = (host, port=0, *, run_id=None, min_nodes=1, max_nodes=1, last_call_s=30.0, silence_s=5.0,
        most_membership_changes=None))]
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    fn new(
        py: Python<'_>,
        host: IpAddr,
        port: u16,
        run_id: Option<String>,
        min_nodes: u32,
        max_nodes: u32,
        last_call_s: f64,
        silence_s: f64,
        most_membership_changes: Option<u64>,
    ) -> PyResult<Self> {
        let (last_call, silence) = (span("last_call_s", last_call_s)?, span("silence_s", silence_s)?);
        let settings =
            run_id.map(|run_id| Settings { run_id, min_nodes, max_nodes, last_call, silence, most_membership_changes });
        detached(py, || store::StoreServer::start((host, port).into(), Limits::default(), settings)).map(Self)
    }

    #[getter]
    fn port(&self) -> u16 {
        self.0.address().port()
    }

    #[pyo3(signature = (patience_s=0.0))]
    fn close(&self, py: Python<'_>, patience_s: f64) -> PyResult<()> {
        let patience = span("patience_s", patience_s)?;
        detached(py, || self.0.close(patience))
    }
}
