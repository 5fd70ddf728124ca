//! What clients of the store send may be anything. The same as the fuzz target `store_request`, on a stable compiler.

use ferroelastic_core::store::state::StoreState;
use ferroelastic_core::store::wire::{Decoder, Limits, MAGIC, Refusal, StoreRequest};
use proptest::prelude::*;

/// Small, so that an input can reach them.
const LIMITS: Limits = Limits { key_bytes: 64, value_bytes: 256, keys: 8, request_bytes: 1024, reply_bytes: 4096 };

/// The requests of a stream that comes in such pieces, and why it ends if it does.
fn requests<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Result<(Vec<StoreRequest>, Option<Refusal>), TestCaseError> {
    let (mut decoder, mut requests, mut fed) = (Decoder::new(LIMITS), Vec::new(), 0);
    for piece in pieces {
        decoder.feed(piece);
        fed += piece.len();
        loop {
            match decoder.next() {
                Ok(Some(request)) => requests.push(request),
                Ok(None) => break,
                Err(refusal) => return Ok((requests, Some(refusal))),
            }
        }
        // No more is held than has come, and than a request and the field after it may have.
        prop_assert!(decoder.held() <= fed && decoder.held() <= 1024 + 256 + 8, "{} bytes", decoder.held());
    }
    Ok((requests, None))
}

/// An input as the fuzzer makes them: its first byte says how the rest is cut, and whether the number that clients begin with goes before.
fn check(input: &[u8]) -> Result<(), TestCaseError> {
    let Some((&how, rest)) = input.split_first() else { return Ok(()) };
    let mut stream = Vec::new();
    if how & 1 == 0 {
        stream.extend_from_slice(&[0]);
        stream.extend_from_slice(&MAGIC.to_le_bytes());
    }
    stream.extend_from_slice(rest);
    let (whole, refusal) = requests(std::iter::once(&stream[..]))?;
    let size = usize::from(how >> 1) + 1;
    prop_assert_eq!(requests(stream.chunks(size))?, (whole.clone(), refusal));
    // Every request has at least its opcode.
    prop_assert!(whole.len() <= stream.len());

    let (mut state, mut replies) = (StoreState::default(), Vec::new());
    for (number, request) in (0..).zip(whole) {
        // Whoever misuses the store is gone, the others stay.
        let peer = number % 3;
        if state.apply(peer, request, &mut replies).is_err() {
            state.forget(peer);
        }
    }
    (0..3).for_each(|peer| state.forget(peer));
    Ok(())
}

fn corpus() -> Vec<(String, Vec<u8>)> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/store_request");
    let entries = std::fs::read_dir(folder).expect("the corpus").map(|entry| entry.expect("an entry").path());
    entries.map(|path| (path.display().to_string(), std::fs::read(&path).expect("a file"))).collect()
}

#[test]
fn the_corpus_and_all_its_beginnings() {
    let inputs = corpus();
    assert!(inputs.len() >= 10, "{} files", inputs.len());
    for (name, input) in inputs {
        for end in 0..=input.len() {
            check(&input[..end]).unwrap_or_else(|error| panic!("{name}, {end} bytes: {error}"));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes(input in proptest::collection::vec(any::<u8>(), 0..512)) {
        check(&input)?;
    }

    #[test]
    fn requests_with_some_bytes_changed(
        how in any::<u8>(),
        picks in proptest::collection::vec(any::<prop::sample::Index>(), 1..6),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        let corpus = corpus();
        let mut input = vec![how];
        for pick in picks {
            input.extend_from_slice(&corpus[pick.index(corpus.len())].1[1..]);
        }
        for (index, byte) in changes {
            let index = index.index(input.len());
            input[index] = byte;
        }
        check(&input)?;
    }
}
