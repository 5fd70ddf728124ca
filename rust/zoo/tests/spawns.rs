//! A worker starts clean.

mod support;

use std::ffi::CString;

use ferroelastic_core::Engine;
use ferroelastic_core::Error;
use ferroelastic_core::sys::leftovers::{Mark, Query, find};
use ferroelastic_core::sys::spawn::{Command, Stdio};
use ferroelastic_core::sys::wait::ExitStatus;
use support::{all_exits, on_each_backend, zoo};

fn c(text: &str) -> CString {
    CString::new(text).expect("no NUL")
}

on_each_backend!(a_worker_has_its_own_session_an_empty_mask_default_dispositions_and_three_descriptors);
fn a_worker_has_its_own_session_an_empty_mask_default_dispositions_and_three_descriptors(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let path = folder.path().join("facts");
    let mut command = zoo(&["facts"]);
    command.stdout = Stdio::File(path.clone());
    command.cpus = Some(vec![0]);
    let group = engine.spawn(vec![command]).expect("spawn");
    assert_eq!(all_exits(&group)[0].status, ExitStatus::Exited(0));
    let facts = std::fs::read_to_string(path).expect("facts");
    let pid = group.pids()[0];
    let agent = std::process::id();
    assert!(facts.contains(&format!("pid={pid} group={pid} session={pid} parent={agent}\n")), "{facts}");
    assert!(facts.contains("death_signal=9\n"), "{facts}");
    assert!(facts.contains("SigBlk=0000000000000000\n"), "{facts}");
    // Rust's runtime ignores SIGPIPE in the worker itself.
    assert!(facts.contains("SigIgn=0000000000001000\n"), "{facts}");
    assert!(facts.contains("Cpus_allowed_list=0\n"), "{facts}");
    // 3 is the directory that lists them.
    assert!(facts.contains("fds=0,1,2,3\n"), "{facts}");
}

on_each_backend!(a_program_is_found_in_the_path_of_its_own_environment);
fn a_program_is_found_in_the_path_of_its_own_environment(engine: &Engine) {
    let mut command = Command {
        argv: vec![c("sh"), c("-c"), c("exit 5")],
        env: vec![c("PATH=/nowhere:/etc/passwd:/usr/bin:/bin")],
        ..Command::default()
    };
    let group = engine.spawn(vec![command.clone()]).expect("spawn");
    assert_eq!(all_exits(&group)[0].status, ExitStatus::Exited(5));
    command.env = vec![c("PATH=/nowhere")];
    let error = engine.spawn(vec![command]).expect_err("not found");
    assert_eq!(error.to_string(), "failed to start worker 0: execve sh: no such file or directory");
}

on_each_backend!(when_a_command_fails_the_workers_before_it_are_killed);
fn when_a_command_fails_the_workers_before_it_are_killed(engine: &Engine) {
    // The mark finds a worker that had no time to say its pid. Tests of other backends run in the same process.
    let mark = Mark { name: "FERRO_ZOO_SPAWN".into(), token: format!("{:?}", std::thread::current().id()) };
    let marked = || Command { env: vec![c(&format!("{}={}", mark.name, mark.token))], ..zoo(&["sleep"]) };
    let workers =
        || find(&Query { mark: Some(&mark), sessions: &[], cgroup: None, not_in_sessions: &[], spares_warm: false });
    let broken = Command { argv: vec![c("/etc/passwd")], ..Command::default() };
    let error = engine.spawn(vec![marked(), broken]).expect_err("not executable");
    let Error::Spawn(error) = error else { panic!("{error}") };
    assert_eq!((error.index, error.stage), (1, "execve"));
    assert_eq!(error.source.raw_os_error(), Some(13));
    assert!(workers().is_empty());
    // The same worker is found when nothing fails.
    let group = engine.spawn(vec![marked()]).expect("spawn");
    let found: Vec<_> = workers().iter().map(|found| found.pid).collect();
    assert_eq!(found, group.pids());
}

on_each_backend!(each_stage_that_fails_is_named);
fn each_stage_that_fails_is_named(engine: &Engine) {
    let cases = [
        (Command { cwd: Some(c("/nowhere")), ..zoo(&["exit", "0"]) }, "chdir", "/nowhere"),
        (Command { cpus: Some(vec![100_000]), ..zoo(&["exit", "0"]) }, "sched_setaffinity", "zoo"),
        (Command { stdout: Stdio::File("/nowhere/out".into()), ..zoo(&["exit", "0"]) }, "open stdout", "/nowhere/out"),
        (Command { stderr: Stdio::File("/".into()), ..zoo(&["exit", "0"]) }, "open stderr", "/"),
    ];
    for (command, stage, object) in cases {
        let error = engine.spawn(vec![command]).expect_err(stage);
        let Error::Spawn(error) = error else { panic!("{error}") };
        assert_eq!(error.stage, stage);
        assert!(error.object.ends_with(object), "{error}");
    }
}
