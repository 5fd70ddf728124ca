//! Recognises agents of torchrun and rejects them with an error.
//!
//! A torchrun agent that joins this endpoint finds a store, and would wait there for other torchrun agents until its timeout. Where its
//! protocol has room, it gets an error that names the cause. Otherwise its connection is closed.

use crate::store::wire::StoreRequest;

/// The reply to an agent of torch's c10d rendezvous, which unpickles it as the rendezvous state. It refers to a module that does not exist,
/// and the module's name appears in the agent's `ModuleNotFoundError`. In base64: "this endpoint is served by ferrorun, which torchrun
/// cannot join: start this node with ferrorun too".
const STATE: &[u8] = b"Y3RoaXMgZW5kcG9pbnQgaXMgc2VydmVkIGJ5IGZlcnJvcnVuLCB3aGljaCB0b3JjaHJ1biBjYW5ub3Qgam9pbjogc3RhcnQgdGhpcyBub2RlIHdpdGggZmVycm9ydW4gdG9vCnN0YXRlCi4=";

/// Prefix of the key of torch's c10d rendezvous state. The id of the job follows it.
const STATE_PREFIX: &[u8] = b"/torch.rendezvous.";

/// The first key that an agent of torch's static rendezvous writes, after a prefix of its own.
const ROLE_PREFIX: &[u8] = b"torchelastic/role_info/";

/// The answer to a request, by its sender.
#[derive(Debug, PartialEq, Eq)]
pub enum Admission {
    /// A worker sent it: apply it.
    Worker,
    /// A torchrun agent sent it: reply with these bytes.
    Answer(Vec<u8>),
    /// A torchrun agent sent it and expects no reply: close the connection.
    Disconnect,
}

/// Decides whether a request comes from a worker or from a torchrun agent.
#[must_use]
pub fn screen(request: &StoreRequest) -> Admission {
    let is_state = |key: &[u8]| key.strip_prefix(STATE_PREFIX).is_some_and(|id| !id.contains(&b'/'));
    match request {
        StoreRequest::CompareSet { key, .. } | StoreRequest::Get { key } if is_state(key) => {
            let mut answer = u64::try_from(STATE.len()).unwrap_or(u64::MAX).to_le_bytes().to_vec();
            answer.extend_from_slice(STATE);
            Admission::Answer(answer)
        }
        // The reply that ends a wait: the key is set.
        StoreRequest::Wait { keys } if keys.iter().any(|key| is_state(key)) => Admission::Answer(vec![0]),
        StoreRequest::Set { key, .. } if is_role(key) => Admission::Disconnect,
        _ => Admission::Worker,
    }
}

/// Whether an agent of torch's static rendezvous publishes its role under this key. Agents of this package use a prefix with a round.
fn is_role(key: &[u8]) -> bool {
    !key.starts_with(STATE_PREFIX) && memchr::memmem::find(key, ROLE_PREFIX).is_some()
}
