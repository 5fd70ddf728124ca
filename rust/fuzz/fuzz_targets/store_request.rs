//! Decodes and applies the bytes that a client of the store sends. The properties are those of `rust/core/tests/store_stream.rs`.
#![no_main]

use ferroelastic_core::store::state::StoreState;
use ferroelastic_core::store::wire::{Decoder, Limits, MAGIC, Refusal, StoreRequest};
use libfuzzer_sys::fuzz_target;

/// Limits that are small enough for an input to exceed.
const LIMITS: Limits = Limits { key_bytes: 64, value_bytes: 256, keys: 8, request_bytes: 1024, reply_bytes: 4096 };

/// The requests of a stream that arrives in these pieces, and the refusal that ends it, if any.
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
        // The decoder holds at most the received bytes, and at most one request and the next field.
        assert!(decoder.held() <= fed && decoder.held() <= 1024 + 256 + 8);
    }
    (requests, None)
}

fuzz_target!(|input: &[u8]| {
    // The first byte selects the fragmentation, and whether the magic number of clients is prepended: half of the inputs get it for free.
    let Some((&mode, rest)) = input.split_first() else { return };
    let mut stream = Vec::new();
    if mode & 1 == 0 {
        stream.extend_from_slice(&[0]);
        stream.extend_from_slice(&MAGIC.to_le_bytes());
    }
    stream.extend_from_slice(rest);
    let (whole, refusal) = requests(std::iter::once(&stream[..]));
    let size = usize::from(mode >> 1) + 1;
    assert_eq!(requests(stream.chunks(size)), (whole.clone(), refusal));
    // Every request has at least its opcode.
    assert!(whole.len() <= stream.len());

    let (mut state, mut replies) = (StoreState::default(), Vec::new());
    for (number, request) in (0..).zip(whole) {
        // A peer that misuses the store is disconnected; the others stay.
        let peer = number % 3;
        if state.apply(peer, request, &mut replies).is_err() {
            state.forget(peer);
        }
    }
    (0..3).for_each(|peer| state.forget(peer));
});
