//! `StoreServer` and `StoreClient`.

use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ferroelastic_core::rendezvous::rounds::HostSettings;
use ferroelastic_core::store;
use ferroelastic_core::store::client::ClientError;
use ferroelastic_core::store::wire::Limits;
use ferroelastic_core::{Owner, host};
use pyo3::create_exception;
use pyo3::exceptions::{PyConnectionError, PyRuntimeError};
use pyo3::prelude::*;

use crate::convert::span;
use crate::errors::{self, detached};

/// A store for clients of torch's `TCPStore`, and the host of a rendezvous.
#[pyclass(frozen, module = "ferroelastic._rust")]
pub(crate) struct StoreServer(host::StoreServer);

#[pymethods]
impl StoreServer {
    #[new]
    #[pyo3(signature = (host, port=0, *, run_id=None, min_nodes=1, max_nodes=1, last_call_s=30.0, silence_s=15.0,
        address=None, max_membership_changes=None, max_key_bytes=8192, max_value_bytes=8_388_608, max_keys=131_072,
        max_request_bytes=268_435_456, max_reply_bytes=268_435_456))]
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
        address: Option<String>,
        max_membership_changes: Option<u64>,
        max_key_bytes: u64,
        max_value_bytes: u64,
        max_keys: u64,
        max_request_bytes: u64,
        max_reply_bytes: u64,
    ) -> PyResult<Self> {
        let limits = Limits {
            key_bytes: max_key_bytes,
            value_bytes: max_value_bytes,
            keys: max_keys,
            request_bytes: max_request_bytes,
            reply_bytes: max_reply_bytes,
        };
        let (last_call, silence) = (span("last_call_s", last_call_s)?, span("silence_s", silence_s)?);
        let settings = run_id.map(|run_id| HostSettings {
            run_id,
            min_nodes,
            max_nodes,
            last_call,
            silence,
            address,
            max_membership_changes,
        });
        detached(py, || host::StoreServer::start((host, port).into(), limits, settings)).map(Self)
    }

    #[getter]
    fn port(&self) -> u16 {
        self.0.address().port()
    }

    #[pyo3(signature = (timeout_s=0.0))]
    fn close(&self, py: Python<'_>, timeout_s: f64) -> PyResult<()> {
        let timeout = span("timeout_s", timeout_s)?;
        detached(py, || self.0.close(timeout))
    }
}

create_exception!(ferroelastic._rust, StoreTimeoutError, PyRuntimeError, "Keys of a store were not set in time.");

/// A client of a store.
#[pyclass(frozen, module = "ferroelastic._rust")]
pub(crate) struct StoreClient {
    owner: Owner,
    client: Mutex<store::StoreClient>,
    /// Not in the client, which is locked while a request is under way.
    timeout: Mutex<Duration>,
}

impl StoreClient {
    /// Sends a request and receives the answer, detached from the interpreter. A forked child shares the parent's connection, and may have
    /// copied a locked mutex, so the owner is checked first.
    fn ask<T: Send>(
        &self,
        py: Python<'_>,
        request: impl FnOnce(&mut store::StoreClient) -> Result<T, ClientError> + Send,
    ) -> PyResult<T> {
        self.owner.check().map_err(|error| errors::to_python(py, error))?;
        let answer = py.detach(|| {
            let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
            client.set_timeout(*self.timeout.lock().unwrap_or_else(PoisonError::into_inner));
            request(&mut client)
        });
        answer.map_err(|error| to_python(&error))
    }
}

fn to_python(error: &ClientError) -> PyErr {
    match error {
        ClientError::TimedOut { .. } => StoreTimeoutError::new_err(error.to_string()),
        _ => PyConnectionError::new_err(error.to_string()),
    }
}

fn slices(keys: &[Vec<u8>]) -> Vec<&[u8]> {
    keys.iter().map(Vec::as_slice).collect()
}

#[pymethods]
impl StoreClient {
    #[new]
    fn new(py: Python<'_>, host: &str, port: u16, timeout_s: f64) -> PyResult<Self> {
        let timeout = span("timeout_s", timeout_s)?;
        let client = py.detach(|| store::StoreClient::connect(host, port, timeout));
        let client = client.map_err(|error| to_python(&error))?;
        Ok(Self { owner: Owner::this_process(), client: Mutex::new(client), timeout: Mutex::new(timeout) })
    }

    fn set_timeout(&self, py: Python<'_>, timeout_s: f64) -> PyResult<()> {
        self.owner.check().map_err(|error| errors::to_python(py, error))?;
        *self.timeout.lock().unwrap_or_else(PoisonError::into_inner) = span("timeout_s", timeout_s)?;
        Ok(())
    }

    fn set(&self, py: Python<'_>, key: &[u8], value: &[u8]) -> PyResult<()> {
        self.ask(py, |client| client.set(key, value))
    }

    fn compare_set(&self, py: Python<'_>, key: &[u8], expected: &[u8], desired: &[u8]) -> PyResult<Vec<u8>> {
        self.ask(py, |client| client.compare_set(key, expected, desired))
    }

    #[expect(clippy::needless_pass_by_value, reason = "made from Python's list")]
    fn get(&self, py: Python<'_>, keys: Vec<Vec<u8>>, timeout_s: f64) -> PyResult<Vec<Vec<u8>>> {
        let timeout = span("timeout_s", timeout_s)?;
        self.ask(py, |client| client.get(&slices(&keys), timeout))
    }

    #[expect(clippy::needless_pass_by_value, reason = "made from Python's list")]
    fn multi_set(&self, py: Python<'_>, pairs: Vec<(Vec<u8>, Vec<u8>)>) -> PyResult<()> {
        let pairs: Vec<(&[u8], &[u8])> = pairs.iter().map(|(key, value)| (key.as_slice(), value.as_slice())).collect();
        self.ask(py, |client| client.multi_set(&pairs))
    }

    fn add(&self, py: Python<'_>, key: &[u8], delta: i64) -> PyResult<i64> {
        self.ask(py, |client| client.add(key, delta))
    }

    fn append(&self, py: Python<'_>, key: &[u8], value: &[u8]) -> PyResult<()> {
        self.ask(py, |client| client.append(key, value))
    }

    #[expect(clippy::needless_pass_by_value, reason = "made from Python's list")]
    fn check(&self, py: Python<'_>, keys: Vec<Vec<u8>>) -> PyResult<bool> {
        self.ask(py, |client| client.check(&slices(&keys)))
    }

    fn delete(&self, py: Python<'_>, key: &[u8]) -> PyResult<bool> {
        self.ask(py, |client| client.delete(key))
    }

    fn num_keys(&self, py: Python<'_>) -> PyResult<i64> {
        self.ask(py, store::StoreClient::num_keys)
    }

    #[expect(clippy::needless_pass_by_value, reason = "made from Python's list")]
    fn wait(&self, py: Python<'_>, keys: Vec<Vec<u8>>, timeout_s: f64) -> PyResult<()> {
        let timeout = span("timeout_s", timeout_s)?;
        self.ask(py, |client| client.wait(&slices(&keys), timeout))
    }
}
