//! A worker starts clean.

mod support;

use std::ffi::CString;

use ferroelastic_core::Error;
use ferroelastic_core::sys::spawn::{Command, Stdio};
use ferroelastic_core::sys::wait::ExitStatus;
use support::{Lines, all_exits, engines, is_alive, zoo};

fn c(text: &str) -> CString {
    CString::new(text).expect("no NUL")
}

#[test]
fn a_worker_has_its_own_session_an_empty_mask_default_dispositions_and_three_descriptors() {
    for engine in engines() {
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
}

#[test]
fn a_program_is_found_in_the_path_of_its_own_environment() {
    for engine in engines() {
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
}

#[test]
fn when_one_command_fails_none_is_left() {
    for engine in engines() {
        let folder = tempfile::tempdir().expect("tempdir");
        let mut lines = Lines::new(folder.path(), "pid");
        let tell_pid =
            Command { argv: vec![c("/bin/sh"), c("-c"), c("echo $$; exec sleep 1000")], ..Command::default() };
        let broken = Command { argv: vec![c("/etc/passwd")], ..Command::default() };
        let error = engine.spawn(vec![lines.of(tell_pid), broken]).expect_err("not executable");
        let Error::Spawn(error) = error else { panic!("{error}") };
        assert_eq!((error.index, error.stage), (1, "execve"));
        assert_eq!(error.source.raw_os_error(), Some(13));
        // The first may have been killed before it could speak.
        let group = engine.spawn(vec![lines.of(zoo(&["sleep"]))]).expect("spawn");
        let told = lines.next();
        if let Ok(pid) = told.parse() {
            assert!(!is_alive(pid));
        }
        drop(group);
    }
}

#[test]
fn each_stage_that_fails_is_named() {
    for engine in engines() {
        let cases = [
            (Command { cwd: Some(c("/nowhere")), ..zoo(&["exit", "0"]) }, "chdir", "/nowhere"),
            (Command { cpus: Some(vec![100_000]), ..zoo(&["exit", "0"]) }, "sched_setaffinity", "zoo"),
            (
                Command { stdout: Stdio::File("/nowhere/out".into()), ..zoo(&["exit", "0"]) },
                "open stdout",
                "/nowhere/out",
            ),
            (Command { stderr: Stdio::File("/".into()), ..zoo(&["exit", "0"]) }, "open stderr", "/"),
        ];
        for (command, stage, object) in cases {
            let error = engine.spawn(vec![command]).expect_err(stage);
            let Error::Spawn(error) = error else { panic!("{error}") };
            assert_eq!(error.stage, stage);
            assert!(error.object.ends_with(object), "{error}");
        }
    }
}
