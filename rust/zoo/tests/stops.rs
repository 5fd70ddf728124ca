//! A stop ends when every process group is verified empty.

mod support;

use std::ffi::CString;
use std::sync::Arc;
use std::time::Duration;

use ferroelastic_core::Engine;
use ferroelastic_core::supervise::StopPlan;
use ferroelastic_core::sys::clock::Moment;
use ferroelastic_core::sys::procfs;
use ferroelastic_core::sys::spawn::Command;
use ferroelastic_core::sys::stop_file::StopFile;
use ferroelastic_core::sys::wait::ExitStatus;
use ferroelastic_core::vocabulary::SignalTarget;
use support::{Lines, PATIENCE, all_exits, eventually, is_alive, on_each_backend, plan, stopped, zoo};

const KILLED: ExitStatus = ExitStatus::Signalled { signal: 9, core_dumped: false };
const TERMINATED: ExitStatus = ExitStatus::Signalled { signal: 15, core_dumped: false };

on_each_backend!(the_first_failure_stops_the_peers_without_a_caller_in_wait);
fn the_first_failure_stops_the_peers_without_a_caller_in_wait(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let lines = Lines::new(folder.path(), "ready");
    let peer = lines.of(zoo(&["sleep"]));
    let group = engine.spawn(vec![peer.clone(), zoo(&["orphan", "9"]), peer]).expect("spawn");
    group.stop_on_failure(plan(PATIENCE)).expect("arm");
    let exits = all_exits(&group);
    let of = |index| exits.iter().find(|exit| exit.index == index).expect("ended");
    assert_eq!((of(1).status, of(1).stopped, of(1).order), (ExitStatus::Exited(9), false, 0));
    assert_eq!((of(0).status, of(0).stopped), (TERMINATED, true));
    assert_eq!((of(2).status, of(2).stopped), (TERMINATED, true));
    let report = stopped(&group);
    assert!(report.killed.is_empty() && report.survivors.is_empty(), "{report:?}");
}

on_each_backend!(a_failure_before_arming_counts_too);
fn a_failure_before_arming_counts_too(engine: &Engine) {
    let group = engine.spawn(vec![zoo(&["exit", "1"]), zoo(&["sleep"])]).expect("spawn");
    support::wait_for(&group, |group| (group.exits(0).ok()?.len() == 1).then_some(()));
    group.stop_on_failure(plan(PATIENCE)).expect("arm");
    assert_eq!(all_exits(&group)[1].status, TERMINATED);
}

on_each_backend!(workers_that_ignore_sigterm_are_killed_after_the_grace_and_not_before);
fn workers_that_ignore_sigterm_are_killed_after_the_grace_and_not_before(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let mut lines = Lines::new(folder.path(), "ready");
    let group = engine.spawn(vec![lines.of(zoo(&["deaf"])); 8]).expect("spawn");
    for _ in 0..8 {
        assert_eq!(lines.next(), "ready");
    }
    let grace = Duration::from_millis(200);
    group.stop(plan(grace)).expect("stop");
    let report = stopped(&group);
    assert_eq!(report.killed, (0..8).collect::<Vec<_>>());
    assert!(report.survivors.is_empty());
    assert!(report.elapsed >= grace);
    for exit in all_exits(&group) {
        assert_eq!((exit.status, exit.stopped), (KILLED, true));
    }
}

on_each_backend!(hurry_ends_the_grace);
fn hurry_ends_the_grace(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let mut lines = Lines::new(folder.path(), "ready");
    let group = engine.spawn(vec![lines.of(zoo(&["deaf"]))]).expect("spawn");
    assert_eq!(lines.next(), "ready");
    group.stop(plan(Duration::MAX)).expect("stop");
    group.end_grace().expect("hurry");
    assert_eq!(stopped(&group).killed, [0]);
    assert_eq!(all_exits(&group)[0].status, KILLED);
}

on_each_backend!(the_group_of_a_leader_that_is_already_dead_is_stopped);
fn the_group_of_a_leader_that_is_already_dead_is_stopped(engine: &Engine) {
    for (kind, killed) in [("orphan", vec![]), ("deaf-orphan", vec![0])] {
        let folder = tempfile::tempdir().expect("tempdir");
        let mut lines = Lines::new(folder.path(), "pid");
        let group = engine.spawn(vec![lines.of(zoo(&[kind, "0"]))]).expect("spawn");
        let orphan: i32 = lines.next().parse().expect("a pid");
        assert_eq!(all_exits(&group)[0].status, ExitStatus::Exited(0));
        assert!(is_alive(orphan));
        group.stop(plan(Duration::from_millis(200))).expect("stop");
        let report = stopped(&group);
        assert_eq!(report.killed, killed, "{kind}");
        assert!(report.survivors.is_empty());
        assert!(!is_alive(orphan));
    }
}

on_each_backend!(a_suspended_worker_takes_the_signal);
fn a_suspended_worker_takes_the_signal(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let mut lines = Lines::new(folder.path(), "ready");
    let group = engine.spawn(vec![lines.of(zoo(&["stop"]))]).expect("spawn");
    assert_eq!(lines.next(), "ready");
    let pid = group.pids()[0];
    eventually(|| procfs::stat(pid).expect("alive").state == 'T');
    group.stop(plan(PATIENCE)).expect("stop");
    assert!(stopped(&group).killed.is_empty());
    assert_eq!(all_exits(&group)[0].status, TERMINATED);
}

on_each_backend!(children_of_a_worker_may_be_signalled_after_it);
fn children_of_a_worker_may_be_signalled_after_it(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let mut lines = Lines::new(folder.path(), "pid");
    let group = engine.spawn(vec![lines.of(zoo(&["loader"]))]).expect("spawn");
    let child: i32 = lines.next().parse().expect("a pid");
    group.stop(StopPlan { target: SignalTarget::Leader, ..plan(PATIENCE) }).expect("stop");
    let report = stopped(&group);
    assert!(report.killed.is_empty() && report.survivors.is_empty(), "{report:?}");
    assert_eq!(all_exits(&group)[0].status, ExitStatus::Exited(0), "the child ran as long as its worker");
    assert!(!is_alive(child));
}

on_each_backend!(a_deaf_worker_is_killed_with_its_children);
fn a_deaf_worker_is_killed_with_its_children(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let mut lines = Lines::new(folder.path(), "ready");
    let group = engine.spawn(vec![lines.of(zoo(&["deaf"])), lines.of(zoo(&["deaf-orphan", "0"]))]).expect("spawn");
    let seen = [lines.next(), lines.next()];
    let orphan: i32 = seen.iter().find_map(|line| line.parse().ok()).expect("a pid");
    support::wait_for(&group, |group| (group.exits(0).ok()?.len() == 1).then_some(()));
    group.stop(StopPlan { target: SignalTarget::Leader, ..plan(Duration::from_millis(200)) }).expect("stop");
    assert_eq!(stopped(&group).killed, [0, 1]);
    assert!(!is_alive(orphan));
}

on_each_backend!(workers_read_the_deadline_before_the_signal);
fn workers_read_the_deadline_before_the_signal(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let mut lines = Lines::new(folder.path(), "ready");
    let file = Arc::new(StopFile::create().expect("a file"));
    let notice = folder.path().join("notice");
    let script = format!(
        "trap 'cat {} > {}; exit 0' TERM; echo ready; while :; do sleep 0.01; done",
        file.path().display(),
        notice.display()
    );
    let argv = ["/bin/sh", "-c", &script].map(|word| CString::new(word).expect("no NUL")).to_vec();
    let command = lines.of(Command { argv, ..Command::default() });
    let group = engine.start_group(vec![command], None, Some(Arc::clone(&file))).expect("spawn");
    assert_eq!(lines.next(), "ready");
    assert_eq!(std::fs::read_to_string(file.path()).expect("readable"), "");
    let before = Moment::now().monotonic_ns;
    group.stop(plan(PATIENCE)).expect("stop");
    stopped(&group);
    let text = std::fs::read_to_string(&notice).expect("the worker has read it");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("\"reason\": \"signal\", \"signal\": 15"), "{text}");
    let deadline_ns: u64 =
        text.trim_end().trim_end_matches('}').rsplit(' ').next().and_then(|ns| ns.parse().ok()).expect("a number");
    let patience_ns = u64::try_from(PATIENCE.as_nanos()).expect("small");
    assert!(deadline_ns >= before + patience_ns && deadline_ns <= Moment::now().monotonic_ns + patience_ns, "{text}");
    group.end_grace().expect("a stop that is over");
    assert_eq!(std::fs::read_to_string(file.path()).expect("readable"), text, "nothing is announced after the end");
}

on_each_backend!(a_deadline_that_moves_is_announced_again);
fn a_deadline_that_moves_is_announced_again(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let mut lines = Lines::new(folder.path(), "ready");
    let file = Arc::new(StopFile::create().expect("a file"));
    let deaf = lines.of(zoo(&["deaf"]));
    let group = engine.start_group(vec![deaf], None, Some(Arc::clone(&file))).expect("spawn");
    assert_eq!(lines.next(), "ready");
    group.stop(plan(Duration::MAX)).expect("stop");
    group.end_grace().expect("hurry");
    stopped(&group);
    let text = std::fs::read_to_string(file.path()).expect("readable");
    let (first, second) = text.split_once('\n').expect("two lines");
    assert!(first.ends_with("\"deadline_s\": null, \"deadline_monotonic_ns\": null}"), "{text}");
    assert!(!second.contains("null") && second.ends_with("}\n"), "{text}");
}

on_each_backend!(a_helper_in_a_session_of_its_own_does_not_count_as_a_survivor);
fn a_helper_in_a_session_of_its_own_does_not_count_as_a_survivor(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let mut lines = Lines::new(folder.path(), "pid");
    let group = engine.spawn(vec![lines.of(zoo(&["escape", "0"]))]).expect("spawn");
    let escaped: i32 = lines.next().parse().expect("a pid");
    all_exits(&group);
    group.stop(plan(PATIENCE)).expect("stop");
    assert!(stopped(&group).survivors.is_empty());
    assert!(is_alive(escaped));
    let pid = rustix::process::Pid::from_raw(escaped).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill");
}

on_each_backend!(a_helper_that_cleans_up_after_a_killed_worker_has_the_time_to);
fn a_helper_that_cleans_up_after_a_killed_worker_has_the_time_to(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let mut lines = Lines::new(folder.path(), "ready");
    let cleaned = folder.path().join("cleaned");
    let command = lines.of(zoo(&["cleaner", cleaned.to_str().expect("UTF-8")]));
    let group = engine.spawn(vec![command]).expect("spawn");
    assert_eq!(lines.next(), "ready");
    group.stop(plan(Duration::from_millis(50))).expect("stop");
    let report = stopped(&group);
    assert_eq!(report.killed, [0]);
    assert!(report.survivors.is_empty());
    assert!(cleaned.exists());
}

on_each_backend!(a_process_left_by_a_worker_may_finish_in_the_linger_time);
fn a_process_left_by_a_worker_may_finish_in_the_linger_time(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let finished = folder.path().join("finished");
    let group = engine.spawn(vec![zoo(&["finisher", finished.to_str().expect("UTF-8")])]).expect("spawn");
    assert_eq!(all_exits(&group)[0].status, ExitStatus::Exited(0));
    group.stop(StopPlan { linger: PATIENCE, ..plan(Duration::ZERO) }).expect("stop");
    let report = stopped(&group);
    assert!(report.killed.is_empty() && report.overdue.is_empty(), "{report:?}");
    assert!(finished.exists());
}

on_each_backend!(a_process_that_outlives_the_linger_time_is_named_and_ended);
fn a_process_that_outlives_the_linger_time_is_named_and_ended(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let mut lines = Lines::new(folder.path(), "pid");
    let group = engine.spawn(vec![lines.of(zoo(&["orphan", "0"]))]).expect("spawn");
    let orphan: i32 = lines.next().parse().expect("a pid");
    assert_eq!(all_exits(&group)[0].status, ExitStatus::Exited(0));
    let linger = Duration::from_millis(100);
    group.stop(StopPlan { linger, ..plan(PATIENCE) }).expect("stop");
    let report = stopped(&group);
    assert!(report.elapsed >= linger);
    let [overdue] = report.overdue.as_slice() else { panic!("{report:?}") };
    assert_eq!((overdue.index, overdue.pid), (0, orphan));
    assert!(overdue.command.ends_with("zoo orphan 0"), "{overdue:?}");
    assert!(!is_alive(orphan));
}

on_each_backend!(closing_the_engine_ends_all_workers);
fn closing_the_engine_ends_all_workers(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let mut lines = Lines::new(folder.path(), "ready");
    let group = engine.spawn(vec![lines.of(zoo(&["deaf"])); 3]).expect("spawn");
    for _ in 0..3 {
        lines.next();
    }
    assert!(engine.close(PATIENCE).expect("own process"));
    for pid in group.pids() {
        assert!(!is_alive(*pid));
    }
    assert!(group.wait(u64::MAX, Some(PATIENCE), [None; 2]).is_err(), "the engine is closed");
    assert!(engine.spawn(vec![zoo(&["exit", "0"])]).is_err());
}
