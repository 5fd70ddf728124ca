//! The table of deadlines against a model that is too simple to be wrong, and what a stepped clock does to it: nothing.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ferroelastic_core::sys::clock::Moment;
use ferroelastic_core::watchdog::deadlines::{Deadlines, Full, MAX_TIMERS, expiry_instant};
use ferroelastic_core::watchdog::wire::TimerRequest;
use proptest::prelude::*;

fn request(pid: i32, scope: &str, expiration_time: f64) -> TimerRequest {
    TimerRequest { pid, scope: scope.into(), expiration_time, signal: 9, heartbeat: None }
}

fn moment(instant: Instant, wall_s: f64) -> Moment {
    let realtime_ns = Duration::from_secs_f64(wall_s).as_nanos().try_into().expect("it fits");
    Moment { instant, monotonic_ns: 0, realtime_ns }
}

#[test]
fn a_step_of_the_wall_clock_moves_no_deadline() {
    let start = Instant::now();
    for step_s in [3600.0, -3600.0] {
        let mut deadlines = Deadlines::default();
        let wall_s = 1_700_000_000.0;
        let arm = |deadlines: &mut Deadlines, scope: &str, now: Moment, after_s: f64| {
            let at = now.wall_s() + after_s;
            deadlines.arm(request(1, scope, at), expiry_instant(now, at)).expect("room");
        };
        arm(&mut deadlines, "before", moment(start, wall_s), 60.0);
        // One second later the clock is set. Clients read the same clock.
        let later = start + Duration::from_secs(1);
        arm(&mut deadlines, "after", moment(later, wall_s + 1.0 + step_s), 60.0);
        assert_eq!(deadlines.next_at(), Some(start + Duration::from_secs(60)));
        assert_eq!(deadlines.expired(start + Duration::from_millis(59_999)), []);
        let scopes = |expired: Vec<ferroelastic_core::watchdog::deadlines::ArmedTimer>| {
            expired.into_iter().map(|timer| timer.request.scope).collect::<Vec<_>>()
        };
        assert_eq!(scopes(deadlines.expired(start + Duration::from_secs(60))), ["before"]);
        assert_eq!(scopes(deadlines.expired(start + Duration::from_secs(61))), ["after"]);
    }
}

#[test]
fn times_out_of_range_of_the_clock() {
    let now = Instant::now();
    let received = moment(now, 1_700_000_000.0);
    assert_eq!(expiry_instant(received, 1e300), None);
    assert_eq!(expiry_instant(received, f64::INFINITY), None);
    assert!(expiry_instant(received, 0.0).is_some_and(|at| at <= now));
    assert!(expiry_instant(received, -1e300).is_some_and(|at| at <= now));
}

#[test]
fn arming_and_releasing_at_every_step_takes_no_memory() {
    let mut deadlines = Deadlines::default();
    let now = Instant::now();
    for step in 0..100_000 {
        deadlines.arm(request(1, "step", 0.0), Some(now + Duration::from_secs(60 + step))).expect("room");
        if step % 2 == 0 {
            deadlines.release(1, "step");
        }
        assert!(deadlines.queued() <= 70, "{}", deadlines.queued());
    }
}

#[test]
fn a_full_table_refuses() {
    let mut deadlines = Deadlines::default();
    for scope in 0..MAX_TIMERS {
        deadlines.arm(request(1, &scope.to_string(), 0.0), None).expect("room");
    }
    assert_eq!(deadlines.arm(request(1, "one more", 0.0), None), Err(Full));
    assert_eq!(deadlines.arm(request(1, "7", 0.0), None), Ok(()), "takes the place of its own");
    assert_eq!(deadlines.release_all(1).len(), MAX_TIMERS);
    assert!(deadlines.is_empty());
}

#[derive(Clone, Debug)]
enum Step {
    Arm { pid: i32, scope: u8, after: u64 },
    Never { pid: i32, scope: u8 },
    Release { pid: i32, scope: u8 },
    Forget { pid: i32 },
    Pass { time: u64 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let (pid, scope) = (1..4i32, 0..4u8);
    let key = (pid.clone(), scope);
    let step = prop_oneof![
        4 => (key.clone(), 0..50u64).prop_map(|((pid, scope), after)| Step::Arm { pid, scope, after }),
        1 => key.clone().prop_map(|(pid, scope)| Step::Never { pid, scope }),
        2 => key.prop_map(|(pid, scope)| Step::Release { pid, scope }),
        1 => pid.prop_map(|pid| Step::Forget { pid }),
        2 => (0..30u64).prop_map(|time| Step::Pass { time }),
    ];
    proptest::collection::vec(step, 0..200)
}

proptest! {
    #[test]
    fn the_table_agrees_with_the_model(steps in steps()) {
        let start = Instant::now();
        let (mut deadlines, mut time) = (Deadlines::default(), 0);
        let mut model: BTreeMap<(i32, String), Option<u64>> = BTreeMap::new();
        let at = |time: u64| start + Duration::from_millis(time);
        for step in steps {
            match step {
                Step::Arm { pid, scope, after } => {
                    let scope = scope.to_string();
                    deadlines.arm(request(pid, &scope, 0.0), Some(at(time + after))).expect("room");
                    model.insert((pid, scope), Some(time + after));
                }
                Step::Never { pid, scope } => {
                    let scope = scope.to_string();
                    deadlines.arm(request(pid, &scope, 0.0), None).expect("room");
                    model.insert((pid, scope), None);
                }
                Step::Release { pid, scope } => {
                    let scope = scope.to_string();
                    let known = deadlines.release(pid, &scope).is_some();
                    prop_assert_eq!(known, model.remove(&(pid, scope)).is_some());
                }
                Step::Forget { pid } => {
                    let before = model.len();
                    model.retain(|(owner, _), _| *owner != pid);
                    prop_assert_eq!(deadlines.release_all(pid).len(), before - model.len());
                }
                Step::Pass { time: passed } => {
                    time += passed;
                    let expired = deadlines.expired(at(time));
                    prop_assert!(expired.is_sorted_by_key(|timer| timer.at));
                    let mut expired: Vec<_> =
                        expired.into_iter().map(|timer| (timer.request.pid, timer.request.scope)).collect();
                    expired.sort();
                    let due = |due: &Option<u64>| due.is_some_and(|due| due <= time);
                    let expected: Vec<_> =
                        model.iter().filter(|(_, at)| due(at)).map(|(key, _)| key.clone()).collect();
                    model.retain(|_, at| !due(at));
                    prop_assert_eq!(expired, expected);
                }
            }
            prop_assert_eq!(deadlines.next_at(), model.values().flatten().min().map(|time| at(*time)));
            prop_assert_eq!(deadlines.len(), model.len());
            for pid in 1..4 {
                prop_assert_eq!(deadlines.has(pid), model.keys().any(|(owner, _)| *owner == pid));
                prop_assert_eq!(deadlines.of(pid).count(), model.keys().filter(|(owner, _)| *owner == pid).count());
            }
        }
    }
}
