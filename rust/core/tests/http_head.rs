//! The head of a request may be anything. The same as the fuzz target `http_head`, on a stable compiler.

use ferroelastic_core::health::http::{Received, parse};
use proptest::prelude::*;

#[path = "properties/http_head.rs"]
mod property;

use property::check;

/// Inputs of the fuzz target, and everything that they begin with: a peer sends in pieces.
#[test]
fn the_corpus_and_all_its_beginnings() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/http_head");
    let mut files = 0;
    for entry in std::fs::read_dir(folder).expect("the corpus") {
        let path = entry.expect("an entry").path();
        let input = std::fs::read(&path).expect("a file");
        for end in 0..=input.len() {
            eprintln!("{}, {end} bytes", path.display()); // the last line names the input that fails
            check(&input[..end]);
        }
        files += 1;
    }
    assert!(files >= 20, "{files} files in {folder}");
}

fn mutated() -> impl Strategy<Value = Vec<u8>> {
    let request = b"GET /livez?a HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n".to_vec();
    let change = (0..request.len(), any::<u8>());
    proptest::collection::vec(change, 0..6).prop_map(move |changes| {
        let mut request = request.clone();
        for (at, byte) in changes {
            request[at] = byte;
        }
        request
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes(received in proptest::collection::vec(any::<u8>(), 0..512)) {
        check(&received);
    }

    #[test]
    fn nearly_a_request(received in mutated()) {
        check(&received);
    }

    #[test]
    fn lines_of_any_length(lengths in proptest::collection::vec((0usize..300, 0usize..300), 0..100)) {
        let line = |(name, value): &(usize, usize)| format!("{}: {}\r\n", "n".repeat(*name), "v".repeat(*value));
        let lines: String = lengths.iter().map(line).collect();
        check(format!("GET / HTTP/1.1\r\nHost: a\r\n{lines}\r\n").as_bytes());
    }

    /// What is read in one go and what is read in pieces is understood alike.
    #[test]
    fn an_answer_does_not_change_with_more_bytes(received in mutated(), end in 0usize..48) {
        let beginning = &received[..end.min(received.len())];
        match parse(beginning) {
            Received::Incomplete => {}
            // A method that is not known is only refused once the head is complete, a byte that is wrong at once: of two reasons for a
            // refusal the bytes that are there decide.
            Received::Refused(_) => {
                prop_assert!(matches!(parse(&received), Received::Refused(_)));
            }
            early @ Received::Request(_) => prop_assert_eq!(parse(&received), early),
        }
    }
}
