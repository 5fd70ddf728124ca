//! Parses the bytes that a watchdog reads from its pipe. The properties are those of `rust/core/tests/request_line.rs`.
#![no_main]

use ferroelastic_core::watchdog::lines::{MAX_LINE_BYTES, Lines};
use ferroelastic_core::watchdog::wire::parse;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|stream: &[u8]| {
    let mut lines = Lines::default();
    lines.feed(stream, |line| {
        let Some(line) = line else { return };
        assert!(!line.is_empty() && line.len() <= MAX_LINE_BYTES && !line.contains(&b'\n'));
        let parsed = parse(line);
        assert!(parsed.request.is_some() || parsed.broken.is_some());
        if let Some(request) = parsed.request {
            assert!(request.signal <= 64 && !request.expiration_time.is_nan());
            assert!(request.heartbeat.is_none_or(|beat| beat.timeout_s > 0.0 && beat.timeout_s.is_finite()));
        }
    });
    assert!(lines.held() <= MAX_LINE_BYTES);
});
