//! Who misses a deadline is signalled, on time, and nobody else is.

#[path = "support/noise.rs"]
mod noise;
mod support;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ferroelastic_core::Engine;
use ferroelastic_core::engine::{Group, Watchdog};
use ferroelastic_core::sys::beats::BeatSlot;
use ferroelastic_core::sys::spawn::Command;
use ferroelastic_core::sys::wait::ExitStatus;
use ferroelastic_core::watchdog::{Config, Expiry, ExpiryOutcome, WorkerProcess};
use noise::Noise;
use support::{Lines, PATIENCE, all_exits, is_alive, on_each_backend, plan, zoo};

const KILLED: ExitStatus = ExitStatus::Signalled { signal: 9, core_dumped: false };
const FAR_S: f64 = 1000.0;
const NEAR_S: f64 = 0.02;

struct Setting<'a> {
    engine: &'a Engine,
    watchdog: Watchdog,
    folder: tempfile::TempDir,
}

/// A served watchdog.
fn served(engine: &Engine, change: impl Fn(&mut Config)) -> Setting<'_> {
    let folder = tempfile::tempdir().expect("tempdir");
    let mut config = Config { path: folder.path().join("pipe"), evidence: Duration::ZERO, py_spy: None };
    change(&mut config);
    let watchdog = engine.watchdog(config).expect("watchdog");
    watchdog.start().expect("start");
    Setting { engine, watchdog, folder }
}

fn plain(engine: &Engine) -> Setting<'_> {
    served(engine, |_| {})
}

fn wall_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs_f64()
}

fn line(pid: i32, scope: &str, expiration_time: f64, signal: i32) -> String {
    format!(
        "{{\"version\": 1, \"pid\": {pid}, \"scope_id\": \"{scope}\", \"expiration_time\": {expiration_time}, \"signal\": {signal}}}\n"
    )
}

fn open(path: &Path) -> File {
    File::options().write(true).custom_flags(libc::O_NONBLOCK).open(path).expect("a reader")
}

impl Setting<'_> {
    fn send(&self, text: &str) {
        open(self.watchdog.path()).write_all(text.as_bytes()).expect("room in the pipe");
    }

    fn acquire(&self, pid: i32, scope: &str, after_s: f64) {
        self.send(&line(pid, scope, wall_s() + after_s, 9));
    }

    fn sleepers(&self, count: usize) -> Group {
        let folder = tempfile::tempdir().expect("tempdir");
        let mut said = Lines::new(folder.path(), "said");
        let group = self.engine.spawn(vec![said.of(zoo(&["sleep"])); count]).expect("spawn");
        for _ in 0..count {
            assert_eq!(said.next(), "ready");
        }
        group
    }

    fn name_workers(&self, group: &Group) -> Vec<PathBuf> {
        let folder = |pid: &i32| self.folder.path().join(pid.to_string());
        let folders: Vec<PathBuf> = group.pids().iter().map(folder).collect();
        for folder in &folders {
            fs::create_dir(folder).expect("folder");
        }
        let workers = group.pids().iter().zip(&folders);
        let workers =
            workers.map(|(pid, folder)| WorkerProcess { pid: *pid, label: "a rank".into(), folder: folder.clone() });
        self.watchdog.set_workers(workers.collect()).expect("set workers");
        folders
    }

    fn expiries(&self, count: usize) -> Vec<Expiry> {
        let mut all = Vec::new();
        while all.len() < count {
            all.extend(self.watchdog.next_expiries().expect("own process"));
        }
        assert_eq!(all.len(), count, "{all:?}");
        all
    }
}

/// Ends what a test has left running.
fn end(group: &Group) {
    group.stop(plan(Duration::ZERO)).expect("stop");
    assert!(support::stopped(group).survivors.is_empty());
}

fn sh(script: &str) -> Command {
    let words = ["/bin/sh", "-c", script].map(|word| std::ffi::CString::new(word).expect("no NUL"));
    Command { argv: words.to_vec(), ..Command::default() }
}

on_each_backend!(a_worker_that_misses_a_deadline_is_killed_at_it_and_not_before);
fn a_worker_that_misses_a_deadline_is_killed_at_it_and_not_before(engine: &Engine) {
    let setting = plain(engine);
    let group = setting.sleepers(2);
    let deadline = wall_s() + NEAR_S;
    setting.send(&line(group.pids()[0], "step", deadline, 9));
    let expiry = setting.expiries(1).remove(0);
    assert_eq!(
        (expiry.pid, expiry.scope.as_str(), expiry.outcome),
        (group.pids()[0], "step", ExpiryOutcome::Signalled)
    );
    let exit = support::wait_for(&group, |group| group.exits(0).ok()?.pop());
    assert_eq!((exit.index, exit.status), (0, KILLED));
    assert!(Duration::from_nanos(exit.at.realtime_ns).as_secs_f64() >= deadline);
    assert!(expiry.signalled_ns <= exit.at.monotonic_ns);
    assert_eq!(setting.watchdog.cause(exit.pid).expect("own process").expect("a cause").scope, "step");
    assert!(is_alive(group.pids()[1]));
    end(&group);
}

on_each_backend!(a_worker_that_releases_in_time_lives_on);
fn a_worker_that_releases_in_time_lives_on(engine: &Engine) {
    let setting = plain(engine);
    let group = setting.sleepers(2);
    let (saved, canary) = (group.pids()[0], group.pids()[1]);
    setting.acquire(saved, "step", 3.0 * NEAR_S);
    setting.send(&line(saved, "step", -1.0, 0));
    setting.acquire(saved, "longer", FAR_S);
    setting.acquire(canary, "step", 6.0 * NEAR_S);
    assert_eq!(setting.expiries(1)[0].pid, canary);
    assert!(is_alive(saved));
    let armed = setting.watchdog.timers().expect("served");
    assert_eq!(armed.iter().map(|timer| timer.scope.as_str()).collect::<Vec<_>>(), ["longer"]);
    end(&group);
    // Who has ended has no timers.
    assert!(setting.watchdog.timers().expect("served").is_empty());
}

on_each_backend!(a_timer_without_a_signal_is_reported_and_signals_no_process);
fn a_timer_without_a_signal_is_reported_and_signals_no_process(engine: &Engine) {
    let setting = plain(engine);
    let group = setting.sleepers(1);
    setting.send(&line(group.pids()[0], "soft", wall_s(), 0));
    assert_eq!(setting.expiries(1)[0].outcome, ExpiryOutcome::NoSignal);
    assert!(is_alive(group.pids()[0]));
    end(&group);
}

on_each_backend!(a_process_that_is_not_ours_is_never_signalled);
fn a_process_that_is_not_ours_is_never_signalled(engine: &Engine) {
    let setting = plain(engine);
    // Its parent has gone and it has a session of its own: as foreign as any other process of the machine.
    let mut said = Lines::new(setting.folder.path(), "said");
    let group = setting.engine.spawn(vec![said.of(zoo(&["escape", "0"]))]).expect("spawn");
    let stranger: i32 = said.next().parse().expect("a pid");
    all_exits(&group);
    for pid in [stranger, 1, 0, -1, -stranger] {
        setting.acquire(pid, "attack", 0.0);
        let expiry = setting.expiries(1).remove(0);
        assert_eq!((expiry.pid, expiry.outcome, expiry.signalled_ns), (pid, ExpiryOutcome::NotOurs, 0));
    }
    assert!(is_alive(stranger));
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(stranger).expect("a pid"),
        rustix::process::Signal::KILL,
    )
    .expect("kill");
}

on_each_backend!(only_the_workers_of_an_agent_are_signalled);
fn only_the_workers_of_an_agent_are_signalled(engine: &Engine) {
    let setting = plain(engine);
    let group = setting.sleepers(1);
    let worker = group.pids()[0];
    // A child of the agent that is no worker: its guard is one.
    let mut helper = std::process::Command::new("sleep").arg("1000").spawn().expect("spawn");
    let own = i32::try_from(std::process::id()).expect("pids fit");
    setting.name_workers(&group);
    for pid in [own, i32::try_from(helper.id()).expect("pids fit")] {
        setting.acquire(pid, "attack", 0.0);
        let expiry = setting.expiries(1).remove(0);
        assert_eq!((expiry.pid, expiry.outcome, expiry.signalled_ns), (pid, ExpiryOutcome::NotOurs, 0));
    }
    setting.acquire(worker, "late", 0.0);
    assert_eq!(setting.expiries(1)[0].outcome, ExpiryOutcome::Signalled);
    assert_eq!(all_exits(&group)[0].status, KILLED);
    helper.kill().and_then(|()| helper.wait()).expect("ended");
}

on_each_backend!(several_at_once_are_all_dealt_with);
fn several_at_once_are_all_dealt_with(engine: &Engine) {
    let setting = plain(engine);
    let group = setting.sleepers(8);
    let deadline = wall_s() + NEAR_S;
    let lines: String = group.pids().iter().map(|pid| line(*pid, "together", deadline, 9)).collect();
    setting.send(&lines);
    let mut pids: Vec<i32> = setting.expiries(8).iter().map(|expiry| expiry.pid).collect();
    pids.sort_unstable();
    let mut expected = group.pids().to_vec();
    expected.sort_unstable();
    assert_eq!(pids, expected);
    assert!(all_exits(&group).iter().all(|exit| exit.status == KILLED));
}

on_each_backend!(a_deadline_passes_during_a_stop);
fn a_deadline_passes_during_a_stop(engine: &Engine) {
    let setting = plain(engine);
    let mut said = Lines::new(setting.folder.path(), "said");
    let group = setting.engine.spawn(vec![said.of(zoo(&["deaf"]))]).expect("spawn");
    assert_eq!(said.next(), "ready");
    group.stop(plan(PATIENCE)).expect("stop");
    setting.acquire(group.pids()[0], "save", NEAR_S);
    let report = support::stopped(&group);
    assert!(report.killed.is_empty(), "by the watchdog, not at the end of the grace");
    assert_eq!(setting.expiries(1)[0].outcome, ExpiryOutcome::Signalled);
}

on_each_backend!(a_stopped_process_is_ended_with_any_signal);
fn a_stopped_process_is_ended_with_any_signal(engine: &Engine) {
    let setting = plain(engine);
    for signal in [libc::SIGKILL, libc::SIGTERM] {
        let group = setting.sleepers(1);
        let pid = group.pids()[0];
        assert!(group.signal(0, libc::SIGSTOP, true).expect("stop"));
        setting.send(&line(pid, "step", wall_s(), signal));
        assert_eq!(all_exits(&group)[0].status, ExitStatus::Signalled { signal, core_dumped: false });
        assert_eq!(setting.expiries(1)[0].signal, signal);
    }
}

on_each_backend!(a_descendant_takes_its_worker_along);
fn a_descendant_takes_its_worker_along(engine: &Engine) {
    let setting = plain(engine);
    let mut said = Lines::new(setting.folder.path(), "said");
    let group = setting.engine.spawn(vec![said.of(sh("sleep 1000 & echo $!; wait"))]).expect("spawn");
    let child: i32 = said.next().parse().expect("a pid");
    setting.name_workers(&group);
    setting.acquire(child, "load", 0.0);
    let expiry = setting.expiries(1).remove(0);
    assert_eq!((expiry.pid, expiry.worker), (child, group.pids()[0]));
    assert_eq!(all_exits(&group)[0].status, KILLED);
    assert_eq!(setting.watchdog.cause(group.pids()[0]).expect("own process").expect("a cause").pid, child);
}

on_each_backend!(a_pipe_removed_under_the_server);
fn a_pipe_removed_under_the_server(engine: &Engine) {
    let setting = plain(engine);
    let group = setting.sleepers(2);
    let mut early = open(setting.watchdog.path());
    fs::remove_file(setting.watchdog.path()).expect("remove");
    early.write_all(line(group.pids()[0], "early", wall_s(), 9).as_bytes()).expect("write");
    assert_eq!(setting.expiries(1)[0].scope, "early");
    setting.watchdog.start().expect("anew");
    setting.acquire(group.pids()[1], "late", 0.0);
    assert_eq!(setting.expiries(1)[0].scope, "late");
    all_exits(&group);
}

on_each_backend!(nothing_is_lost_of_a_full_pipe);
fn nothing_is_lost_of_a_full_pipe(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let config = Config { path: folder.path().join("pipe"), evidence: Duration::ZERO, py_spy: None };
    let watchdog = engine.watchdog(config).expect("watchdog");
    let group = engine.spawn(vec![zoo(&["sleep"])]).expect("spawn");
    let mut pipe = open(watchdog.path());
    let mut sent = 0;
    while pipe.write_all(line(group.pids()[0], &sent.to_string(), wall_s() + FAR_S, 9).as_bytes()).is_ok() {
        sent += 1;
    }
    assert!(sent > 100);
    watchdog.start().expect("start");
    watchdog.drain().expect("served");
    let counts = watchdog.counts().expect("served");
    assert_eq!((counts.requests, counts.armed, counts.broken), (sent, usize::try_from(sent).expect("fits"), 0));
    end(&group);
}

on_each_backend!(ten_million_random_bytes_disturb_no_request);
fn ten_million_random_bytes_disturb_no_request(engine: &Engine) {
    let setting = plain(engine);
    let group = setting.sleepers(2);
    let mut noise = Noise::new();
    let mut chunk = vec![0; 10_000];
    let mut pipe = File::options().write(true).open(setting.watchdog.path()).expect("open");
    for round in 0..1000 {
        noise.fill(&mut chunk);
        pipe.write_all(&chunk).expect("write");
        if round == 500 {
            // The engine's other work goes on.
            assert!(group.signal(0, 9, true).expect("signal"));
            support::wait_for(&group, |group| group.exits(0).ok()?.pop());
        }
    }
    pipe.write_all(b"\n").expect("write");
    setting.acquire(group.pids()[1], "after", 0.0);
    assert_eq!(setting.expiries(1)[0].scope, "after");
    let counts = setting.watchdog.counts().expect("served");
    assert_eq!((counts.requests, counts.armed), (1, 0));
    assert!(counts.broken > 10_000, "{counts:?}");
    assert!(counts.last_broken.len() < 2000);
    all_exits(&group);
}

on_each_backend!(a_client_that_is_killed_in_the_middle_of_a_line_costs_that_line);
fn a_client_that_is_killed_in_the_middle_of_a_line_costs_that_line(engine: &Engine) {
    let setting = plain(engine);
    let group = setting.sleepers(1);
    let pid = group.pids()[0];
    let script =
        format!(r#"printf '{{"version": 1, "pid": {pid}, "sco' > {}; kill -9 $$"#, setting.watchdog.path().display());
    all_exits(&setting.engine.spawn(vec![sh(&script)]).expect("spawn"));
    setting.acquire(pid, "whole", 0.0);
    assert_eq!(setting.expiries(1)[0].scope, "whole");
    assert_eq!(setting.watchdog.counts().expect("served").broken, 1);
    all_exits(&group);
}

on_each_backend!(a_file_with_content_and_a_served_pipe_are_refused);
fn a_file_with_content_and_a_served_pipe_are_refused(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let path = folder.path().join("pipe");
    let make = || engine.watchdog(Config { path: path.clone(), evidence: Duration::ZERO, py_spy: None });

    fs::write(&path, "precious").expect("write");
    let refused = make().expect_err("a file with content").to_string();
    assert!(refused.contains("a non-empty file exists there"), "{refused}");
    assert_eq!(fs::read_to_string(&path).expect("still there"), "precious");

    fs::write(&path, "").expect("write");
    let living = make().expect("a placeholder is replaced");
    let refused = make().expect_err("served").to_string();
    assert!(refused.contains("another process serves it"), "{refused}");
    living.close().expect("close");
    assert_eq!(fs::read_dir(folder.path()).expect("folder").count(), 0, "nothing is left");

    // A server that was killed leaves its pipe and what is in it.
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).expect("mkfifo");
    let watchdog = make().expect("a stale pipe is taken over");
    watchdog.start().expect("start");
    let group = engine.spawn(vec![zoo(&["sleep"])]).expect("spawn");
    open(&path).write_all(line(group.pids()[0], "new", wall_s(), 9).as_bytes()).expect("write");
    assert_eq!(watchdog.next_expiries().expect("one")[0].scope, "new");
    all_exits(&group);
}

on_each_backend!(a_worker_expires_when_its_heartbeats_stop);
fn a_worker_expires_when_its_heartbeats_stop(engine: &Engine) {
    let setting = plain(engine);
    let group = setting.sleepers(1);
    let link = setting.folder.path().join("pipe.beats");
    let slot = BeatSlot::claim(&link).expect("a slot");
    let me = i32::try_from(std::process::id()).expect("pids fit");
    let arm = |slot: u32| {
        let plain = line(me, "beat", wall_s(), 0);
        let beat = format!(", \"heartbeat\": {{\"slot\": {slot}, \"timeout_s\": 0.1}}}}\n");
        setting.send(&plain.replace("}\n", &beat));
    };
    // Somebody else's slot.
    arm(slot.index() + 1);
    setting.watchdog.drain().expect("served");
    assert_eq!(setting.watchdog.counts().expect("served").refused, 1);

    arm(slot.index());
    // By then three beats were due.
    setting.acquire(group.pids()[0], "canary", 0.3);
    std::thread::scope(|scope| {
        let canary = scope.spawn(|| setting.expiries(1).remove(0));
        while !canary.is_finished() {
            slot.beat();
            std::thread::yield_now();
        }
        assert_eq!(canary.join().expect("one").scope, "canary");
    });
    assert!(setting.watchdog.last_heard(me).expect("served").is_some());
    let expiry = setting.expiries(1).remove(0);
    assert_eq!((expiry.scope.as_str(), expiry.outcome), ("beat", ExpiryOutcome::NoSignal));
    // A slot that is given back is a promise that is over.
    arm(slot.index());
    slot.release();
    setting.acquire(me, "later", 0.2);
    setting.send(&line(me, "later", wall_s() + 0.2, 0));
    assert_eq!(setting.expiries(1)[0].scope, "later");
    all_exits(&group);
}

on_each_backend!(evidence_of_all_workers_comes_before_the_signal);
fn evidence_of_all_workers_comes_before_the_signal(engine: &Engine) {
    let setting = served(engine, |config| config.evidence = PATIENCE);
    let group = setting.sleepers(3);
    let folders = setting.name_workers(&group);
    let lines: String = group.pids()[1..].iter().map(|pid| line(*pid, "all_reduce", wall_s(), 9)).collect();
    setting.send(&lines);
    for expiry in setting.expiries(2) {
        assert_eq!(expiry.outcome, ExpiryOutcome::Signalled);
        let own = group.pids().iter().position(|pid| *pid == expiry.pid).expect("a worker");
        assert_eq!(expiry.evidence[0], folders[own].join("evidence.txt"));
        assert_eq!(expiry.evidence.len(), 3);
    }
    for (folder, pid) in folders.iter().zip(group.pids()) {
        let text = fs::read_to_string(folder.join("evidence.txt")).expect("evidence");
        assert!(text.contains("\"all_reduce\"") && text.contains(&format!("a rank, pid {pid}")), "{text}");
        assert!(text.contains(&format!("thread {pid} zoo")), "{text}");
    }
    assert!(is_alive(group.pids()[0]));
    end(&group);
}

on_each_backend!(a_debugger_that_hangs_does_not_keep_the_watchdog);
fn a_debugger_that_hangs_does_not_keep_the_watchdog(engine: &Engine) {
    let scripts = tempfile::tempdir().expect("tempdir");
    let (program, pids) = (scripts.path().join("py-spy"), scripts.path().join("pids"));
    fs::write(&program, format!("#!/bin/sh\necho $$ >> {}\nexec sleep 1000\n", pids.display())).expect("write");
    fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("chmod");
    let slow = |config: &mut Config| {
        config.evidence = Duration::from_millis(500);
        config.py_spy = Some(program.clone());
    };
    let setting = served(engine, slow);
    let group = setting.sleepers(1);
    setting.name_workers(&group);
    setting.acquire(group.pids()[0], "step", 0.0);
    assert_eq!(all_exits(&group)[0].status, KILLED);
    assert_eq!(setting.expiries(1)[0].outcome, ExpiryOutcome::Signalled);
    for pid in fs::read_to_string(&pids).expect("it was asked").lines() {
        assert!(!is_alive(pid.parse().expect("a pid")), "py-spy {pid} is still there");
    }
}

on_each_backend!(a_waiting_caller_returns_when_the_watchdog_closes);
fn a_waiting_caller_returns_when_the_watchdog_closes(engine: &Engine) {
    let setting = plain(engine);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| setting.watchdog.next_expiries().expect("own process"));
        setting.watchdog.close().expect("close");
        assert!(waiting.join().expect("ended").is_empty());
    });
    setting.watchdog.close().expect("again");
    setting.watchdog.counts().expect_err("closed");
}
