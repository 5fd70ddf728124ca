//! The liveness rule: whether the agent is alive, decided by the answers of its callback and by missing answers.

use std::time::{Duration, Instant};

/// Limit on the time a probe waits for the callback.
pub const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);

/// How long an answer is reused for further probes.
pub const REUSE: Duration = Duration::from_millis(100);

/// The answer of the callback: the time since the last progress, or an error message.
pub type Answer = Result<Duration, String>;

/// The age at `now_s` of a progress time, both in seconds since the epoch. A time in the future has age zero.
///
/// # Errors
///
/// `progress_s` is NaN.
pub fn age(progress_s: f64, now_s: f64) -> Answer {
    if progress_s.is_nan() {
        return Err("it returned nan, which is not a time".to_owned());
    }
    Ok(Duration::try_from_secs_f64((now_s - progress_s).max(0.0)).unwrap_or(Duration::MAX))
}

/// A liveness verdict with its reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether the agent is alive.
    pub alive: bool,
    /// The reason, as one line of text for people.
    pub reason: String,
}

impl Verdict {
    fn dead(reason: String) -> Self {
        Self { alive: false, reason }
    }
}

/// A question to the callback that has not been answered.
#[derive(Clone, Copy, Debug)]
struct Question {
    asked: Instant,
    /// When a Python thread called the callback.
    started: Option<Instant>,
    /// The answer timeout has passed, so probes no longer wait for the answer.
    overdue: bool,
}

/// The known progress of the agent.
///
/// At most one question is outstanding, whatever the number of probes. The callback runs on one thread, and it is not called again before
/// it has returned.
#[derive(Debug)]
pub struct Liveness {
    timeout: Duration,
    question: Option<Question>,
    answer: Option<(Instant, Answer)>,
}

impl Liveness {
    /// Progress is unknown. The agent counts as dead when it has made no progress for longer than `timeout`.
    #[must_use]
    pub fn new(timeout: Duration) -> Self {
        Self { timeout, question: None, answer: None }
    }

    /// The verdict at `now`; `None` if the probe must wait for an answer.
    #[must_use]
    pub fn verdict(&self, now: Instant) -> Option<Verdict> {
        if let Some(question) = self.question.filter(|question| question.overdue) {
            return Some(Verdict::dead(match question.started {
                None => format!(
                    "the interpreter is stuck: no Python thread could run for {}",
                    tenths(now.saturating_duration_since(question.asked))
                ),
                Some(started) => {
                    format!("alive_callback has not returned for {}", tenths(now.saturating_duration_since(started)))
                }
            }));
        }
        let (at, answer) = self.answer.as_ref()?;
        let elapsed = now.saturating_duration_since(*at);
        if elapsed >= REUSE {
            return None;
        }
        Some(match answer {
            Ok(age) => self.judge(age.saturating_add(elapsed)),
            Err(reason) => Verdict::dead(format!("alive_callback failed: {}", one_line(reason))),
        })
    }

    /// Records a question for a waiting probe. `false` if a question is already outstanding and the callback must not be asked again.
    #[must_use]
    pub fn ask(&mut self, now: Instant) -> bool {
        let is_needed = self.question.is_none();
        if is_needed {
            self.question = Some(Question { asked: now, started: None, overdue: false });
        }
        is_needed
    }

    /// Records that a Python thread calls the callback now.
    pub fn started(&mut self, at: Instant) {
        if let Some(question) = &mut self.question {
            question.started = Some(at);
        }
    }

    /// Records that the callback has returned or raised.
    pub fn answered(&mut self, at: Instant, answer: Answer) {
        self.question = None;
        self.answer = Some((at, answer));
    }

    /// Ends the wait for the answer once [`Liveness::next_tick`] has passed.
    pub fn tick(&mut self, now: Instant) {
        if let Some(question) = &mut self.question
            && now.saturating_duration_since(question.asked) >= ANSWER_TIMEOUT
        {
            question.overdue = true;
        }
    }

    /// When the wait for the answer ends.
    #[must_use]
    pub fn next_tick(&self) -> Option<Instant> {
        self.question.filter(|question| !question.overdue)?.asked.checked_add(ANSWER_TIMEOUT)
    }

    fn judge(&self, age: Duration) -> Verdict {
        // Compares whole seconds, the resolution of the callback: 60.5 s do not exceed a timeout of 60 s.
        let (age, timeout) = (age.as_secs(), seconds(self.timeout));
        if Duration::from_secs(age) > self.timeout {
            return Verdict::dead(format!("no progress for {age} s, timeout {timeout}"));
        }
        Verdict { alive: true, reason: format!("alive: last progress {age} s ago, timeout {timeout}") }
    }
}

fn tenths(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

fn seconds(timeout: Duration) -> String {
    if timeout == Duration::MAX { "none".into() } else { format!("{} s", timeout.as_secs_f64()) }
}

/// The text as one line of bounded length.
fn one_line(text: &str) -> String {
    const MAX_CHARS: usize = 400;
    let mut line: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = line.char_indices().nth(MAX_CHARS) {
        line.truncate(end);
        line.push('…');
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(60);

    fn after(start: Instant, millis: u64) -> Instant {
        start + Duration::from_millis(millis)
    }

    fn verdict(liveness: &Liveness, now: Instant) -> (bool, String) {
        let verdict = liveness.verdict(now).expect("a verdict");
        (verdict.alive, verdict.reason)
    }

    #[test]
    fn only_the_first_probe_asks_and_later_ones_get_the_same_answer() {
        let (mut liveness, start) = (Liveness::new(TIMEOUT), Instant::now());
        assert_eq!(liveness.verdict(start), None);
        assert!(liveness.ask(start));
        assert!(!liveness.ask(after(start, 10)), "one question at a time");
        liveness.started(after(start, 11));
        liveness.answered(after(start, 12), Ok(Duration::from_secs(3)));
        assert_eq!(verdict(&liveness, after(start, 12)), (true, "alive: last progress 3 s ago, timeout 60 s".into()));
        assert_eq!(liveness.next_tick(), None);
    }

    #[test]
    fn an_answer_is_reused_for_a_short_time_and_its_age_grows() {
        let (mut liveness, start) = (Liveness::new(TIMEOUT), Instant::now());
        assert!(liveness.ask(start));
        liveness.answered(start, Ok(Duration::from_millis(60_950)));
        assert_eq!(verdict(&liveness, start), (true, "alive: last progress 60 s ago, timeout 60 s".into()));
        assert_eq!(verdict(&liveness, after(start, 60)), (false, "no progress for 61 s, timeout 60 s".into()));
        assert_eq!(liveness.verdict(after(start, 100)), None);
        assert!(liveness.ask(after(start, 100)));
    }

    #[test]
    fn a_question_that_no_thread_receives_means_a_stuck_interpreter() {
        let (mut liveness, start) = (Liveness::new(TIMEOUT), Instant::now());
        assert!(liveness.ask(start));
        assert_eq!(liveness.next_tick(), Some(start + ANSWER_TIMEOUT));
        liveness.tick(after(start, 499));
        assert_eq!(liveness.verdict(after(start, 499)), None);
        liveness.tick(after(start, 500));
        assert_eq!(liveness.next_tick(), None, "no probe waits any longer");
        let stuck = "the interpreter is stuck: no Python thread could run for ";
        assert_eq!(verdict(&liveness, after(start, 500)), (false, format!("{stuck}0.5 s")));
        assert_eq!(verdict(&liveness, after(start, 90_000)), (false, format!("{stuck}90.0 s")));
        assert!(!liveness.ask(after(start, 90_000)), "the question is still outstanding");
    }

    #[test]
    fn a_hanging_callback_is_distinguished_from_a_stuck_interpreter() {
        let (mut liveness, start) = (Liveness::new(TIMEOUT), Instant::now());
        assert!(liveness.ask(start));
        liveness.started(after(start, 100));
        liveness.tick(after(start, 600));
        assert_eq!(
            verdict(&liveness, after(start, 3_200)),
            (false, "alive_callback has not returned for 3.1 s".into())
        );
        liveness.answered(after(start, 4_000), Ok(Duration::ZERO));
        assert!(verdict(&liveness, after(start, 4_000)).0, "a late answer is an answer");
    }

    #[test]
    fn an_exception_is_reported_in_one_line_of_bounded_length() {
        let (mut liveness, start) = (Liveness::new(TIMEOUT), Instant::now());
        assert!(liveness.ask(start));
        liveness.answered(start, Err("ValueError: a\r\nb".into()));
        assert_eq!(verdict(&liveness, start), (false, "alive_callback failed: ValueError: a b".into()));
        liveness.answered(start, Err("é".repeat(10_000)));
        assert_eq!(verdict(&liveness, start).1.chars().count(), "alive_callback failed: ".len() + 401);
    }

    #[test]
    fn extreme_ages_and_timeouts_do_not_overflow() {
        let start = Instant::now();
        for (timeout, age, alive) in [
            (Duration::MAX, Duration::MAX, true),
            (Duration::ZERO, Duration::MAX, false),
            (Duration::ZERO, Duration::from_millis(999), true),
            (Duration::from_millis(500), Duration::from_secs(1), false),
        ] {
            let mut liveness = Liveness::new(timeout);
            liveness.answered(start, Ok(age));
            assert_eq!(verdict(&liveness, start).0, alive, "{timeout:?} {age:?}");
        }
    }

    #[test]
    fn a_tick_before_the_question_changes_nothing() {
        let (mut liveness, start) = (Liveness::new(TIMEOUT), Instant::now() + Duration::from_secs(5));
        assert!(liveness.ask(start));
        liveness.tick(start.checked_sub(Duration::from_secs(1)).expect("later than boot"));
        assert_eq!(liveness.next_tick(), Some(start + ANSWER_TIMEOUT));
    }
}
