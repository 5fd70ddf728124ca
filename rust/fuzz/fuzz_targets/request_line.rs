//! What a watchdog reads from its pipe.
#![no_main]

#[path = "../../core/tests/properties/request_line.rs"]
mod property;

libfuzzer_sys::fuzz_target!(|stream: &[u8]| {
    property::check(stream);
});
