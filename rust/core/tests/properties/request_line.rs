//! What holds of every stream that comes through the watchdog's pipe.

use ferroelastic_core::watchdog::lines::{LONGEST, Lines};
use ferroelastic_core::watchdog::wire::{Request, parse};

/// The requests in a stream. Panics unless the stream is cut and read as it must be, whatever the bytes are.
pub(crate) fn check(stream: &[u8]) -> Vec<Request> {
    let (mut lines, mut whole) = (Lines::default(), Vec::new());
    lines.feed(stream, |line| whole.extend(line.map(<[u8]>::to_vec)));
    assert!(lines.held() <= LONGEST);
    let mut requests = Vec::new();
    for line in whole {
        assert!(!line.is_empty() && line.len() <= LONGEST && !line.contains(&b'\n'));
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
