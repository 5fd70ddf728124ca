//! Latency of health probes, and their effect on the engine's other work. `cargo bench --bench health`
//!
//! Every sample checks its outcome: an unexpected answer panics.

use std::ffi::CString;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ferroelastic_benches::print_percentiles;
use ferroelastic_core::Engine;
use ferroelastic_core::engine::{Group, HealthServer};
use ferroelastic_core::health::status::{Started, Update};
use ferroelastic_core::sys::clock::Moment;
use ferroelastic_core::sys::spawn::Command;
use ferroelastic_core::vocabulary::AgentState;

const TIMEOUT: Duration = Duration::from_secs(10);
const WORKERS: u64 = 8;
const OPEN_CLIENTS: usize = 10_000;

fn sleepers(engine: &Engine, count: usize) -> Group {
    let word = |word: &str| CString::new(word).expect("no NUL");
    let command = Command { argv: vec![word("/bin/sleep"), word("1000")], ..Command::default() };
    engine.spawn(vec![command; count]).expect("spawn")
}

fn serve(engine: &Engine) -> Arc<HealthServer> {
    Arc::new(engine.health_server("127.0.0.1", 0, Duration::from_secs(60)).expect("bind"))
}

/// Starts a thread that answers immediately, like the agent's thread while Python is idle.
fn answer(server: &Arc<HealthServer>) -> std::thread::JoinHandle<()> {
    let server = Arc::clone(server);
    std::thread::spawn(move || {
        while server.next_question().expect("own process") {
            server.started().expect("engine");
            let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
            server.answer(Ok(since_epoch.as_secs_f64())).expect("engine");
        }
    })
}

/// Time from before the connection to the last byte of the answer.
fn probe(address: SocketAddr, path: &str, code: &str) -> Duration {
    let start = Instant::now();
    let mut stream = TcpStream::connect(address).expect("connect");
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n").as_bytes()).expect("send");
    let mut response = String::with_capacity(16 * 1024);
    stream.read_to_string(&mut response).expect("an answer");
    let took = start.elapsed();
    assert!(response.starts_with(&format!("HTTP/1.1 {code} ")), "{path}: {response}");
    took
}

fn latency(engine: &Engine, rounds: usize) {
    let server = serve(engine);
    let address = server.address();
    let group = sleepers(engine, usize::try_from(WORKERS).expect("small"));
    let started = |(rank, pid): (u64, &i32)| Started { local_rank: rank, rank, pid: *pid };
    server.update(Update::Workers((0..).zip(group.pids()).map(started).collect())).expect("engine");
    server.update(Update::State(AgentState::Running)).expect("engine");
    // No thread answers yet: the first probe waits for the answer timeout, the others are answered immediately.
    probe(address, "/livez", "503");
    let stuck = (0..rounds).map(|_| probe(address, "/livez", "503")).collect();
    print_percentiles("probe of /livez while the interpreter is stuck", stuck);
    let answering = answer(&server);
    while !probe_is_alive(address) {}
    for (path, code) in [("/livez", "200"), ("/readyz", "200"), ("/status", "200"), ("/metrics", "200")] {
        let samples = (0..rounds).map(|_| probe(address, path, code)).collect();
        print_percentiles(&format!("probe of {path}, {WORKERS} workers"), samples);
    }
    let asked = (0..rounds.min(20)).map(|_| {
        // Longer than the time for which an answer is reused.
        std::thread::sleep(Duration::from_millis(110));
        probe(address, "/livez", "200")
    });
    print_percentiles("probe of /livez that waits for the callback's thread", asked.collect());
    server.close().expect("own process");
    answering.join().expect("no panic");
    kill(&group);
}

fn probe_is_alive(address: SocketAddr) -> bool {
    let mut stream = TcpStream::connect(address).expect("connect");
    stream.write_all(b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n").expect("send");
    let mut response = String::new();
    stream.read_to_string(&mut response).expect("an answer");
    response.starts_with("HTTP/1.1 200 ")
}

fn kill(group: &Group) {
    for index in 0..group.pids().len() {
        let _ = group.signal(index, 9, false);
    }
    let mut generation = 0;
    while group.exits(0).expect("own process").len() < group.pids().len() {
        group.wait(generation, Some(TIMEOUT), [None; 2]).expect("engine");
        generation = group.generation().expect("own process");
    }
}

fn throughput(engine: &Engine, probes: usize) {
    let server = serve(engine);
    let answering = answer(&server);
    let address = server.address();
    assert!(probe_is_alive(address));
    let start = Instant::now();
    let clients: Vec<_> = (0..2)
        .map(|_| std::thread::spawn(move || (0..probes).map(|_| probe(address, "/livez", "200")).max()))
        .collect();
    for client in clients {
        assert!(client.join().expect("no panic").is_some());
    }
    let rate = 2.0 * f64::from(u32::try_from(probes).expect("small")) / start.elapsed().as_secs_f64();
    println!("{:<58} {rate:.0}/s", "probes of /livez, 2 clients, one connection per probe");
    server.close().expect("own process");
    answering.join().expect("no panic");
}

/// Time from `kill(2)` until the engine records the exit.
fn exits(engine: &Engine, label: &str, rounds: usize) {
    let samples = (0..rounds).map(|_| {
        let group = sleepers(engine, 1);
        let killed = Moment::now().monotonic_ns;
        assert!(group.signal(0, 9, true).expect("signal"));
        kill(&group);
        Duration::from_nanos(group.exits(0).expect("own process")[0].at.monotonic_ns - killed)
    });
    print_percentiles(label, samples.collect());
}

/// Two threads open connections as fast as they can and keep the newest `OPEN_CLIENTS` open. Every second client sends no request.
fn exits_under_load(engine: &Engine, rounds: usize) {
    let server = serve(engine);
    let answering = answer(&server);
    let (address, stop) = (server.address(), Arc::new(AtomicBool::new(false)));
    let clients: Vec<_> = (0..2)
        .map(|_| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                let mut open = std::collections::VecDeque::new();
                let mut opened = 0usize;
                while !stop.load(Ordering::Relaxed) {
                    let Ok(mut stream) = TcpStream::connect(address) else { continue };
                    if opened.is_multiple_of(2) {
                        let _ = stream.write_all(b"GET /livez HTTP/1.1\r\nHost: bench\r\n\r\n");
                    }
                    open.push_back(stream);
                    opened += 1;
                    if open.len() > OPEN_CLIENTS / 2 {
                        open.pop_front();
                    }
                }
                opened
            })
        })
        .collect();
    // The first answer shows that the server is serving under load.
    while !probe_is_alive(address) {}
    exits(engine, "SIGKILL to exit noticed, under a flood of clients", rounds);
    let probes = (0..rounds).map(|_| probe(address, "/readyz", "503")).collect();
    print_percentiles("probe of /readyz, under a flood of clients", probes);
    stop.store(true, Ordering::Relaxed);
    let opened: usize = clients.into_iter().map(|client| client.join().expect("no panic")).sum();
    println!("{:<58} {opened}", "clients of the flood");
    server.close().expect("own process");
    answering.join().expect("no panic");
}

fn main() {
    // `cargo test --benches` runs this too, as a smoke test with few rounds.
    let is_bench = std::env::args().any(|argument| argument == "--bench");
    let rounds = if is_bench { 1000 } else { 2 };
    let engine = Engine::start().expect("engine");
    latency(&engine, rounds);
    throughput(&engine, rounds * 5);
    exits(&engine, "SIGKILL to exit noticed, without clients", rounds / 5 + 1);
    exits_under_load(&engine, rounds / 5 + 1);
}
