//! The restart policy under a clock that is moved by hand: single decisions, and what holds for all sequences of failures.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ferroelastic_core::rendezvous::policy::{
    Decision, EARLY, FailureFacts, NO_RESTART_EXIT_CODE, PolicySettings, RestartPolicy, RestartVerdict,
};
use ferroelastic_core::vocabulary::RestartReason;
use proptest::prelude::*;

const SECOND: Duration = Duration::from_secs(1);

fn parse(options: &[(&str, &str)]) -> Result<PolicySettings, String> {
    let options: BTreeMap<_, _> =
        options.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    PolicySettings::parse(&options).map_err(|invalid| invalid.to_string())
}

struct Job {
    policy: RestartPolicy,
    now: Instant,
}

impl Job {
    fn new(options: &[(&str, &str)]) -> Self {
        Self { policy: RestartPolicy::new(parse(options).expect("valid"), "job"), now: Instant::now() }
    }

    /// A round that fails after `uptime`.
    fn fail(&mut self, uptime: Duration, facts: &FailureFacts) -> Decision {
        self.policy.begin_round(self.now);
        self.now += uptime;
        self.policy.decide(self.now, facts)
    }

    fn fail_early(&mut self) -> Decision {
        self.fail(Duration::from_millis(1), &FailureFacts::default())
    }

    /// The reasons of the decisions on rounds with these uptimes in seconds.
    fn reasons(&mut self, uptimes_s: &[u64]) -> Vec<RestartReason> {
        let uptimes = uptimes_s.iter().map(|uptime_s| Duration::from_secs(*uptime_s));
        uptimes.map(|uptime| self.fail(uptime, &FailureFacts::default()).reason).collect()
    }
}

#[test]
fn failures_right_after_the_start_are_delayed_from_the_second_one_on() {
    let mut job = Job::new(&[("--max-restarts", "20")]);
    let delays: Vec<_> = (0..20).map(|_| job.fail_early().after.expect("a restart")).collect();
    assert_eq!(delays[0], Duration::ZERO);
    for (doublings, delay) in (0..).zip(&delays[1..]) {
        let longest = (Duration::from_millis(250) * 2u32.pow(doublings)).min(5 * SECOND);
        assert!(*delay <= longest && *delay >= longest * 4 / 5, "{delay:?} of {longest:?}");
    }
    // Longer than a port stays in TIME_WAIT.
    assert!(delays.iter().sum::<Duration>() > 60 * SECOND, "{delays:?}");
    let end = job.fail_early();
    assert_eq!((end.reason, end.text.as_str()), (RestartReason::MaxRestarts, "no restart is left"));
}

#[test]
fn a_longer_round_or_progress_ends_the_row_of_early_failures() {
    let mut job = Job::new(&[]);
    assert_eq!(job.fail_early().reason, RestartReason::AtOnce);
    assert_eq!(job.fail_early().reason, RestartReason::Backoff);
    assert_eq!(job.fail(EARLY, &FailureFacts::default()).reason, RestartReason::AtOnce);
    assert_eq!(job.fail_early().reason, RestartReason::AtOnce);
    let progress = FailureFacts { has_progressed: true, ..FailureFacts::default() };
    for _ in 0..5 {
        assert_eq!(job.fail(Duration::ZERO, &progress).reason, RestartReason::AtOnce);
    }
    assert_eq!(job.fail_early().reason, RestartReason::AtOnce);
    assert_eq!(job.fail_early().reason, RestartReason::Backoff);
    let mut job = Job::new(&[("--restart-backoff", "0")]);
    assert_eq!(job.reasons(&[0; 5]), [RestartReason::AtOnce; 5]);
}

#[test]
fn the_jitter_depends_on_the_job_and_the_restart_alone() {
    let delay = |seed: &str| {
        let mut policy = RestartPolicy::new(PolicySettings::default(), seed);
        let now = Instant::now();
        policy.begin_round(now);
        policy.decide(now, &FailureFacts::default());
        policy.begin_round(now);
        policy.decide(now, &FailureFacts::default()).after.expect("a restart")
    };
    assert_eq!(delay("job"), delay("job"));
    assert_ne!(delay("job"), delay("other"));
}

#[test]
fn a_healthy_round_gives_all_restarts_back() {
    use RestartReason::{AtOnce, MaxRestarts};
    let mut job = Job::new(&[("--max-restarts", "2"), ("--healthy-window", "600")]);
    assert_eq!(job.reasons(&[20, 20, 600, 20, 20]), [AtOnce, AtOnce, AtOnce, AtOnce, MaxRestarts]);
    let mut job = Job::new(&[("--max-restarts", "0"), ("--healthy-window", "600")]);
    assert_eq!(job.reasons(&[1000]), [MaxRestarts]);
}

#[test]
fn restarts_within_a_period_are_limited() {
    use RestartReason::{AtOnce, RestartRate};
    let mut job = Job::new(&[("--restart-rate", "2/100")]);
    assert_eq!(job.reasons(&[50, 49, 51, 49, 30]), [AtOnce, AtOnce, AtOnce, AtOnce, RestartRate]);
}

#[test]
fn a_first_start_that_fails_too_early_is_final() {
    use RestartReason::{AtOnce, MinUptime};
    assert_eq!(Job::new(&[("--min-uptime", "30")]).reasons(&[29]), [MinUptime]);
    let mut job = Job::new(&[("--min-uptime", "30")]);
    assert_eq!(job.reasons(&[30, 0]), [AtOnce; 2]);
    // A round that ended because a node came counts, and so does progress.
    let mut job = Job::new(&[("--min-uptime", "30")]);
    job.policy.begin_round(job.now);
    job.now += 30 * SECOND;
    job.policy.note_membership_change(job.now);
    assert_eq!(job.reasons(&[0]), [AtOnce]);
    let progress = FailureFacts { has_progressed: true, ..FailureFacts::default() };
    assert_eq!(Job::new(&[("--min-uptime", "30")]).fail(SECOND, &progress).reason, AtOnce);
}

#[test]
fn restarts_without_progress_are_limited() {
    let mut job = Job::new(&[("--restarts-without-progress", "2"), ("--restart-backoff", "0")]);
    let progress = FailureFacts { has_progressed: true, ..FailureFacts::default() };
    for _ in 0..3 {
        job.fail_early();
        job.fail(SECOND, &progress);
    }
    job.fail_early();
    let end = job.fail_early();
    assert_eq!(end.text, "2 restarts made no progress (--restarts-without-progress)");
}

#[test]
fn the_verdict_of_the_program_is_followed() {
    let with = |verdict| FailureFacts { verdict, ..FailureFacts::default() };
    let mut job = Job::new(&[("--max-restarts", "1")]);
    let decision = job.fail(SECOND, &with(RestartVerdict::Delay(9 * SECOND)));
    assert_eq!((decision.reason, decision.after), (RestartReason::Program, Some(9 * SECOND)));
    assert_eq!(decision.text, "restart 1 of 1 follows after 9.00 s: the restart policy of the program");
    // It adds no restarts.
    assert_eq!(job.fail(SECOND, &with(RestartVerdict::Delay(SECOND))).reason, RestartReason::MaxRestarts);
    let decision = Job::new(&[]).fail(SECOND, &with(RestartVerdict::Final("it is broken".into())));
    assert_eq!((decision.reason, decision.text.as_str()), (RestartReason::Program, "it is broken"));
}

#[test]
fn exit_codes_and_signals_that_are_final() {
    let codes = [("--fatal-exit-codes", "3, 10-12,sigsegv,KILL")];
    let is_final = |status| {
        Job::new(&codes).fail(SECOND, &FailureFacts { status: Some(status), ..FailureFacts::default() }).is_final()
    };
    let fatal: Vec<_> = (-64..=255).filter(|status| is_final(*status)).collect();
    assert_eq!(fatal, [-11, -9, 3, 10, 11, 12, NO_RESTART_EXIT_CODE]);
}

#[test]
fn a_decision_that_is_taken_back_has_used_nothing() {
    let mut job = Job::new(&[("--max-restarts", "1")]);
    for _ in 0..3 {
        assert_eq!(job.fail_early().reason, RestartReason::AtOnce);
        job.policy.undo();
        job.policy.note_membership_change(job.now);
    }
    assert_eq!(job.policy.used(), 0);
    // A second decision on a round replaces the first.
    assert_eq!(job.fail_early().reason, RestartReason::AtOnce);
    assert_eq!(job.policy.decide(job.now, &FailureFacts::default()).reason, RestartReason::AtOnce);
    assert_eq!(job.policy.used(), 1);
}

#[test]
fn settings_that_are_not_valid_are_named() {
    for (name, value, expected) in [
        ("--max-restarts", "-1", "give a whole number from 0, or none"),
        ("--restart-backoff", "nan", "give seconds from 0 to one year"),
        ("--healthy-window", "-1", "give seconds from 0 to one year"),
        ("--restart-rate", "5/0", "give RESTARTS/SECONDS, e.g. 5/3600, with at most 1000 restarts, or none"),
        ("--on-node-failure", "stop", "give restart, wait or exit"),
    ] {
        assert_eq!(parse(&[(name, value)]), Err(format!("{name}={value:?} is not valid: {expected}")));
    }
    for value in ["0", "5-3", "256", "SIGFOO", "-9", "1-"] {
        let text = parse(&[("--fatal-exit-codes", value)]).expect_err("not valid");
        assert!(text.contains(&format!("{value:?} is not an exit code from 1 to 255, a range")), "{text}");
    }
    assert_eq!(parse(&[("--other", "x"), ("--fatal-exit-codes", ""), ("--restart-rate", "none")]), parse(&[]));
}

/// A round: its uptime in milliseconds, whether it progresses, and whether it ends by a failure that no lost node explains.
type Round = (u64, bool, bool);

fn rounds() -> impl Strategy<Value = Vec<Round>> {
    prop::collection::vec((0..60_000u64, prop::bool::weighted(0.2), prop::bool::weighted(0.8)), 1..80)
}

proptest! {
    /// Whatever fails when: restarts are within their limits, only failures count, delays have their bounds, and no restart after progress
    /// or a longer round is delayed.
    #[test]
    fn limits_and_delays_hold(rounds in rounds(), max in 0u64..6, idle in 1u64..5, base_ms in 0u64..2000, window_s in 0u64..90) {
        let (max_text, idle_text, window_text) = (max.to_string(), idle.to_string(), window_s.to_string());
        let base_text = format!("{}.{:03}", base_ms / 1000, base_ms % 1000);
        let mut job = Job::new(&[
            ("--max-restarts", &max_text),
            ("--restarts-without-progress", &idle_text),
            ("--restart-backoff", &base_text),
            ("--healthy-window", &window_text),
        ]);
        let (mut used, mut idle_used) = (0, 0);
        for (uptime_ms, has_progressed, is_failure) in rounds {
            let uptime = Duration::from_millis(uptime_ms);
            if window_s > 0 && uptime >= Duration::from_secs(window_s) {
                used = 0;
            }
            if has_progressed {
                idle_used = 0;
            }
            let decision = job.fail(uptime, &FailureFacts { has_progressed, ..FailureFacts::default() });
            if !is_failure {
                job.policy.undo();
                job.policy.note_membership_change(job.now);
                prop_assert_eq!(job.policy.used(), used);
                continue;
            }
            prop_assert_eq!(decision.is_final(), used >= max || idle_used >= idle);
            let Some(after) = decision.after else { break };
            (used, idle_used) = (used + 1, idle_used + 1);
            prop_assert_eq!(job.policy.used(), used);
            prop_assert!(after <= 5 * SECOND);
            prop_assert_eq!(after.is_zero(), decision.reason == RestartReason::AtOnce);
            prop_assert!(after.is_zero() || (uptime < EARLY && !has_progressed && base_ms > 0));
            job.now += after;
        }
    }

    /// No text of settings makes the parser panic, and two policies with the same settings decide alike.
    #[test]
    fn equal_settings_decide_alike(value in "[0-9a-zA-Z,/. -]{0,12}", name in 0..11usize, statuses in prop::collection::vec(-64..256i32, 1..20)) {
        let names = ["--max-restarts", "--restart-backoff", "--restart-backoff-max", "--healthy-window", "--restart-rate",
            "--fatal-exit-codes", "--fatal-causes", "--min-uptime", "--restarts-without-progress", "--on-node-failure",
            "--early-exit-timeout"];
        let Ok(settings) = parse(&[(names[name], &value)]) else { return Ok(()) };
        let now = Instant::now();
        let mut policies = [(); 2].map(|()| RestartPolicy::new(settings.clone(), "job"));
        for status in statuses {
            let facts = FailureFacts { status: Some(status), ..FailureFacts::default() };
            let [first, second] = policies.each_mut().map(|policy| {
                policy.begin_round(now);
                policy.decide(now, &facts)
            });
            prop_assert_eq!(first, second);
        }
    }
}
