//! What holds of the head of every request.

use ferroelastic_core::health::http::{MAX_HEAD, Received, parse};

/// Panics unless a head is read as it must be, whatever the bytes are.
pub(crate) fn check(received: &[u8]) {
    match parse(received) {
        // More is waited for only while there is room for it.
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
}
