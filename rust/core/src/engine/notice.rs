//! The text that tells workers the deadline of their stop.

use crate::supervise::StopNotice;
use crate::sys::clock::Moment;

/// The notice as one line of JSON. `at` is a recent moment, for the conversion of the deadline to both clocks.
pub(super) fn line(notice: StopNotice, at: Moment) -> String {
    let StopNotice { reason, signal, kill_at } = notice;
    let deadline = kill_at.map(|kill_at| kill_at.saturating_duration_since(at.instant));
    let (wall_s, monotonic_ns) = deadline.map_or_else(
        || ("null".to_owned(), "null".to_owned()),
        |left| {
            let left_ns = u64::try_from(left.as_nanos()).unwrap_or(u64::MAX);
            let realtime_ns = at.realtime_ns.saturating_add(left_ns);
            let wall_s = format!("{}.{:06}", realtime_ns / 1_000_000_000, realtime_ns % 1_000_000_000 / 1_000);
            (wall_s, at.monotonic_ns.saturating_add(left_ns).to_string())
        },
    );
    format!(
        "{{\"version\": 1, \"reason\": \"{}\", \"signal\": {signal}, \"deadline_s\": {wall_s}, \"deadline_monotonic_ns\": {monotonic_ns}}}\n",
        reason.name()
    )
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::vocabulary::StopReason;

    #[test]
    fn the_deadline_is_on_both_clocks() {
        let at =
            Moment { instant: Instant::now(), monotonic_ns: 5_000_000_000, realtime_ns: 1_700_000_000_250_000_000 };
        let notice = |kill_at| StopNotice { reason: StopReason::Membership, signal: 15, kill_at };
        assert_eq!(
            line(notice(Some(at.instant + Duration::from_millis(1_500))), at),
            "{\"version\": 1, \"reason\": \"membership\", \"signal\": 15, \"deadline_s\": 1700000001.750000, \
             \"deadline_monotonic_ns\": 6500000000}\n"
        );
        assert_eq!(
            line(notice(None), at),
            "{\"version\": 1, \"reason\": \"membership\", \"signal\": 15, \"deadline_s\": null, \"deadline_monotonic_ns\": null}\n"
        );
    }
}
