//! Log lines that match rules: failures of workers, warnings, and counts.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use super::processes::GroupEntry;
use super::progress::LogFailure;
use super::warnings::Warnings;
use crate::logs::{LogMatch, LogRule};
use crate::sys::clock::Moment;
use crate::text::printable;
use crate::vocabulary::LogEffect;

/// Time from one warning of a rule to the next. Lines in between are counted.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// Counts of the lines that match a rule, and its last warning.
#[derive(Debug, Default)]
struct RuleState {
    lines: u64,
    /// Lines since the last warning.
    unreported: u64,
    warned_at: Option<Instant>,
}

/// The matches of all rules of an engine.
#[derive(Debug, Default)]
pub(super) struct LogMatches(HashMap<LogRule, RuleState>);

impl LogMatches {
    /// Counts lines. A rule that fails reports the failure to its group; a rule that warns adds a warning, if the last one is old enough.
    pub(super) fn handle(
        &mut self,
        found: LogMatch,
        groups: &mut BTreeMap<u64, GroupEntry>,
        warnings: &Warnings,
        now: Instant,
    ) {
        let LogMatch { group, file, rule, lines, first } = found;
        let line = printable(&String::from_utf8_lossy(&first));
        let state = self.0.entry(rule.clone()).or_default();
        state.lines += lines;
        match rule.effect {
            LogEffect::Fail => {
                let Some(group) = groups.get_mut(&group) else { return };
                let (worker, at) = (file.worker, Moment::now());
                group.fail_by_log(
                    now,
                    LogFailure {
                        index: worker,
                        reason: rule.reason,
                        stream: file.label,
                        line,
                        realtime_ns: at.realtime_ns,
                    },
                );
            }
            LogEffect::Warn => {
                state.unreported += lines;
                if state.warned_at.is_none_or(|at| now.saturating_duration_since(at) >= WARNING_INTERVAL) {
                    let further = match state.unreported - 1 {
                        0 => String::new(),
                        further => format!(" ({further} more lines since the last warning of this rule)"),
                    };
                    warnings.add(format!("{}: {:?} in {}{further}", rule.reason, line, file.label));
                    (state.unreported, state.warned_at) = (0, Some(now));
                }
            }
        }
    }

    /// Lines by effect and reason.
    pub(super) fn figures(&self) -> BTreeMap<(&'static str, String), u64> {
        let mut figures = BTreeMap::new();
        for (rule, state) in &self.0 {
            *figures.entry((rule.effect.name(), rule.reason.clone())).or_default() += state.lines;
        }
        figures
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logs::ScanFile;

    fn found(lines: u64) -> LogMatch {
        LogMatch {
            group: 1,
            file: ScanFile { path: "log".into(), worker: 0, label: "stderr of rank 3".to_owned() },
            rule: LogRule { effect: LogEffect::Warn, pattern: "nan".to_owned(), reason: "loss is NaN".to_owned() },
            lines,
            first: b"nan\x1b[2J\xff".to_vec(),
        }
    }

    #[test]
    fn warnings_of_a_rule_have_an_interval_and_every_line_counts() {
        let (mut matches, warnings, start) = (LogMatches::default(), Warnings::default(), Instant::now());
        let mut handle = |lines, now| matches.handle(found(lines), &mut BTreeMap::new(), &warnings, now);
        handle(1, start);
        handle(4, start + WARNING_INTERVAL / 2);
        handle(1, start + WARNING_INTERVAL);
        let line = "loss is NaN: \"nan\\\\u{1b}[2J\u{fffd}\" in stderr of rank 3";
        let further = format!("{line} (4 more lines since the last warning of this rule)");
        assert_eq!(warnings.take(), [line.to_owned(), further]);
        assert_eq!(matches.figures(), BTreeMap::from([(("warn", "loss is NaN".to_owned()), 6)]));
    }
}
