//! Every exit is noticed, exactly, in order.

mod support;

use ferroelastic_core::Engine;
use ferroelastic_core::sys::wait::ExitStatus;
use support::{Lines, PATIENCE, all_exits, on_each_backend, plan, stopped, wait_for, zoo};

on_each_backend!(exit_codes_0_to_255_are_reported_exactly);
fn exit_codes_0_to_255_are_reported_exactly(engine: &Engine) {
    for half in [0..=127u8, 128..=255u8] {
        let codes: Vec<u8> = half.collect();
        let commands = codes.iter().map(|code| zoo(&["exit", &code.to_string()])).collect();
        let group = engine.spawn(commands).expect("spawn");
        let exits = all_exits(&group);
        for exit in &exits {
            assert_eq!(exit.status, ExitStatus::Exited(codes[exit.index]));
            assert_eq!(exit.pid, group.pids()[exit.index]);
            assert!(!exit.stopped);
        }
        let orders: Vec<usize> = exits.iter().map(|exit| exit.order).collect();
        assert_eq!(orders, (0..codes.len()).collect::<Vec<_>>());
    }
}

on_each_backend!(every_fatal_signal_is_reported_exactly);
fn every_fatal_signal_is_reported_exactly(engine: &Engine) {
    // All signals whose default disposition ends the process.
    let fatal: Vec<i32> = (1..=31).filter(|signal| ![17, 18, 19, 20, 21, 22, 23, 28].contains(signal)).collect();
    let commands = fatal.iter().map(|signal| zoo(&["signal", &signal.to_string()])).collect();
    let group = engine.spawn(commands).expect("spawn");
    for exit in all_exits(&group) {
        let signal = fatal[exit.index];
        assert_eq!(exit.status, ExitStatus::Signalled { signal, core_dumped: false });
    }
}

on_each_backend!(workers_that_die_in_the_same_millisecond_are_all_seen);
fn workers_that_die_in_the_same_millisecond_are_all_seen(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let at = (now.tv_sec + 1) * 1_000_000_000 + now.tv_nsec;
    let mut lines = Lines::new(folder.path(), "ready");
    let command = lines.of(zoo(&["exit-at", &at.to_string(), "7"]));
    let group = engine.spawn(vec![command; 64]).expect("spawn");
    group.stop_on_failure(plan(PATIENCE)).expect("arm");
    for _ in 0..64 {
        assert_eq!(lines.next(), "ready");
    }
    let exits = all_exits(&group);
    assert_eq!((exits[0].status, exits[0].stopped), (ExitStatus::Exited(7), false));
    for exit in &exits {
        let by_itself = exit.status == ExitStatus::Exited(7);
        let by_the_engine = exit.stopped && exit.status == ExitStatus::Signalled { signal: 15, core_dumped: false };
        assert!(by_itself || by_the_engine, "{exit:?}");
    }
    let mut indexes: Vec<usize> = exits.iter().map(|exit| exit.index).collect();
    indexes.sort_unstable();
    assert_eq!(indexes, (0..64).collect::<Vec<_>>());
    assert!(exits.is_sorted_by_key(|exit| exit.at.monotonic_ns));
    assert!(stopped(&group).survivors.is_empty());
}

on_each_backend!(resources_come_from_the_kernels_accounting);
fn resources_come_from_the_kernels_accounting(engine: &Engine) {
    let mut busy = zoo(&["flood", "200000", "100"]);
    busy.stdout = ferroelastic_core::sys::spawn::Stdio::File("/dev/null".into());
    let group = engine.spawn(vec![busy]).expect("spawn");
    let exit = &all_exits(&group)[0];
    assert!(!exit.usage.user_time.is_zero());
    assert!(exit.usage.max_rss_bytes > 100_000);
}

on_each_backend!(an_exit_is_seen_while_another_group_runs_on);
fn an_exit_is_seen_while_another_group_runs_on(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let mut lines = Lines::new(folder.path(), "ready");
    let sleeper = engine.spawn(vec![lines.of(zoo(&["sleep"]))]).expect("spawn");
    let short = engine.spawn(vec![zoo(&["exit", "3"])]).expect("spawn");
    assert_eq!(all_exits(&short)[0].status, ExitStatus::Exited(3));
    assert_eq!(lines.next(), "ready");
    assert!(sleeper.exits(0).expect("own process").is_empty());
    sleeper.stop(plan(PATIENCE)).expect("stop");
    wait_for(&sleeper, |group| group.stop_report().expect("own process"));
}
