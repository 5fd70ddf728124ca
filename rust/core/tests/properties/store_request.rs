//! What holds of every stream that a client of the store sends.

use ferroelastic_core::store::state::StoreState;
use ferroelastic_core::store::wire::{Decoder, Limits, MAGIC, Refusal, StoreRequest};

/// Small, so that an input can reach them.
const LIMITS: Limits = Limits { key_bytes: 64, value_bytes: 256, keys: 8, request_bytes: 1024, reply_bytes: 4096 };

/// The requests of a stream that comes in such pieces, and why it ends if it does.
fn requests<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<StoreRequest>, Option<Refusal>) {
    let (mut decoder, mut requests, mut fed) = (Decoder::new(LIMITS), Vec::new(), 0);
    for piece in pieces {
        decoder.feed(piece);
        fed += piece.len();
        loop {
            match decoder.next() {
                Ok(Some(request)) => requests.push(request),
                Ok(None) => break,
                Err(refusal) => return (requests, Some(refusal)),
            }
        }
        // No more is held than has come, and than a request and the field after it may have.
        assert!(decoder.held() <= fed && decoder.held() <= 1024 + 256 + 8, "{} bytes", decoder.held());
    }
    (requests, None)
}

/// An input as the fuzzer makes them: its first byte says how the rest is cut, and whether the number that clients begin with goes before.
///
/// Panics unless the stream is cut, read and carried out as it must be, whatever the bytes are.
pub(crate) fn check(input: &[u8]) {
    let Some((&how, rest)) = input.split_first() else { return };
    let mut stream = Vec::new();
    if how & 1 == 0 {
        stream.extend_from_slice(&[0]);
        stream.extend_from_slice(&MAGIC.to_le_bytes());
    }
    stream.extend_from_slice(rest);
    let (whole, refusal) = requests(std::iter::once(&stream[..]));
    let size = usize::from(how >> 1) + 1;
    assert_eq!(requests(stream.chunks(size)), (whole.clone(), refusal));
    // Every request has at least its opcode.
    assert!(whole.len() <= stream.len());

    let (mut state, mut replies) = (StoreState::default(), Vec::new());
    for (number, request) in (0..).zip(whole) {
        // Whoever misuses the store is gone, the others stay.
        let peer = number % 3;
        if state.apply(peer, request, &mut replies).is_err() {
            state.forget(peer);
        }
    }
    (0..3).for_each(|peer| state.forget(peer));
}
