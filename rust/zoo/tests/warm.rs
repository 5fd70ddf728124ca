//! Pools of warm workers: a zygote without an interpreter, with every way to fail.

mod support;

use std::ffi::CString;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ferroelastic_core::engine::{Engine, WarmPool};
use ferroelastic_core::published::Wake;
use ferroelastic_core::sys::procfs;
use ferroelastic_core::sys::spawn::{Command, Stdio};
use ferroelastic_core::sys::wait::ExitStatus;
use ferroelastic_core::warm::{WarmPhase, WarmSpec, WarmState};
use support::{Lines, PATIENCE, all_exits, best_engine, eventually, is_alive, zoo};

fn c(text: &str) -> CString {
    CString::new(text).expect("no NUL")
}

/// One test at a time: they look at all children of the process, and the processes of a dropped pool end a little later.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    eventually(|| warm_children().is_empty());
    alone
}

/// A pool of two children; `None` where the kernel has no pidfds.
fn pool(engine: &Engine, behaviour: &str) -> Option<WarmPool> {
    pool_within(engine, behaviour, PATIENCE)
}

fn pool_within(engine: &Engine, behaviour: &str, timeout: Duration) -> Option<WarmPool> {
    if !engine.support().pidfd {
        eprintln!("skipped: this kernel has no pidfds");
        return None;
    }
    let command = Command {
        argv: vec![c(env!("CARGO_BIN_EXE_zygote"))],
        stdout: Stdio::File("/dev/null".into()),
        stderr: Stdio::File("/dev/null".into()),
        ..Command::default()
    };
    let spec = WarmSpec { command, configuration: behaviour.as_bytes().to_vec(), children: 2, timeout };
    Some(engine.warm_pool(spec).expect("a pool"))
}

fn wait_for(pool: &WarmPool, fact: impl Fn(&WarmState) -> bool) -> WarmState {
    loop {
        let generation = pool.generation().expect("own process");
        let state = pool.state().expect("own process");
        if fact(&state) {
            return state;
        }
        let woken = pool.wait(generation, Some(PATIENCE), [None; 2]).expect("wait");
        assert_eq!(woken, Wake::Event, "nothing happened for {PATIENCE:?}: {state:?}");
    }
}

fn lost(pool: &WarmPool) -> WarmState {
    wait_for(pool, |state| matches!(state.phase, WarmPhase::Lost | WarmPhase::Refused))
}

/// The processes of a pool: children of this process that are named after the pool.
fn warm_children() -> Vec<i32> {
    let own = i32::try_from(std::process::id()).expect("a pid");
    let children = procfs::children(own).into_iter().filter_map(procfs::stat);
    children.filter(|stat| stat.parent == own && procfs::name(stat.pid) == "ferro-warm").map(|stat| stat.pid).collect()
}

fn command(words: &[&str], stdout: &Lines) -> Command {
    let argv = words.iter().map(|word| c(word)).collect();
    stdout.of(Command { argv, env: vec![c("A=1")], ..Command::default() })
}

#[test]
fn a_parked_child_becomes_a_supervised_worker_and_is_replaced() {
    let _alone = alone();
    let engine = best_engine();
    let Some(pool) = pool(&engine, "serve") else { return };
    let folder = tempfile::tempdir().expect("tempdir");
    let mut lines = Lines::new(folder.path(), "out");
    let ready = wait_for(&pool, |state| state.parked == 2);
    assert_eq!((ready.phase, ready.released), (WarmPhase::Ready, 0));
    let commands = (0..3).map(|_| command(&["/bin/sh", "-c", "exit 7", "7"], &lines)).collect();
    let group = engine.spawn_warm(commands, &pool).expect("spawn");
    assert_eq!(group.warm(), [0, 1], "the third is a new process");
    let exits = all_exits(&group);
    assert!(exits.iter().all(|exit| exit.status == ExitStatus::Exited(7)), "{exits:?}");
    for _ in group.warm() {
        assert_eq!(lines.next(), "/bin/sh -c exit 7 7 A=1");
    }
    assert_eq!(wait_for(&pool, |state| state.parked == 2).released, 2);
    assert!(pool.close(PATIENCE).expect("closed"));
    assert_eq!(engine.take_warnings().expect("own process"), Vec::<String>::new());
}

#[test]
fn a_released_worker_leads_its_session_and_shows_its_command() {
    let _alone = alone();
    let engine = best_engine();
    let Some(pool) = pool(&engine, "serve") else { return };
    wait_for(&pool, |state| state.parked == 2);
    let pids = warm_children();
    for pid in &pids {
        let stat = procfs::stat(*pid).expect("alive");
        assert_eq!((stat.session, stat.group), (*pid, *pid));
    }
    let folder = tempfile::tempdir().expect("tempdir");
    let mut lines = Lines::new(folder.path(), "out");
    let group =
        engine.spawn_warm(vec![command(&["/usr/bin/some-program", "show", "0"], &lines)], &pool).expect("spawn");
    assert_eq!(group.warm(), [0]);
    assert!(pids.contains(&group.pids()[0]));
    assert_eq!(lines.next(), "/usr/bin/some-program show 0 A=1");
    let shown = ["comm=some-program", "cmdline=/usr/bin/some-program show 0", "environ=A=1", "descriptors=3"];
    for expected in shown {
        assert_eq!(lines.next(), expected);
    }
    assert_eq!(all_exits(&group)[0].status, ExitStatus::Exited(0));
}

#[test]
fn a_suspended_child_is_passed_over_and_killed() {
    let _alone = alone();
    let engine = best_engine();
    let Some(pool) = pool(&engine, "serve") else { return };
    let zygote = wait_for(&pool, |state| state.parked == 2).zygote;
    let folder = tempfile::tempdir().expect("tempdir");
    let lines = Lines::new(folder.path(), "out");
    let children: Vec<i32> = warm_children().into_iter().filter(|pid| *pid != zygote).collect();
    for pid in &children {
        rustix::process::kill_process(
            rustix::process::Pid::from_raw(*pid).expect("a pid"),
            rustix::process::Signal::STOP,
        )
        .expect("stopped");
        eventually(|| procfs::stat(*pid).is_some_and(|stat| stat.state == 'T'));
    }
    let group = engine.spawn_warm(vec![lines.of(zoo(&["exit", "4"]))], &pool).expect("spawn");
    assert_eq!(group.warm(), [0; 0], "both are suspended");
    assert_eq!(all_exits(&group)[0].status, ExitStatus::Exited(4));
    eventually(|| !children.iter().any(|pid| is_alive(*pid)));
    wait_for(&pool, |state| state.parked == 2);
}

#[test]
fn every_failure_of_a_zygote_is_one_warning_with_its_reason() {
    let _alone = alone();
    let cases = [
        ("refuse", WarmPhase::Refused, "it does not want to"),
        ("import for ever", WarmPhase::Refused, "the imports have not ended within 0.3 s"),
        ("end", WarmPhase::Lost, "exited with code 3"),
        ("children end", WarmPhase::Refused, "3 processes of the zygote ended before they were used"),
    ];
    for (behaviour, phase, reason) in cases {
        let engine = best_engine();
        let Some(pool) = pool_within(&engine, behaviour, Duration::from_millis(300)) else { return };
        let state = lost(&pool);
        assert_eq!(state.phase, phase, "{behaviour}");
        assert!(state.reason.ends_with(reason), "{behaviour}: {}", state.reason);
        let warnings = engine.take_warnings().expect("own process");
        let given_up: Vec<_> =
            warnings.iter().filter(|text| text.starts_with("The zygote prepares no further workers: ")).collect();
        assert_eq!(given_up.len(), 1, "{behaviour}: {warnings:?}");
        assert!(given_up[0].ends_with(reason), "{behaviour}: {warnings:?}");
        assert!(pool.close(PATIENCE).expect("closed"));
    }
}

#[test]
fn a_shortage_of_processes_is_reported_and_the_zygote_stays() {
    let _alone = alone();
    let engine = best_engine();
    let Some(pool) = pool(&engine, "shortage") else { return };
    wait_for(&pool, |state| state.phase == WarmPhase::Ready);
    let mut warnings = Vec::new();
    let seen = std::cell::RefCell::new(&mut warnings);
    eventually(|| {
        seen.borrow_mut().extend(engine.take_warnings().expect("own process"));
        !seen.borrow().is_empty()
    });
    assert_eq!(warnings, ["The zygote cannot fork another worker (no room); 0 of 2 are parked"]);
    assert_eq!(pool.state().expect("own process").phase, WarmPhase::Ready);
}

#[test]
fn a_child_that_a_dying_zygote_has_not_reported_is_found_and_ended() {
    let _alone = alone();
    let engine = best_engine();
    let Some(pool) = pool(&engine, "die unreported") else { return };
    assert_eq!(lost(&pool).phase, WarmPhase::Lost);
    assert!(pool.close(PATIENCE).expect("closed"));
    assert_eq!(warm_children(), [0; 0], "neither alive nor a zombie");
}

#[test]
fn the_end_of_a_pool_and_of_an_engine_leave_no_process() {
    let _alone = alone();
    for close_pool in [true, false] {
        let engine = best_engine();
        let Some(pool) = pool(&engine, "serve") else { return };
        wait_for(&pool, |state| state.parked == 2);
        let pids = warm_children();
        assert_eq!(pids.len(), 3);
        if close_pool {
            drop(pool);
        } else {
            assert!(engine.close(PATIENCE).expect("closed"));
        }
        eventually(|| pids.iter().all(|pid| procfs::stat(*pid).is_none()));
    }
}
