//! The decisions of a group under a manual clock: no process, no waiting.

#![expect(unused_must_use, reason = "a test reads the actions that it is about")]

use std::time::{Duration, Instant};

use ferroelastic_core::supervise::{Exit, GroupAction, GroupEvent, GroupState, StopNotice, StopPlan};
use ferroelastic_core::sys::clock::Moment;
use ferroelastic_core::sys::wait::{ExitStatus, Usage};
use ferroelastic_core::vocabulary::{SignalTarget, StopReason};
use proptest::prelude::*;

const PLAN: StopPlan = StopPlan {
    linger: Duration::ZERO,
    signal: 15,
    target: SignalTarget::Group,
    grace: Duration::from_secs(30),
    kill_wait: Duration::from_secs(5),
    reason: StopReason::Signal,
};
/// From the SIGKILL of the leaders to that of their groups.
const GROUP_KILL_DELAY: Duration = Duration::from_millis(100);

fn ended(index: usize, status: ExitStatus) -> Exit {
    let at = Moment { instant: Instant::now(), monotonic_ns: 0, realtime_ns: 0 };
    Exit::new(index, 100 + i32::try_from(index).expect("small"), status, Usage::default(), at)
}

fn is_finished(actions: &[GroupAction]) -> bool {
    actions.iter().any(|action| matches!(action, GroupAction::Finished(_)))
}

#[test]
fn a_failure_without_orders_changes_nothing() {
    let mut group = GroupState::new(2);
    let now = Instant::now();
    assert_eq!(group.step(now, GroupEvent::Ended(vec![ended(0, ExitStatus::Exited(1))])), []);
    assert_eq!(group.next_tick(), None);
}

#[test]
fn workers_that_died_together_do_not_count_as_stopped() {
    let mut group = GroupState::new(3);
    let now = Instant::now();
    group.step(now, GroupEvent::StopOnFailure(PLAN));
    let actions =
        group.step(now, GroupEvent::Ended(vec![ended(2, ExitStatus::Exited(1)), ended(0, ExitStatus::Exited(1))]));
    assert!(actions.contains(&GroupAction::Terminate { index: 1, signal: 15 }));
    group.step(now, GroupEvent::Ended(vec![ended(1, ExitStatus::Signalled { signal: 15, core_dumped: false })]));
    let stopped: Vec<(usize, bool)> = group.exits().iter().map(|exit| (exit.index, exit.stopped)).collect();
    assert_eq!(stopped, [(2, false), (0, false), (1, true)]);
}

#[test]
fn a_sigkill_that_we_did_not_send_is_a_failure_of_its_own() {
    let killed = ExitStatus::Signalled { signal: 9, core_dumped: false };
    let start = Instant::now();
    let mut group = GroupState::new(3);
    group.step(start, GroupEvent::StopOnFailure(PLAN));
    group.step(start, GroupEvent::Ended(vec![ended(0, ExitStatus::Exited(1))]));
    group.step(start, GroupEvent::Ended(vec![ended(1, killed)]));
    group.step(start + PLAN.grace, GroupEvent::Tick);
    group.step(start + PLAN.grace, GroupEvent::Ended(vec![ended(2, killed)]));
    let stopped: Vec<bool> = group.exits().iter().map(|exit| exit.stopped).collect();
    assert_eq!(stopped, [false, false, true]);
}

#[test]
fn success_and_a_lost_status_are_no_failures() {
    let mut group = GroupState::new(3);
    let now = Instant::now();
    group.step(now, GroupEvent::StopOnFailure(PLAN));
    let both = vec![ended(0, ExitStatus::Exited(0)), ended(1, ExitStatus::Unknown)];
    assert_eq!(group.step(now, GroupEvent::Ended(both)), []);
}

#[test]
fn a_worker_that_fails_for_another_reason_is_killed_and_its_exit_is_the_failure() {
    let mut group = GroupState::new(2);
    let now = Instant::now();
    group.step(now, GroupEvent::StopOnFailure(PLAN));
    assert_eq!(group.step(now, GroupEvent::Fail { index: 1 }), [GroupAction::KillLeader { index: 1 }]);
    assert!(!group.is_stopping());
    let killed = ExitStatus::Signalled { signal: 9, core_dumped: false };
    group.step(now, GroupEvent::Ended(vec![ended(1, killed)]));
    assert!(group.is_stopping() && group.has_failed(1) && !group.exits()[0].stopped);
    assert_eq!(group.step(now, GroupEvent::Fail { index: 0 }), [], "its stop goes on");
}

#[test]
fn a_worker_that_has_ended_with_success_can_still_fail() {
    let mut group = GroupState::new(2);
    let now = Instant::now();
    group.step(now, GroupEvent::StopOnFailure(PLAN));
    group.step(now, GroupEvent::Ended(vec![ended(0, ExitStatus::Exited(0))]));
    let actions = group.step(now, GroupEvent::Fail { index: 0 });
    assert!(actions.iter().any(|action| matches!(action, GroupAction::Terminate { index: 1, .. })), "{actions:?}");
    let mut alone = GroupState::new(1);
    alone.step(now, GroupEvent::Ended(vec![ended(0, ExitStatus::Exited(0))]));
    assert_eq!(alone.step(now, GroupEvent::Fail { index: 0 }), [], "without a plan nothing is stopped");
}

#[test]
fn an_exit_reported_twice_counts_once() {
    let mut group = GroupState::new(1);
    let now = Instant::now();
    group.step(now, GroupEvent::Ended(vec![ended(0, ExitStatus::Exited(0)), ended(0, ExitStatus::Exited(1))]));
    assert_eq!(group.exits().len(), 1);
}

#[test]
fn stopping_a_group_that_is_gone_ends_at_once() {
    let mut group = GroupState::new(1);
    let now = Instant::now();
    group.step(now, GroupEvent::Ended(vec![ended(0, ExitStatus::Exited(0))]));
    assert!(group.step(now, GroupEvent::Stop(PLAN)).contains(&GroupAction::CheckMembers { index: 0 }));
    assert!(is_finished(&group.step(now, GroupEvent::MembersChecked { index: 0, has_members: false })));
    assert_eq!(group.step(now, GroupEvent::Stop(PLAN)), [], "a stop that is over stays over");
}

#[test]
fn without_grace_sigkill_follows_at_the_first_tick() {
    let mut group = GroupState::new(1);
    let now = Instant::now();
    group.step(now, GroupEvent::Stop(StopPlan { grace: Duration::ZERO, ..PLAN }));
    assert_eq!(group.step(now, GroupEvent::Tick), [GroupAction::KillLeader { index: 0 }]);
}

#[test]
fn the_group_of_a_killed_leader_has_a_moment_to_clean_up() {
    let mut group = GroupState::new(2);
    let start = Instant::now();
    group.step(start, GroupEvent::Ended(vec![ended(1, ExitStatus::Exited(0))]));
    group.step(start, GroupEvent::Stop(PLAN));
    group.step(start, GroupEvent::MembersChecked { index: 1, has_members: true });
    let killed = start + PLAN.grace;
    let actions = group.step(killed, GroupEvent::Tick);
    assert!(
        actions.starts_with(&[GroupAction::KillLeader { index: 0 }, GroupAction::Kill { index: 1 }]),
        "{actions:?}"
    );
    let actions =
        group.step(killed, GroupEvent::Ended(vec![ended(0, ExitStatus::Signalled { signal: 9, core_dumped: false })]));
    assert_eq!(actions, [GroupAction::CheckMembers { index: 0 }]);
    assert_eq!(group.step(killed, GroupEvent::MembersChecked { index: 0, has_members: true }), []);
    assert!(group.next_tick().is_some_and(|due| due <= killed + GROUP_KILL_DELAY));
    let before = group.step(killed + Duration::from_millis(99), GroupEvent::Tick);
    assert!(!before.contains(&GroupAction::Kill { index: 0 }), "{before:?}");
    assert!(group.step(killed + GROUP_KILL_DELAY, GroupEvent::Tick).contains(&GroupAction::Kill { index: 0 }));
}

#[test]
fn a_stop_without_time_to_kill_spares_no_group() {
    let mut group = GroupState::new(1);
    let now = Instant::now();
    let plan = StopPlan { signal: libc::SIGKILL, kill_wait: Duration::ZERO, ..PLAN };
    assert!(group.step(now, GroupEvent::Stop(plan)).contains(&GroupAction::Kill { index: 0 }));
}

#[test]
fn no_process_is_signalled_in_the_linger_time() {
    let plan = StopPlan { linger: Duration::from_secs(7), ..PLAN };
    let start = Instant::now();
    let mut group = GroupState::new(2);
    group.step(start, GroupEvent::Ended(vec![ended(0, ExitStatus::Exited(0)), ended(1, ExitStatus::Exited(0))]));
    let actions = group.step(start, GroupEvent::Stop(plan));
    assert_eq!(actions, [GroupAction::CheckMembers { index: 0 }, GroupAction::CheckMembers { index: 1 }]);
    group.step(start, GroupEvent::MembersChecked { index: 0, has_members: false });
    group.step(start, GroupEvent::MembersChecked { index: 1, has_members: true });
    assert_eq!(group.step(start, GroupEvent::Stop(PLAN)), [], "another stop does not shorten it");
    let end = start + plan.linger;
    let actions = group.step(end, GroupEvent::Tick);
    assert!(actions.starts_with(&[GroupAction::Overdue { index: 1 }, GroupAction::Terminate { index: 1, signal: 15 }]));
    group.step(end, GroupEvent::MembersChecked { index: 1, has_members: true });
    let actions = group.step(end + PLAN.grace, GroupEvent::Tick);
    assert!(actions.contains(&GroupAction::Kill { index: 1 }), "{actions:?}");
}

#[test]
fn hurry_ends_the_linger_time() {
    let start = Instant::now();
    let mut group = GroupState::new(1);
    group.step(start, GroupEvent::Ended(vec![ended(0, ExitStatus::Exited(0))]));
    group.step(start, GroupEvent::Stop(StopPlan { linger: Duration::MAX, ..PLAN }));
    group.step(start, GroupEvent::MembersChecked { index: 0, has_members: true });
    assert_eq!(group.step(start, GroupEvent::EndGrace), [GroupAction::Kill { index: 0 }]);
}

#[test]
fn an_endless_grace_has_no_deadline() {
    let mut group = GroupState::new(1);
    let now = Instant::now();
    group.step(now, GroupEvent::Stop(StopPlan { grace: Duration::MAX, ..PLAN }));
    assert_eq!(group.next_tick(), None);
    assert_eq!(group.step(now, GroupEvent::EndGrace), [GroupAction::KillLeader { index: 0 }]);
}

#[test]
fn survivors_of_the_last_deadline_are_named() {
    let mut group = GroupState::new(2);
    let start = Instant::now();
    group.step(start, GroupEvent::Stop(PLAN));
    group.step(start, GroupEvent::Ended(vec![ended(0, ExitStatus::Exited(0))]));
    group.step(start, GroupEvent::MembersChecked { index: 0, has_members: false });
    assert_eq!(group.step(start + PLAN.grace, GroupEvent::Tick), [GroupAction::KillLeader { index: 1 }]);
    assert_eq!(group.step(start + PLAN.grace + GROUP_KILL_DELAY, GroupEvent::Tick), [GroupAction::Kill { index: 1 }]);
    let actions = group.step(start + PLAN.grace + PLAN.kill_wait, GroupEvent::Tick);
    let [GroupAction::Finished(stopped)] = actions.as_slice() else { panic!("{actions:?}") };
    assert_eq!((stopped.killed.as_slice(), stopped.unfinished.as_slice()), ([1].as_slice(), [1].as_slice()));
    assert_eq!(stopped.elapsed, PLAN.grace + PLAN.kill_wait);
}

#[test]
fn the_children_of_a_leader_are_signalled_after_its_end() {
    let start = Instant::now();
    let plan = StopPlan { signal: 2, target: SignalTarget::Leader, ..PLAN };
    let mut group = GroupState::new(3);
    group.step(start, GroupEvent::Ended(vec![ended(2, ExitStatus::Exited(0))]));
    let actions = group.step(start, GroupEvent::Stop(plan));
    let asked = [
        GroupAction::TerminateLeader { index: 0, signal: 2 },
        GroupAction::TerminateLeader { index: 1, signal: 2 },
        GroupAction::Terminate { index: 2, signal: 2 },
    ];
    assert!(actions.starts_with(&asked), "{actions:?}");
    let actions = group.step(start, GroupEvent::Ended(vec![ended(0, ExitStatus::Exited(0))]));
    assert!(actions.contains(&GroupAction::Terminate { index: 0, signal: 15 }), "{actions:?}");
    group.step(start, GroupEvent::MembersChecked { index: 0, has_members: true });
    let actions = group.step(start + plan.grace, GroupEvent::Tick);
    assert!(actions.contains(&GroupAction::Kill { index: 0 }), "{actions:?}");
    assert!(actions.contains(&GroupAction::KillLeader { index: 1 }), "{actions:?}");
    let killed = ended(1, ExitStatus::Signalled { signal: 9, core_dumped: false });
    let actions = group.step(start + plan.grace, GroupEvent::Ended(vec![killed]));
    assert_eq!(actions, [GroupAction::CheckMembers { index: 1 }], "the group is killed soon");
}

#[test]
fn the_notice_has_the_time_of_sigkill() {
    let start = Instant::now();
    let notice = |kill_at| Some(StopNotice { reason: PLAN.reason, signal: PLAN.signal, kill_at });
    let mut group = GroupState::new(1);
    assert_eq!(group.notice(), None);
    group.step(start, GroupEvent::Stop(StopPlan { linger: Duration::from_secs(1), ..PLAN }));
    assert_eq!(group.notice(), None, "no signal was sent yet");
    let signalled = start + Duration::from_secs(1);
    group.step(signalled, GroupEvent::Tick);
    assert_eq!(group.notice(), notice(Some(signalled + PLAN.grace)));
    group.step(signalled, GroupEvent::Stop(StopPlan { grace: Duration::ZERO, ..PLAN }));
    assert_eq!(group.notice(), notice(Some(signalled + PLAN.grace)), "a second stop changes nothing");
    let hurried = signalled + Duration::from_secs(2);
    group.step(hurried, GroupEvent::EndGrace);
    assert_eq!(group.notice(), notice(Some(hurried)));
    group.step(hurried + PLAN.kill_wait, GroupEvent::Tick);
    assert_eq!(group.notice(), notice(Some(hurried)));

    let mut group = GroupState::new(1);
    group.step(start, GroupEvent::Stop(StopPlan { grace: Duration::MAX, ..PLAN }));
    assert_eq!(group.notice(), notice(None));
    let mut group = GroupState::new(1);
    group.step(start, GroupEvent::Stop(PLAN));
    group.step(start + PLAN.grace + Duration::from_secs(1), GroupEvent::Tick);
    assert_eq!(group.notice(), notice(Some(start + PLAN.grace)), "a late SIGKILL does not move the deadline");
}

/// A worker as the simulation plays it: when it obeys, when its orphans go, whether SIGKILL helps. Milliseconds.
#[derive(Clone, Debug)]
struct Actor {
    obeys_after: Option<u64>,
    orphans_for: u64,
    dead_already: bool,
    unkillable: bool,
}

fn actor() -> impl Strategy<Value = Actor> {
    (prop::option::of(0u64..40_000), 0u64..200, any::<bool>(), prop::bool::weighted(0.1)).prop_map(
        |(obeys_after, orphans_for, dead_already, unkillable)| Actor {
            obeys_after,
            orphans_for,
            dead_already,
            unkillable,
        },
    )
}

proptest! {
    /// Whatever the workers do: nobody is asked in the linger time, all that are left are asked then, none is killed before the grace is
    /// over, no group before its leader, and the stop ends exactly when the last group is empty or at its last deadline.
    #[test]
    fn a_stop_always_ends_and_never_kills_early(
        actors in prop::collection::vec(actor(), 1..6),
        linger in prop::sample::select(vec![0u64, 2_000]),
        target in prop::sample::select(SignalTarget::ALL.to_vec()),
    ) {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let (grace_over, last) = (linger + 30_000, linger + 35_000);
        let mut group = GroupState::new(actors.len());
        let dead: Vec<Exit> = (0..actors.len()).filter(|index| actors[*index].dead_already).map(|index| ended(index, ExitStatus::Exited(0))).collect();
        group.step(start, GroupEvent::Ended(dead));
        let mut leader_gone: Vec<Option<u64>> = actors.iter().map(|actor| actor.dead_already.then_some(0)).collect();
        let mut leader_killed_at: Vec<Option<u64>> = vec![None; actors.len()];
        let mut killed_at: Vec<Option<u64>> = vec![None; actors.len()];
        let mut empty: Vec<bool> = vec![false; actors.len()];
        let mut queue = group.step(start, GroupEvent::Stop(StopPlan { linger: Duration::from_millis(linger), target, ..PLAN }));
        let mut asked = vec![0; actors.len()];
        let mut orphans_asked = vec![0; actors.len()];
        let mut finished = None;
        for now in 0u64..=40_000 {
            loop {
                while let Some(action) = queue.pop() {
                    match action {
                        GroupAction::Overdue { index } => {
                            prop_assert_eq!(now, linger);
                            prop_assert!(!empty[index]);
                        }
                        GroupAction::TerminateLeader { index, signal } => {
                            prop_assert_eq!((signal, now, target), (15, linger, SignalTarget::Leader));
                            prop_assert!(leader_gone[index].is_none());
                            asked[index] += 1;
                        }
                        GroupAction::Terminate { index, signal } if asked[index] == 1 => {
                            prop_assert_eq!((signal, target), (15, SignalTarget::Leader));
                            prop_assert!(leader_gone[index] == Some(now) && now < grace_over);
                            orphans_asked[index] += 1;
                        }
                        GroupAction::Terminate { index, signal } => {
                            prop_assert_eq!((signal, now), (15, linger));
                            prop_assert!(target == SignalTarget::Group || leader_gone[index].is_some());
                            asked[index] += 1;
                        }
                        GroupAction::KillLeader { index } => {
                            prop_assert_eq!(now, grace_over);
                            leader_killed_at[index] = Some(now);
                        }
                        GroupAction::Kill { index } => {
                            let earliest = leader_killed_at[index].map_or(grace_over, |at| at + 100);
                            prop_assert!(now >= earliest, "killed at {} ms", now);
                            killed_at[index].get_or_insert(now);
                        }
                        GroupAction::CheckMembers { index } => {
                            let gone = leader_gone[index].expect("only orphaned groups are looked at");
                            let killed = killed_at[index].is_some() && !actors[index].unkillable;
                            let has_members = now < gone + actors[index].orphans_for && !killed;
                            empty[index] |= !has_members;
                            queue.extend(group.step(at(now), GroupEvent::MembersChecked { index, has_members }));
                        }
                        GroupAction::Finished(stopped) => finished = Some((now, stopped)),
                    }
                }
                let mut news = Vec::new();
                for (index, actor) in actors.iter().enumerate() {
                    let obeyed = actor.obeys_after.is_some_and(|ms| ms <= now);
                    let killed = (leader_killed_at[index].or(killed_at[index])).is_some() && !actor.unkillable;
                    if leader_gone[index].is_none() && (obeyed || killed) {
                        leader_gone[index] = Some(now);
                        news.push(ended(index, ExitStatus::Exited(0)));
                    }
                }
                if !news.is_empty() {
                    queue.extend(group.step(at(now), GroupEvent::Ended(news)));
                }
                if group.next_tick().is_some_and(|due| due <= at(now)) {
                    queue.extend(group.step(at(now), GroupEvent::Tick));
                }
                if queue.is_empty() {
                    break;
                }
            }
            if finished.is_some() {
                break;
            }
        }
        let (now, stopped) = finished.expect("every stop ends");
        prop_assert!(asked.iter().chain(&orphans_asked).all(|times| *times <= 1));
        if linger == 0 {
            prop_assert_eq!(asked, vec![1; actors.len()]);
        }
        prop_assert!(now <= last);
        let expected: Vec<usize> = (0..actors.len())
            .filter(|index| {
                let actor = &actors[*index];
                let gone = leader_gone[*index].map(|gone| if actor.unkillable || killed_at[*index].is_none() { gone + actor.orphans_for } else { gone });
                // The last look may lie up to the longest pause before the deadline.
                gone.is_none_or(|gone| gone > last)
            })
            .collect();
        for index in expected {
            prop_assert!(stopped.unfinished.contains(&index));
        }
        if now < last {
            prop_assert!(stopped.unfinished.is_empty());
        }
        prop_assert_eq!(group.next_tick(), None);
    }
}
