//! The head of a request may be anything. The same as the fuzz target `http_head`, on a stable compiler.

use ferroelastic_core::health::http::{MAX_HEAD, Received, parse};
use proptest::prelude::*;

fn check(received: &[u8]) -> Result<(), TestCaseError> {
    match parse(received) {
        Received::Incomplete => prop_assert!(received.len() < MAX_HEAD),
        Received::Request(request) => {
            prop_assert!(!request.path.is_empty() && !request.path.contains(['?', '#', ' ', '\r', '\n']));
            let mut more = received.to_vec();
            more.extend_from_slice(b"GET / HTTP/1.1\r\n\r\n");
            prop_assert_eq!(parse(&more), Received::Request(request));
        }
        Received::Refused(status) => prop_assert!(matches!(status.code(), 400 | 405 | 431 | 505)),
    }
    Ok(())
}

/// Inputs of the fuzz target, and everything that they begin with: a peer sends in pieces.
#[test]
fn the_corpus_and_all_its_beginnings() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/http_head");
    let mut files = 0;
    for entry in std::fs::read_dir(folder).expect("the corpus") {
        let path = entry.expect("an entry").path();
        let input = std::fs::read(&path).expect("a file");
        for end in 0..=input.len() {
            check(&input[..end]).unwrap_or_else(|error| panic!("{}, {end} bytes: {error}", path.display()));
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
        check(&received)?;
    }

    #[test]
    fn nearly_a_request(received in mutated()) {
        check(&received)?;
    }

    #[test]
    fn lines_of_any_length(lengths in proptest::collection::vec((0usize..300, 0usize..300), 0..100)) {
        let line = |(name, value): &(usize, usize)| format!("{}: {}\r\n", "n".repeat(*name), "v".repeat(*value));
        let lines: String = lengths.iter().map(line).collect();
        check(format!("GET / HTTP/1.1\r\nHost: a\r\n{lines}\r\n").as_bytes())?;
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
