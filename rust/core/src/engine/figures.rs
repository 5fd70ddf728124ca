//! Figures of the engine thread, for the health server.

use std::collections::BTreeMap;

use super::log_rules::LogMatches;
use crate::health::status::{EngineFigures, WarmFigures, WatchdogFigures};
use crate::sys::clock::Moment;
use crate::watchdog::WatchdogServer;

/// All figures. The ages of heartbeats are of the processes in `pids`.
pub(super) fn engine_figures(
    watchdogs: &BTreeMap<u64, WatchdogServer>,
    warm: WarmFigures,
    matches: &LogMatches,
    pids: &[i32],
    now: Moment,
) -> EngineFigures {
    EngineFigures { watchdog: watchdog_figures(watchdogs, pids, now), warm, log_matches: matches.figures() }
}

/// The sums over all watchdogs, and the time since the last request or heartbeat of each process in `pids`.
fn watchdog_figures(watchdogs: &BTreeMap<u64, WatchdogServer>, pids: &[i32], now: Moment) -> WatchdogFigures {
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
