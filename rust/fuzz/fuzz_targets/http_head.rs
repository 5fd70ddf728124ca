//! Parses the bytes that a client of the health server sends.
#![no_main]

#[path = "../../core/tests/properties/http_head.rs"]
mod property;

libfuzzer_sys::fuzz_target!(|received: &[u8]| property::check(received));
