//! Processes that have left the group of their worker are found, and those of others are not.

mod support;

use std::ffi::CString;
use std::path::PathBuf;

use ferroelastic_core::sys::cgroup;
use ferroelastic_core::sys::leftovers::{Found, Mark, Query, Session, find};
use ferroelastic_core::sys::spawn::Command;
use support::{Lines, all_exits, best_engine, engines, is_alive, zoo};

fn mark(token: &str) -> Mark {
    Mark { name: "FERRO_ZOO_RUN".into(), token: token.into() }
}

fn marked(mut command: Command, value: &str) -> Command {
    command.env.push(CString::new(format!("FERRO_ZOO_RUN={value}")).expect("no NUL"));
    command
}

fn pids(query: &Query<'_>) -> Vec<i32> {
    find(query).iter().map(|found| found.pid).collect()
}

fn nothing() -> Query<'static> {
    Query { mark: None, sessions: &[], cgroup: None, not_in_sessions: &[], spares_warm: false }
}

/// A helper in a session of its own, left by a worker that has ended.
fn escaped(command: impl Fn(Command) -> Command) -> (i32, i32) {
    let folder = tempfile::tempdir().expect("tempdir");
    let mut lines = Lines::new(folder.path(), "pid");
    let engine = best_engine();
    let group = engine.spawn(vec![command(lines.of(zoo(&["escape", "0"])))]).expect("spawn");
    let helper = lines.next().parse().expect("a pid");
    all_exits(&group);
    (group.pids()[0], helper)
}

fn end(pid: i32) {
    let started = ferroelastic_core::sys::procfs::stat(pid).expect("alive").started;
    assert!(!Found { pid, started: started + 1 }.signal(libc::SIGKILL), "a later process of the same number is spared");
    assert!(is_alive(pid));
    assert!(Found { pid, started }.signal(libc::SIGKILL));
}

#[test]
fn runs_nest_in_their_marks() {
    let (_, helper) = escaped(|command| marked(command, "outer:inner"));
    for token in ["outer", "inner"] {
        assert_eq!(pids(&Query { mark: Some(&mark(token)), ..nothing() }), [helper]);
    }
    for token in ["oute", "outer:inner", "r:i", ""] {
        assert!(pids(&Query { mark: Some(&mark(token)), ..nothing() }).is_empty(), "{token}");
    }
    end(helper);
}

#[test]
fn a_process_is_found_while_it_executes_a_program() {
    let engine = best_engine();
    let group = engine.spawn(vec![marked(zoo(&["executor"]), "executor")]).expect("spawn");
    for _ in 0..500 {
        assert_eq!(pids(&Query { mark: Some(&mark("executor")), ..nothing() }), group.pids());
    }
}

#[test]
fn the_session_of_the_agent_is_spared() {
    let (_, helper) = escaped(|command| marked(command, "run"));
    assert!(pids(&Query { mark: Some(&mark("run")), not_in_sessions: &[helper], ..nothing() }).is_empty());
    end(helper);
}

#[test]
fn a_session_is_known_by_its_leader_and_no_longer_when_the_number_is_somebody_elses() {
    let (worker, helper) = escaped(|command| command);
    let of = |leader, started| pids(&Query { sessions: &[Session { leader, pidfd: None, started }], ..nothing() });
    assert!(of(worker, None).is_empty(), "the helper has left it");
    let started = ferroelastic_core::sys::procfs::stat(helper).expect("alive").started;
    assert!(of(helper, None).is_empty(), "the leader lives, and nobody says that it is ours");
    assert!(of(helper, Some(started + 1)).is_empty(), "a later process of the same number");
    assert_eq!(of(helper, Some(started)), [helper]);
    end(helper);
}

#[test]
fn no_helper_leaves_a_cgroup() {
    let Ok(folder) = cgroup::create(&format!("ferro-zoo-{}", std::process::id())) else {
        eprintln!("no cgroup can be made here");
        return;
    };
    let outside: PathBuf = folder.parent().expect("a parent").into();
    for engine in engines() {
        engine.use_cgroup(Some(&folder)).expect("use");
        let lines_in = tempfile::tempdir().expect("tempdir");
        let mut lines = Lines::new(lines_in.path(), "pid");
        let group = engine.spawn(vec![lines.of(zoo(&["escape", "0"])), lines.of(zoo(&["exit", "3"]))]).expect("spawn");
        let helper: i32 = lines.next().parse().expect("a pid");
        let exits = all_exits(&group);
        assert_eq!(exits.len(), 2);
        let in_cgroup = cfg!(target_arch = "x86_64");
        let found = pids(&Query { cgroup: Some(&folder), ..nothing() });
        assert_eq!(found, if in_cgroup { vec![helper] } else { vec![] });
        end(helper);
    }
    // A cgroup inside it, and somebody who lives on.
    let inner = folder.join("inner");
    std::fs::create_dir(&inner).expect("an inner cgroup");
    let engine = best_engine();
    engine.use_cgroup(Some(&inner)).expect("use");
    let group = engine.spawn(vec![zoo(&["sleep"])]).expect("spawn");
    cgroup::remove(&folder).expect("remove");
    assert!(!folder.exists());
    assert!(is_alive(group.pids()[0]));
    if cfg!(target_arch = "x86_64") {
        assert!(cgroup::members(&outside).contains(&group.pids()[0]));
    }
    // Without it a worker is born outside.
    let another = engine.spawn(vec![zoo(&["exit", "3"])]).expect("spawn");
    assert_eq!(all_exits(&another).len(), 1);
}
