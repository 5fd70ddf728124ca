//! Parses the bytes that a client of the health server sends.
#![no_main]

use ferroelastic_core::health::http::{MAX_HEAD, Received, parse};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|received: &[u8]| {
    match parse(received) {
        // An incomplete head is below the limit, so there is room for more bytes.
        Received::Incomplete => assert!(received.len() < MAX_HEAD),
        Received::Request(request) => {
            assert!(!request.path.is_empty() && !request.path.contains(['?', '#', ' ', '\r', '\n']));
            // Bytes after a head do not change it.
            let mut more = received.to_vec();
            more.extend_from_slice(b"GET / HTTP/1.1\r\n\r\n");
            assert_eq!(parse(&more), Received::Request(request));
        }
        Received::Refused(status) => assert!(matches!(status.code(), 400 | 405 | 431 | 505)),
    }
});
