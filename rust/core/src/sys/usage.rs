//! Resource usage of a running process, from `/proc/PID/statm` and `/proc/PID/stat`.

use std::fs;
use std::time::Duration;

/// Memory and CPU time of all threads of one process, without its children.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunningUsage {
    /// Resident memory.
    pub resident_bytes: u64,
    /// CPU time in user and kernel mode.
    pub cpu: Duration,
}

/// Reads the usage of process `pid`. `None` if it does not exist or access is denied.
#[must_use]
pub fn of(pid: i32) -> Option<RunningUsage> {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let resident_bytes = resident_pages(&statm)?.checked_mul(u64::try_from(rustix::param::page_size()).ok()?)?;
    Some(RunningUsage { resident_bytes, cpu: cpu_time(&stat, rustix::param::clock_ticks_per_second())? })
}

fn resident_pages(statm: &str) -> Option<u64> {
    statm.split_ascii_whitespace().nth(1)?.parse().ok()
}

fn cpu_time(stat: &str, ticks_per_second: u64) -> Option<Duration> {
    // The command may contain spaces and parentheses.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let user: u64 = fields.nth(11)?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    let ticks = user.checked_add(system)?;
    let (seconds, rest) = (ticks.checked_div(ticks_per_second)?, ticks % ticks_per_second);
    Some(Duration::from_secs(seconds) + Duration::from_nanos(rest * 1_000_000_000 / ticks_per_second))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "4711 (a) b (c) S 1 4700 4699 0 -1 4194560 1 2 3 4 150 25 0 0 20 0 1 0 987 4096";

    #[test]
    fn user_and_system_time_are_added() {
        assert_eq!(cpu_time(STAT, 100), Some(Duration::from_millis(1750)));
        assert_eq!(cpu_time(STAT, 0), None);
        for broken in ["", "1 (a", "1 (a) S 1 2 3", "1 (a) S 1 2 3 4 5 6 7 8 9 10 x 12"] {
            assert_eq!(cpu_time(broken, 100), None, "{broken:?}");
        }
    }

    #[test]
    fn resident_pages_are_the_second_field() {
        assert_eq!(resident_pages("100 25 3 1 0 9 0\n"), Some(25));
        assert_eq!(resident_pages("100"), None);
    }

    #[test]
    fn a_running_process_has_usage_and_a_missing_one_has_none() {
        let pid = i32::try_from(std::process::id()).expect("pids fit");
        assert!(of(pid).expect("own usage").resident_bytes > 0);
        assert_eq!(of(0), None);
    }
}
