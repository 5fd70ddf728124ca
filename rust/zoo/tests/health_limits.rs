//! Alone in its process: it uses up descriptors, and measures memory.

#[path = "support/http.rs"]
mod http;
mod support;

use std::fs::File;
use std::io::Write;
use std::net::TcpStream;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use ferroelastic_core::Engine;
use ferroelastic_core::engine::HealthServer;
use ferroelastic_core::health::status::{Started, Update};
use http::{Answering, get, now_s, rest, split, until_alive};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use support::{PATIENCE, all_exits, zoo};

const CROWD: usize = 10_000;
const REQUEST: &[u8] = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n";

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("own status");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
    line.split_ascii_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
}

/// CPU time of the engine's thread in clock ticks.
fn engine_ticks() -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").expect("own threads").flatten();
    let stats = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("stat")).ok());
    let of_engine = stats.filter(|stat| stat.contains("(ferro-sup)"));
    let ticks = |stat: String| {
        let fields = stat.rsplit_once(')').expect("a command").1.split_ascii_whitespace().skip(11).take(2);
        fields.map(|ticks| ticks.parse::<u64>().expect("a number")).sum::<u64>()
    };
    of_engine.map(ticks).sum()
}

fn serve(engine: &Engine) -> (Arc<HealthServer>, Answering) {
    let server = Arc::new(engine.health_server("127.0.0.1", 0, Duration::from_secs(60)).expect("bind"));
    let answering = Answering::with(&server, || Ok(now_s()));
    (server, answering)
}

fn a_crowd_locks_out_nobody_and_costs_little(engine: &Engine) {
    let limits = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limits.maximum, ..limits });
    let allowed = getrlimit(Resource::Nofile).current.map_or(CROWD, |limit| usize::try_from(limit).unwrap_or(CROWD));
    // Besides the crowd: what the server holds, and the test itself.
    let size = CROWD.min(allowed.saturating_sub(1000));
    let (server, answering) = serve(engine);
    let group = engine.spawn(vec![zoo(&["sleep"])]).expect("spawn");
    until_alive(server.address(), "/livez");
    let before = resident_kib();
    // One in two says nothing, the others begin a request that they do not end.
    let mut crowd: Vec<TcpStream> = Vec::with_capacity(size);
    for number in 0..size {
        let mut stream = TcpStream::connect(server.address()).expect("connect");
        if number % 2 == 0 {
            // It may have had to make room already.
            let _ = stream.write_all(format!("GET /{} HTTP/1.1\r\nX: {}", number, "x".repeat(4000)).as_bytes());
        }
        crowd.push(stream);
        if number % 1000 == 999 {
            until_alive(server.address(), "/livez");
        }
    }
    assert!(group.signal(0, 9, false).expect("signal"));
    all_exits(&group);
    let grown = resident_kib().saturating_sub(before);
    assert!(grown < 16 * 1024, "{grown} KiB more with {size} clients");
    // They were not waited for.
    let (_, metrics) = get(server.address(), "/metrics");
    let line = "ferroelastic_health_dropped_connections_total{reason=\"room\"} ";
    let dropped = metrics.lines().find_map(|found| found.strip_prefix(line)).expect("a figure");
    assert!(dropped.parse::<usize>().expect("a number") > size * 9 / 10 - 256, "{dropped} of {size}");
    drop(crowd);
    until_alive(server.address(), "/livez");
    server.close().expect("own process");
    answering.join();
    println!("{size} clients, {grown} KiB");
}

/// Everybody asks at once, many more than there are places.
fn a_crowd_of_probes_is_answered(engine: &Engine) {
    let (server, answering) = serve(engine);
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let address = server.address();
            std::thread::spawn(move || {
                let mut probes: Vec<_> = (0..250).map(|_| http::connect(address)).collect();
                for probe in &mut probes {
                    // Who has to make room cannot.
                    let _ = probe.write_all(REQUEST);
                }
                probes.into_iter().map(rest).filter(|response| response.starts_with("HTTP/1.1 200 ")).count()
            })
        })
        .collect();
    let answered: usize = threads.into_iter().map(|thread| thread.join().expect("no panic")).sum();
    // Who has a place and has asked keeps it. Who connects and then takes its time may have to make room.
    assert!(answered > 0, "nobody was answered");
    until_alive(server.address(), "/livez");
    server.close().expect("own process");
    answering.join();
}

/// Peers that ask for megabytes and do not read them.
fn deaf_peers_cost_little(engine: &Engine) {
    let (server, answering) = serve(engine);
    let worker = |rank| Started { local_rank: rank, rank, pid: i32::MAX };
    server.update(Update::Workers((0..30_000).map(worker).collect())).expect("engine");
    let before = resident_kib();
    let mut deaf: Vec<_> = (0..32).map(|_| http::connect(server.address())).collect();
    for (number, peer) in deaf.iter_mut().enumerate() {
        peer.write_all(b"GET /status HTTP/1.1\r\nHost: a\r\n\r\n").expect("send");
        if number % 8 == 7 {
            until_alive(server.address(), "/livez");
        }
    }
    let grown = resident_kib().saturating_sub(before);
    // Each answer has nine megabytes.
    assert!(grown < 64 * 1024, "{grown} KiB more");
    drop(deaf);
    server.close().expect("own process");
    answering.join();
}

fn connect_later() -> std::os::fd::OwnedFd {
    rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).expect("socket")
}

fn a_process_without_descriptors_is_answered_and_does_not_spin(engine: &Engine) {
    let server = Arc::new(engine.health_server("127.0.0.1", 0, Duration::from_secs(60)).expect("bind"));
    let ticks = engine_ticks();
    let sockets: Vec<_> = (0..4).map(|_| connect_later()).collect();
    let limits = getrlimit(Resource::Nofile);
    let few = Rlimit { current: Some(200), ..limits };
    setrlimit(Resource::Nofile, few).expect("lower the limit");
    let mut hoard = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        hoard.push(file);
    }
    let begin = |socket: &std::os::fd::OwnedFd| {
        rustix::net::connect(socket, &server.address()).expect("connect");
        rustix::net::send(socket, REQUEST, rustix::net::SendFlags::NOSIGNAL).expect("send");
    };
    // The first takes the spare descriptor and waits for an answer that does not come: the others find none.
    sockets.iter().for_each(begin);
    let answer = |socket| {
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        split(&rest(stream))
    };
    let answers: Vec<_> = sockets.into_iter().map(answer).collect();
    for (code, text) in answers {
        assert!(code == 503 && text.starts_with("the interpreter is stuck"), "{code} {text}");
    }
    // Half a second of CPU time if it had spun.
    drop(hoard);
    let spent = engine_ticks() - ticks;
    assert!(spent < 20, "{spent} ticks");
    setrlimit(Resource::Nofile, limits).expect("raise the limit");
    assert_eq!(get(server.address(), "/readyz").0, 503);
    server.close().expect("own process");
}

/// With one connection a time the server is asked as fast as it answers, while a worker ends.
fn an_exit_is_noticed_under_load(engine: &Engine) {
    let (server, answering) = serve(engine);
    let group = engine.spawn(vec![zoo(&["sleep"])]).expect("spawn");
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let under_load = Arc::new(Barrier::new(3));
    let load: Vec<_> = (0..2)
        .map(|_| {
            let (stop, under_load, address) = (Arc::clone(&stop), Arc::clone(&under_load), server.address());
            std::thread::spawn(move || {
                under_load.wait();
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    assert_eq!(get(address, "/metrics").0, 200);
                }
            })
        })
        .collect();
    under_load.wait();
    assert!(group.signal(0, 9, false).expect("signal"));
    all_exits(&group);
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for thread in load {
        thread.join().expect("no panic");
    }
    server.close().expect("own process");
    answering.join();
}

#[test]
fn limits_hold() {
    let engine = Engine::start().expect("engine");
    let open = std::fs::read_dir("/proc/self/fd").expect("own descriptors").count();
    a_crowd_locks_out_nobody_and_costs_little(&engine);
    a_crowd_of_probes_is_answered(&engine);
    deaf_peers_cost_little(&engine);
    a_process_without_descriptors_is_answered_and_does_not_spin(&engine);
    an_exit_is_noticed_under_load(&engine);
    let deadline = Instant::now() + PATIENCE;
    while std::fs::read_dir("/proc/self/fd").expect("own descriptors").count() > open {
        assert!(Instant::now() < deadline, "descriptors are left");
        std::thread::yield_now();
    }
    assert!(engine.close(PATIENCE).expect("own process"));
}
