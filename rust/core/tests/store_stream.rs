//! What clients of the store send may be anything. The same as the fuzz target `store_request`, on a stable compiler.

use proptest::prelude::*;

#[path = "properties/store_request.rs"]
mod property;

use property::check;

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
            eprintln!("{name}, {end} bytes"); // the last line names the input that fails
            check(&input[..end]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes(input in proptest::collection::vec(any::<u8>(), 0..512)) {
        check(&input);
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
        check(&input);
    }
}
