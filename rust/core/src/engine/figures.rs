//! Figures of the watchdogs, for the health server.

use std::collections::BTreeMap;

use crate::health::status::WatchdogFigures;
use crate::sys::clock::Moment;
use crate::watchdog::WatchdogServer;

/// The sums over all watchdogs, and the time since the last request or heartbeat of each process in `pids`.
pub(super) fn watchdog_figures(
    watchdogs: &BTreeMap<u64, WatchdogServer>,
    pids: &[i32],
    now: Moment,
) -> WatchdogFigures {
    let mut figures = WatchdogFigures::default();
    for watchdog in watchdogs.values() {
        let counts = watchdog.counts();
        figures.requests += counts.requests;
        figures.broken += counts.broken + counts.oversized + counts.unknown_version;
        figures.expiries += counts.expired;
        for pid in pids {
            if let Some(age) = watchdog.last_heard(*pid, now) {
                let youngest = figures.last_beats.entry(*pid).or_insert(age);
                *youngest = age.min(*youngest);
            }
        }
    }
    figures
}
