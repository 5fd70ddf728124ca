//! What a client of the health server sends.
#![no_main]

use ferroelastic_core::health::http::{MAX_HEAD, Received, parse};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|received: &[u8]| {
    match parse(received) {
        // More is waited for only while there is room for it.
        Received::Incomplete => assert!(received.len() < MAX_HEAD),
        Received::Request(request) => {
            assert!(!request.path.is_empty() && !request.path.contains(['?', '#', ' ', '\r', '\n']));
            // What follows a head does not change it.
            let mut more = received.to_vec();
            more.extend_from_slice(b"GET / HTTP/1.1\r\n\r\n");
            assert_eq!(parse(&more), Received::Request(request));
        }
        Received::Refused(status) => assert!(matches!(status.code(), 400 | 405 | 431 | 505)),
    }
});
