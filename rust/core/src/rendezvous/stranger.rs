//! What stock agents of torch do at an endpoint that speaks another protocol, and what they are told.
//!
//! A torchrun that joins this endpoint finds a store, and waits in it for agents that use the store as it does. There are none: it gets an
//! error that names the cause, where its protocol has room for one, and the end of the connection where it has not.

use crate::store::wire::Request;

/// The answer to an agent of torch's c10d rendezvous, which takes it for its pickled state: a reference to a module, whose name is in
/// the `ModuleNotFoundError` that it fails with. In base64: "this endpoint is served by ferrorun, which torchrun cannot join: start
/// this node with ferrorun too".
const STATE: &[u8] = b"Y3RoaXMgZW5kcG9pbnQgaXMgc2VydmVkIGJ5IGZlcnJvcnVuLCB3aGljaCB0b3JjaHJ1biBjYW5ub3Qgam9pbjogc3RhcnQgdGhpcyBub2RlIHdpdGggZmVycm9ydW4gdG9vCnN0YXRlCi4=";

/// Where torch's c10d rendezvous keeps its state; the id of the job follows, and with it nothing but the state.
const STATE_PREFIX: &[u8] = b"/torch.rendezvous.";

/// What an agent of torch's static rendezvous writes first, below a prefix of its own.
const ROLE_PREFIX: &[u8] = b"torchelastic/role_info/";

/// What to do with a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is a worker's.
    Worker,
    /// It is that of an agent of torch: send this.
    Answer(Vec<u8>),
    /// It is that of an agent of torch, and waits for nothing that could be said: end the connection.
    End,
}

/// Says who sent a request.
#[must_use]
pub fn judge(request: &Request) -> Verdict {
    let is_state = |key: &[u8]| key.strip_prefix(STATE_PREFIX).is_some_and(|id| !id.contains(&b'/'));
    match request {
        Request::CompareSet { key, .. } | Request::Get { key } if is_state(key) => {
            let mut answer = u64::try_from(STATE.len()).unwrap_or(u64::MAX).to_le_bytes().to_vec();
            answer.extend_from_slice(STATE);
            Verdict::Answer(answer)
        }
        // It is there.
        Request::Wait { keys } if keys.iter().any(|key| is_state(key)) => Verdict::Answer(vec![0]),
        Request::Set { key, .. } if is_role(key) => Verdict::End,
        _ => Verdict::Worker,
    }
}

/// Whether a key is that under which an agent of a static rendezvous says what its workers are. Agents of this package that use the store
/// for that have a prefix with a round.
fn is_role(key: &[u8]) -> bool {
    !key.starts_with(STATE_PREFIX) && memchr::memmem::find(key, ROLE_PREFIX).is_some()
}
