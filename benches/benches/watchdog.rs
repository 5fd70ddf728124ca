//! Precision of the watchdog's deadlines, and the cost of a request. `cargo bench --bench watchdog`
//!
//! Every sample checks its outcome: an unexpected one panics.

use std::ffi::CString;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ferroelastic_benches::print_percentiles;
use ferroelastic_core::Engine;
use ferroelastic_core::engine::Watchdog;
use ferroelastic_core::sys::clock::Moment;
use ferroelastic_core::sys::spawn::Command;
use ferroelastic_core::sys::wait::ExitStatus;
use ferroelastic_core::watchdog::deadlines::{Deadlines, expiry_instant};
use ferroelastic_core::watchdog::lines::Lines;
use ferroelastic_core::watchdog::wire::{TimerRequest, parse};
use ferroelastic_core::watchdog::{Config, ExpiryOutcome};

const TIMEOUT: Duration = Duration::from_secs(10);
const FAR_S: f64 = 100_000.0;

fn wall_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs_f64()
}

fn line(pid: i32, scope: &str, expiration_time: f64, signal: i32) -> String {
    format!(
        "{{\"version\": 1, \"pid\": {pid}, \"scope_id\": \"{scope}\", \"expiration_time\": {expiration_time}, \"signal\": {signal}}}\n"
    )
}

fn own_pid() -> i32 {
    i32::try_from(std::process::id()).expect("pids fit")
}

struct Served {
    engine: Engine,
    watchdog: Watchdog,
    pipe: File,
}

fn serve() -> Served {
    let engine = Engine::start().expect("engine");
    let path = PathBuf::from(format!("/tmp/ferroelastic-bench-{}", std::process::id()));
    let watchdog =
        engine.watchdog(Config { path: path.clone(), evidence: Duration::ZERO, py_spy: None }).expect("watchdog");
    watchdog.start().expect("start");
    let pipe = File::options().write(true).open(&path).expect("open");
    Served { engine, watchdog, pipe }
}

/// Time from the deadline to the decision to signal, and until the engine notices the exit, among `others` timers that are not due.
fn deadline_to_kill(others: usize, rounds: usize) {
    let mut served = serve();
    for other in 0..others {
        let line = line(own_pid(), &other.to_string(), wall_s() + FAR_S, 0);
        served.pipe.write_all(line.as_bytes()).expect("write");
    }
    served.watchdog.drain().expect("served");
    assert_eq!(served.watchdog.counts().expect("served").armed, others);
    let sleep = ["/bin/sleep", "1000"].map(|word| CString::new(word).expect("no NUL"));
    let command = Command { argv: sleep.to_vec(), ..Command::default() };
    let (mut decided, mut noticed) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let group = served.engine.spawn(vec![command.clone()]).expect("spawn");
        let line = line(group.pids()[0], "bench", wall_s() + 0.01, 9);
        served.pipe.write_all(line.as_bytes()).expect("write");
        let expiry = served.watchdog.next_expiries().expect("one").remove(0);
        assert_eq!((expiry.pid, expiry.outcome), (group.pids()[0], ExpiryOutcome::Signalled));
        let exit = loop {
            let generation = group.generation().expect("own process");
            if let Some(exit) = group.exits(0).expect("own process").pop() {
                break exit;
            }
            group.wait(generation, Some(TIMEOUT), [None; 2]).expect("engine");
        };
        assert_eq!(exit.status, ExitStatus::Signalled { signal: 9, core_dumped: false });
        decided.push(Duration::from_nanos(expiry.late_ns));
        noticed.push(Duration::from_nanos(expiry.late_ns + exit.at.monotonic_ns - expiry.signalled_ns));
    }
    print_percentiles(&format!("watchdog: deadline to signal, among {others} timers"), decided);
    print_percentiles(&format!("watchdog: deadline to exit noticed, among {others} timers"), noticed);
}

/// Time for one request on the engine thread: split the line, parse it, arm the timer.
fn registration(rounds: u32) {
    let lines: Vec<String> =
        (0..100).map(|scope| line(own_pid(), &format!("train.py#{scope}"), wall_s() + FAR_S, 9)).collect();
    let received = Moment::now();
    let (mut splitter, mut deadlines) = (Lines::default(), Deadlines::default());
    let samples = (0..rounds).map(|_| {
        let began = Instant::now();
        for line in &lines {
            splitter.feed(line.as_bytes(), |line| {
                let request: TimerRequest = parse(line.expect("short")).request.expect("whole");
                let at = expiry_instant(received, request.expiration_time);
                deadlines.arm(request, at).expect("room");
            });
        }
        began.elapsed() / 100
    });
    let samples = samples.collect();
    assert_eq!(deadlines.len(), 100);
    print_percentiles("watchdog: one request split, parsed and armed", samples);
}

/// Throughput of requests through the pipe, from the first write until the last request is handled.
fn throughput(requests: u64, rounds: usize) {
    let mut served = serve();
    let mut rates: Vec<u64> = Vec::new();
    for round in 1..=rounds as u64 {
        let began = Instant::now();
        for _ in 0..requests / 2 {
            let acquire = line(own_pid(), "bench", wall_s() + FAR_S, 9);
            served.pipe.write_all(acquire.as_bytes()).expect("write");
            let release = line(own_pid(), "bench", -1.0, 0);
            served.pipe.write_all(release.as_bytes()).expect("write");
        }
        served.watchdog.drain().expect("served");
        let took = began.elapsed();
        let counts = served.watchdog.counts().expect("served");
        assert_eq!((counts.requests, counts.broken, counts.armed), (round * requests, 0, 0));
        rates.push((u128::from(requests) * 1_000_000_000 / took.as_nanos()).try_into().expect("fits"));
    }
    rates.sort_unstable();
    println!(
        "{:<72} median {:>9}/s   range {} to {}",
        "watchdog: requests served through the pipe",
        rates[rates.len() / 2],
        rates[0],
        rates[rates.len() - 1]
    );
}

fn main() {
    for others in [1, 100, 10_000] {
        deadline_to_kill(others, 100);
    }
    registration(1000);
    throughput(200_000, 5);
}
