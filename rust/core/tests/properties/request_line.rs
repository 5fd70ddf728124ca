//! What holds of every stream that comes through the watchdog's pipe.

use ferroelastic_core::watchdog::lines::{Lines, MAX_LINE_BYTES};
use ferroelastic_core::watchdog::wire::{TimerRequest, parse};

/// The requests in a stream. Panics unless the stream is cut and read as it must be, whatever the bytes are.
pub(crate) fn check(stream: &[u8]) -> Vec<TimerRequest> {
    let (mut lines, mut whole) = (Lines::default(), Vec::new());
    lines.feed(stream, |line| whole.extend(line.map(<[u8]>::to_vec)));
    assert!(lines.held() <= MAX_LINE_BYTES);
    let mut requests = Vec::new();
    for line in whole {
        assert!(!line.is_empty() && line.len() <= MAX_LINE_BYTES && !line.contains(&b'\n'));
        let parsed = parse(&line);
        assert!(parsed.request.is_some() || parsed.broken.is_some());
        if let Some(request) = parsed.request {
            assert!(request.signal <= 64 && !request.expiration_time.is_nan());
            assert!(request.heartbeat.is_none_or(|beat| beat.timeout_s > 0.0 && beat.timeout_s.is_finite()));
            requests.push(request);
        }
    }
    requests
}
