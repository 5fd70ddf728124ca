//! Latency of the engine's main operations. `cargo bench`
//!
//! Every sample checks its outcome: an unexpected one panics.

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Command as StdCommand, Stdio as StdStdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferroelastic_benches::print_percentiles;
use ferroelastic_core::Engine;
use ferroelastic_core::engine::{Group, StopReport};
use ferroelastic_core::logs::TailSpec;
use ferroelastic_core::supervise::StopPlan;
use ferroelastic_core::sys::clock::Moment;
use ferroelastic_core::sys::probe::Support;
use ferroelastic_core::sys::spawn::Command;
use ferroelastic_core::sys::stop_file::StopFile;
use ferroelastic_core::sys::wait::ExitStatus;
use ferroelastic_core::vocabulary::{SignalTarget, StopReason};

const TIMEOUT: Duration = Duration::from_secs(10);
const PLAN: StopPlan = StopPlan {
    linger: Duration::ZERO,
    signal: 15,
    target: SignalTarget::Group,
    grace: TIMEOUT,
    kill_wait: TIMEOUT,
    reason: StopReason::Signal,
};
const KILLED: ExitStatus = ExitStatus::Signalled { signal: 9, core_dumped: false };

fn sleeper() -> Command {
    let word = |word: &str| CString::new(word).expect("no NUL");
    Command { argv: vec![word("/bin/sleep"), word("1000")], ..Command::default() }
}

fn wait_for_stop(group: &Group) -> StopReport {
    loop {
        let generation = group.generation().expect("own process");
        if let Some(report) = group.stop_report().expect("own process") {
            assert!(report.survivors.is_empty() && report.killed.is_empty());
            return report;
        }
        group.wait(generation, Some(TIMEOUT), [None; 2]).expect("engine");
    }
}

/// Time from `kill(2)` on one worker until the engine records its exit, and from there to the first signal to its peers.
fn exit_to_peers(engine: &Engine, label: &str, size: usize, rounds: usize) {
    let (mut noticed, mut reacted) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let group = engine.spawn(vec![sleeper(); size]).expect("spawn");
        group.stop_on_failure(PLAN).expect("arm");
        let killed = Moment::now().monotonic_ns;
        assert!(group.signal(size / 2, 9, true).expect("signal"));
        let report = wait_for_stop(&group);
        let first = &group.exits(0).expect("own process")[0];
        assert_eq!((first.index, first.status, first.stopped), (size / 2, KILLED, false));
        noticed.push(Duration::from_nanos(first.at.monotonic_ns - killed));
        reacted.push(Duration::from_nanos(report.signalled_ns.saturating_sub(first.at.monotonic_ns)));
    }
    print_percentiles(&format!("{label}: SIGKILL to exit noticed, 1 of {size}"), noticed);
    print_percentiles(&format!("{label}: exit noticed to {size} workers being signalled"), reacted);
}

/// Time of a whole stop. Every second group announces its deadline in a stop file first.
fn stop(engine: &Engine, label: &str, size: usize, rounds: usize) {
    let (mut silent, mut announced) = (Vec::new(), Vec::new());
    for round in 0..2 * rounds {
        let (file, samples) = if round % 2 == 0 {
            (None, &mut silent)
        } else {
            (Some(Arc::new(StopFile::create().expect("a file"))), &mut announced)
        };
        let group = engine.start_group(vec![sleeper(); size], None, file).expect("spawn");
        group.stop(PLAN).expect("stop");
        samples.push(wait_for_stop(&group).elapsed);
    }
    print_percentiles(&format!("{label}: SIGTERM to {size} groups verified empty"), silent);
    print_percentiles(&format!("{label}: the same, with the deadline announced"), announced);
}

/// Time from the order of a stop to the exit of a worker, which SIGTERM ends.
fn order_to_signal(engine: &Engine, rounds: usize) {
    let (mut silent, mut announced) = (Vec::new(), Vec::new());
    for round in 0..2 * rounds {
        let (file, samples) = if round % 2 == 0 {
            (None, &mut silent)
        } else {
            (Some(Arc::new(StopFile::create().expect("a file"))), &mut announced)
        };
        let group = engine.start_group(vec![sleeper()], None, file).expect("spawn");
        let start = Instant::now();
        group.stop(PLAN).expect("stop");
        let exited = loop {
            let generation = group.generation().expect("own process");
            if let Some(exit) = group.exits(0).expect("own process").first() {
                break exit.at.instant;
            }
            group.wait(generation, Some(TIMEOUT), [None; 2]).expect("engine");
        };
        samples.push(exited.saturating_duration_since(start));
        wait_for_stop(&group);
    }
    print_percentiles("order of a stop to the exit of the worker by SIGTERM", silent);
    print_percentiles("the same, with the deadline announced", announced);
}

/// Time for a call that starts one worker, by the size of the process, compared with `std` with a `pre_exec` hook.
fn spawn(engine: &Engine, rounds: usize) {
    let mut ballast: Vec<u8> = Vec::new();
    for megabytes in [0usize, 400] {
        ballast.resize(megabytes << 20, 1);
        std::hint::black_box(&ballast);
        let (mut ours, mut std) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let start = Instant::now();
            let group = engine.spawn(vec![sleeper()]).expect("spawn");
            ours.push(start.elapsed());
            group.stop(PLAN).expect("stop");
            wait_for_stop(&group);

            let mut command = StdCommand::new("/bin/sleep");
            command.arg("1000").stdin(StdStdio::null());
            // SAFETY: an empty hook; a session and a death signal can only be set in such a one, and having one makes std fork.
            unsafe { command.pre_exec(|| Ok(())) };
            let start = Instant::now();
            let mut child = command.spawn().expect("spawn");
            std.push(start.elapsed());
            child.kill().expect("kill");
            child.wait().expect("wait");
        }
        print_percentiles(&format!("spawn at {megabytes} MB resident: engine"), ours);
        print_percentiles(&format!("spawn at {megabytes} MB resident: std with pre_exec"), std);
    }
}

/// Throughput of prefixed lines from four files to a pipe.
fn tail(engine: &Engine, rounds: usize) {
    const LINES: u32 = 200_000;
    let folder = std::env::temp_dir().join(format!("ferroelastic-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("folder");
    let line = format!("{}\n", "x".repeat(99));
    let files: Vec<_> = (0..4).map(|rank| folder.join(format!("{rank}.log"))).collect();
    for file in &files {
        std::fs::write(file, line.repeat(LINES as usize)).expect("write");
    }
    let mut samples = Vec::new();
    for _ in 0..rounds {
        let (reader, writer) = std::io::pipe().expect("pipe");
        let start = Instant::now();
        let spec = TailSpec {
            files: files.iter().map(|file| (file.clone(), b"[default0]:".to_vec())).collect(),
            console: writer.into(),
            only_lines_with: Vec::new(),
            whole_lines_only: false,
            is_json: false,
        };
        let tail = engine.tail(spec).expect("tail");
        let reading = std::thread::spawn(move || {
            let mut reader = File::from(std::os::fd::OwnedFd::from(reader));
            let mut buffer = vec![0; 1 << 20];
            let mut total = 0;
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                total += count;
            }
            total
        });
        let report = tail.finish(TIMEOUT).expect("finish");
        assert_eq!((report.lines, report.dropped_bytes), (4 * u64::from(LINES), 0));
        assert_eq!(reading.join().expect("no panic") as u64, report.bytes);
        samples.push(start.elapsed());
    }
    let fastest = samples.iter().min().expect("samples").as_secs_f64();
    let megabytes = 4.0 * f64::from(LINES) * 111.0 / 1e6;
    print_percentiles("tail: 4 files of 200,000 lines of 100 bytes to a pipe", samples);
    println!("{:<58} {:.0} MB/s", "tail: best", megabytes / fastest);
    std::fs::remove_dir_all(&folder).expect("clean up");
}

fn main() {
    // `cargo test --benches` runs this too, as a smoke test with few rounds.
    let rounds = if std::env::args().any(|argument| argument == "--bench") { 100 } else { 2 };
    let engine = Engine::start().expect("engine");
    println!("backend: {:?}", engine.support());
    for size in [8, 64] {
        exit_to_peers(&engine, "pidfd", size, rounds);
        stop(&engine, "pidfd", size, rounds);
    }
    order_to_signal(&engine, 10 * rounds);
    spawn(&engine, rounds);
    tail(&engine, rounds.div_ceil(10));
    let fallback = Engine::start_with(Support::NONE).expect("engine");
    exit_to_peers(&fallback, "fallback", 8, rounds);
    stop(&fallback, "fallback", 8, rounds);
}
