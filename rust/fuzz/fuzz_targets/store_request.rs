//! What a client of the store sends.
#![no_main]

#[path = "../../core/tests/properties/store_request.rs"]
mod property;

libfuzzer_sys::fuzz_target!(|input: &[u8]| property::check(input));
