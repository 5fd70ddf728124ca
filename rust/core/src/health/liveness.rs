//! Whether the agent is alive, and why: a rule over what its callback says, and over whether it says anything at all.

use std::time::{Duration, Instant};

/// How long a probe waits for the callback.
pub const BUDGET: Duration = Duration::from_millis(500);

/// For how long an answer serves further probes.
pub const REUSE: Duration = Duration::from_millis(100);

/// What the callback said: how long ago the last progress was, or why it cannot tell.
pub type Answer = Result<Duration, String>;

/// The age of a progress time, in seconds since the epoch, at the wall clock time `now_s`. A time in the future has age zero.
///
/// # Errors
///
/// The progress is not a number.
pub fn age(progress_s: f64, now_s: f64) -> Answer {
    if progress_s.is_nan() {
        return Err("it returned nan, which is no time".to_owned());
    }
    Ok(Duration::try_from_secs_f64((now_s - progress_s).max(0.0)).unwrap_or(Duration::MAX))
}

/// The verdict and its reason, a line for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether the agent is alive.
    pub alive: bool,
    /// Why, without a line break.
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
    /// When a thread had the interpreter to call the callback.
    started: Option<Instant>,
    /// Whether those who waited for the answer were told to wait no longer.
    overdue: bool,
}

/// What is known of the agent's progress.
///
/// At most one question is outstanding, however many probes come: the callback runs in one thread, and a callback that does not
/// return is not called again.
#[derive(Debug)]
pub struct Liveness {
    timeout: Duration,
    question: Option<Question>,
    answer: Option<(Instant, Answer)>,
}

impl Liveness {
    /// Nothing is known yet. Without progress for longer than `timeout` the agent counts as dead.
    #[must_use]
    pub fn new(timeout: Duration) -> Self {
        Self { timeout, question: None, answer: None }
    }

    /// What a probe is told now; `None` if it has to wait for an answer.
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

    /// Whether the callback is to be asked: a probe waits, and no question is outstanding.
    #[must_use]
    pub fn ask(&mut self, now: Instant) -> bool {
        let is_needed = self.question.is_none();
        if is_needed {
            self.question = Some(Question { asked: now, started: None, overdue: false });
        }
        is_needed
    }

    /// A thread has the interpreter and calls the callback.
    pub fn started(&mut self, at: Instant) {
        if let Some(question) = &mut self.question {
            question.started = Some(at);
        }
    }

    /// The callback has returned, or raised.
    pub fn answered(&mut self, at: Instant, answer: Answer) {
        self.question = None;
        self.answer = Some((at, answer));
    }

    /// Time has passed. From [`Liveness::next_tick`] on nobody waits for the answer.
    pub fn tick(&mut self, now: Instant) {
        if let Some(question) = &mut self.question
            && now.saturating_duration_since(question.asked) >= BUDGET
        {
            question.overdue = true;
        }
    }

    /// When the wait for an answer is over.
    #[must_use]
    pub fn next_tick(&self) -> Option<Instant> {
        self.question.filter(|question| !question.overdue)?.asked.checked_add(BUDGET)
    }

    fn judge(&self, age: Duration) -> Verdict {
        // In whole seconds, since that is how the callback tells the time: a half past the timeout is not past it.
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

/// What an exception says may have several lines, and any length.
fn one_line(text: &str) -> String {
    const MOST: usize = 400;
    let mut line: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = line.char_indices().nth(MOST) {
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

    fn told(liveness: &Liveness, now: Instant) -> (bool, String) {
        let verdict = liveness.verdict(now).expect("a verdict");
        (verdict.alive, verdict.reason)
    }

    #[test]
    fn the_first_probe_asks_and_the_others_wait_for_the_same_answer() {
        let (mut liveness, start) = (Liveness::new(TIMEOUT), Instant::now());
        assert_eq!(liveness.verdict(start), None);
        assert!(liveness.ask(start));
        assert!(!liveness.ask(after(start, 10)), "one question at a time");
        liveness.started(after(start, 11));
        liveness.answered(after(start, 12), Ok(Duration::from_secs(3)));
        assert_eq!(told(&liveness, after(start, 12)), (true, "alive: last progress 3 s ago, timeout 60 s".into()));
        assert_eq!(liveness.next_tick(), None);
    }

    #[test]
    fn an_answer_is_reused_for_a_moment_and_ages_meanwhile() {
        let (mut liveness, start) = (Liveness::new(TIMEOUT), Instant::now());
        assert!(liveness.ask(start));
        liveness.answered(start, Ok(Duration::from_millis(60_950)));
        assert_eq!(told(&liveness, start), (true, "alive: last progress 60 s ago, timeout 60 s".into()));
        assert_eq!(told(&liveness, after(start, 60)), (false, "no progress for 61 s, timeout 60 s".into()));
        assert_eq!(liveness.verdict(after(start, 100)), None);
        assert!(liveness.ask(after(start, 100)));
    }

    #[test]
    fn without_a_thread_that_can_run_the_interpreter_is_stuck() {
        let (mut liveness, start) = (Liveness::new(TIMEOUT), Instant::now());
        assert!(liveness.ask(start));
        assert_eq!(liveness.next_tick(), Some(start + BUDGET));
        liveness.tick(after(start, 499));
        assert_eq!(liveness.verdict(after(start, 499)), None);
        liveness.tick(after(start, 500));
        assert_eq!(liveness.next_tick(), None, "nobody waits any more");
        let stuck = "the interpreter is stuck: no Python thread could run for ";
        assert_eq!(told(&liveness, after(start, 500)), (false, format!("{stuck}0.5 s")));
        assert_eq!(told(&liveness, after(start, 90_000)), (false, format!("{stuck}90.0 s")));
        assert!(!liveness.ask(after(start, 90_000)), "the question is still outstanding");
    }

    #[test]
    fn a_callback_that_does_not_return_is_told_from_a_stuck_interpreter() {
        let (mut liveness, start) = (Liveness::new(TIMEOUT), Instant::now());
        assert!(liveness.ask(start));
        liveness.started(after(start, 100));
        liveness.tick(after(start, 600));
        assert_eq!(told(&liveness, after(start, 3_200)), (false, "alive_callback has not returned for 3.1 s".into()));
        liveness.answered(after(start, 4_000), Ok(Duration::ZERO));
        assert!(told(&liveness, after(start, 4_000)).0, "a late answer is an answer");
    }

    #[test]
    fn an_exception_is_told_in_one_line() {
        let (mut liveness, start) = (Liveness::new(TIMEOUT), Instant::now());
        assert!(liveness.ask(start));
        liveness.answered(start, Err("ValueError: a\r\nb".into()));
        assert_eq!(told(&liveness, start), (false, "alive_callback failed: ValueError: a b".into()));
        liveness.answered(start, Err("é".repeat(10_000)));
        assert_eq!(told(&liveness, start).1.chars().count(), "alive_callback failed: ".len() + 401);
    }

    #[test]
    fn extreme_ages_and_timeouts_are_no_problem() {
        let start = Instant::now();
        for (timeout, age, alive) in [
            (Duration::MAX, Duration::MAX, true),
            (Duration::ZERO, Duration::MAX, false),
            (Duration::ZERO, Duration::from_millis(999), true),
            (Duration::from_millis(500), Duration::from_secs(1), false),
        ] {
            let mut liveness = Liveness::new(timeout);
            liveness.answered(start, Ok(age));
            assert_eq!(told(&liveness, start).0, alive, "{timeout:?} {age:?}");
        }
    }

    #[test]
    fn a_clock_that_seems_to_go_back_changes_nothing() {
        let (mut liveness, start) = (Liveness::new(TIMEOUT), Instant::now() + Duration::from_secs(5));
        assert!(liveness.ask(start));
        liveness.tick(start.checked_sub(Duration::from_secs(1)).expect("later than boot"));
        assert_eq!(liveness.next_tick(), Some(start + BUDGET));
    }
}
