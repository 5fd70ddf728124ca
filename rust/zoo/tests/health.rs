//! The health server against clients of all kinds.

#[path = "support/http.rs"]
mod http;
mod support;

use std::io::Write;
use std::net::{Shutdown, TcpListener};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use ferroelastic_core::Engine;
use ferroelastic_core::engine::HealthServer;
use ferroelastic_core::health::status::{Started, Update};
use ferroelastic_core::vocabulary::{AgentState, RestartCause, RestartPhase};
use http::{Answering, clean_rest, connect, exchange, get, now_s, rest, split, until_alive};
use support::{PATIENCE, all_exits, on_each_backend, zoo};

const TIMEOUT: Duration = Duration::from_secs(60);

fn serve(engine: &Engine) -> Arc<HealthServer> {
    Arc::new(engine.health_server("127.0.0.1", 0, TIMEOUT).expect("bind"))
}

fn alive(server: &Arc<HealthServer>) -> Answering {
    Answering::with(server, || Ok(now_s()))
}

#[test]
fn every_path_is_answered() {
    let engine = Engine::start().expect("engine");
    let server = serve(&engine);
    let answering = alive(&server);
    let address = server.address();
    for path in ["/", "/healthz", "/livez", "/livez?verbose"] {
        let text = until_alive(address, path);
        assert!(text.starts_with("alive: last progress ") && text.ends_with(" s ago, timeout 60 s; state unknown\n"));
    }
    assert_eq!(get(address, "/readyz"), (503, "not ready: state unknown\n".into()));
    assert_eq!(get(address, "/status").0, 200);
    let (code, metrics) = get(address, "/metrics");
    assert_eq!(code, 200);
    assert!(metrics.contains("ferroelastic_health_probes_total{path=\"/readyz\",code=\"503\"} 1\n"), "{metrics}");
    assert!(metrics.contains("ferroelastic_health_probes_total{path=\"/livez\",code=\"200\"} 2\n"), "{metrics}");
    assert_eq!(get(address, "/nothing").0, 404);
    let head = exchange(address, b"HEAD /readyz HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 503 Service Unavailable\r\n") && head.ends_with("\r\n\r\n"), "{head}");
    assert!(head.contains("Content-Length: 25\r\n"), "{head}");
    let post = exchange(address, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc");
    assert!(post.starts_with("HTTP/1.1 405 ") && post.contains("\r\nAllow: GET, HEAD\r\n"), "{post}");
    server.close().expect("own process");
    answering.join();
}

#[test]
fn without_an_answering_thread_the_interpreter_is_reported_stuck_at_once() {
    let engine = Engine::start().expect("engine");
    let server = serve(&engine);
    let (code, text) = get(server.address(), "/livez");
    assert_eq!(code, 503);
    assert!(text.starts_with("the interpreter is stuck: no Python thread could run for 0."), "{text}");
    let (code, text) = get(server.address(), "/livez");
    assert!(code == 503 && text.starts_with("the interpreter is stuck"), "{text}");
    assert_eq!(get(server.address(), "/readyz").0, 503, "the rest goes on");
    assert!(server.next_question().expect("own process"), "the question is still there");
    server.started().expect("engine");
    let (code, text) = get(server.address(), "/livez");
    assert!(code == 503 && text.starts_with("alive_callback has not returned for "), "{text}");
    server.answer(Err("ValueError: no idea".into())).expect("engine");
    let (code, text) = get(server.address(), "/livez");
    assert_eq!((code, text.as_str()), (503, "alive_callback failed: ValueError: no idea; state unknown\n"));
}

#[test]
fn the_answer_of_the_callback_is_the_verdict() {
    let engine = Engine::start().expect("engine");
    for (answer, code, begins) in [
        (now_s() - 100.0, 503, "no progress for 1"),
        (now_s() + 1e6, 200, "alive: last progress 0 s ago"),
        (f64::NEG_INFINITY, 503, "no progress for 1844"),
        (f64::INFINITY, 200, "alive: last progress 0 s ago"),
        (f64::NAN, 503, "alive_callback failed: it returned nan"),
    ] {
        let server = serve(&engine);
        let answering = Answering::with(&server, move || Ok(answer));
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (found, text) = get(server.address(), "/");
            if found == code && text.starts_with(begins) {
                break;
            }
            // Only a busy machine is a reason to ask again.
            assert!(text.contains("has not returned") || text.contains("is stuck"), "{answer}: {found} {text}");
            assert!(Instant::now() < deadline);
        }
        server.close().expect("own process");
        answering.join();
    }
}

#[test]
fn probes_that_wait_together_have_one_answer() {
    let engine = Engine::start().expect("engine");
    let server = serve(&engine);
    let (go, gate) = channel::<()>();
    let answering = Answering::with(&server, move || {
        let _ = gate.recv_timeout(PATIENCE);
        Ok(now_s())
    });
    let request = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";
    let mut probes: Vec<_> = (0..50).map(|_| connect(server.address())).collect();
    for probe in &mut probes {
        probe.write_all(request).expect("send");
    }
    answering.asked.recv_timeout(PATIENCE).expect("a question");
    go.send(()).expect("the thread waits");
    for probe in probes {
        let (code, text) = split(&rest(probe));
        assert!(code == 200 || text.starts_with("alive_callback has not returned"), "{code} {text}");
    }
    assert!(answering.asked.try_recv().is_err(), "it was asked again");
    drop(go);
    server.close().expect("own process");
    answering.join();
}

#[test]
fn rubbish_is_refused_and_costs_its_sender_only() {
    let engine = Engine::start().expect("engine");
    let server = serve(&engine);
    let answering = alive(&server);
    let address = server.address();
    let long = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}", "x".repeat(100_000));
    let rubbish: [(&[u8], u16); 6] = [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x00\xff\xfe", 400),
        (b"\n\x00\n", 400),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"DELETE / HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        (long.as_bytes(), 431),
    ];
    for (bytes, code) in rubbish {
        let mut stream = connect(address);
        // The server may answer, and close, before all is sent.
        let _ = stream.write_all(bytes);
        assert_eq!(split(&rest(stream)).0, code, "{:?}", String::from_utf8_lossy(&bytes[..20.min(bytes.len())]));
    }
    drop(connect(address));
    until_alive(address, "/");
    let (_, metrics) = get(address, "/metrics");
    assert!(metrics.contains("ferroelastic_health_probes_total{path=\"other\",code=\"400\"} 3\n"), "{metrics}");
    server.close().expect("own process");
    answering.join();
}

#[test]
fn requests_in_pieces_in_series_and_late_are_answered_once() {
    let engine = Engine::start().expect("engine");
    let server = serve(&engine);
    let answering = alive(&server);
    let request = b"GET /status HTTP/1.1\r\nHost: a\r\n\r\n";

    let mut pieces = connect(server.address());
    for byte in request {
        pieces.write_all(&[*byte]).expect("send");
        pieces.set_nodelay(true).expect("no delay");
    }
    assert_eq!(split(&rest(pieces)).0, 200);

    // As much as a peer can pipeline: one answer, which is not lost by what was not read.
    let mut pipelined = connect(server.address());
    pipelined.write_all(&request.repeat(1000)).expect("send");
    assert_eq!(clean_rest(pipelined).matches("HTTP/1.1 200 OK\r\n").count(), 1);

    // What comes late is thrown away, and resets nothing.
    let mut late = connect(server.address());
    late.write_all(request).expect("send");
    assert_eq!(split(&clean_rest(late.try_clone().expect("dup"))).0, 200);
    for _ in 0..3 {
        late.write_all(request).expect("send");
        assert_eq!(get(server.address(), "/readyz").0, 503);
    }
    server.close().expect("own process");
    answering.join();
}

#[test]
fn a_peer_that_has_nothing_more_to_send_is_answered_all_the_same() {
    let engine = Engine::start().expect("engine");
    let server = serve(&engine);
    let mut half_closed = connect(server.address());
    half_closed.write_all(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n").expect("send");
    half_closed.shutdown(Shutdown::Write).expect("shutdown");
    assert!(server.next_question().expect("own process"));
    server.started().expect("engine");
    // The engine has turned since, and knows of the end.
    assert_eq!(get(server.address(), "/readyz").0, 503);
    assert_eq!(get(server.address(), "/readyz").0, 503);
    server.answer(Ok(now_s())).expect("engine");
    let (code, text) = split(&rest(half_closed));
    assert!(code == 200 || text.starts_with("alive_callback has not returned"), "{code} {text}");
}

#[test]
fn silent_and_slow_peers_are_dropped() {
    let engine = Engine::start().expect("engine");
    let server = serve(&engine);
    let answering = alive(&server);
    let mut slow = connect(server.address());
    slow.write_all(b"GET / HT").expect("send");
    // A board of several megabytes, more than a socket takes.
    let worker = |rank| Started { local_rank: rank, rank, pid: i32::MAX };
    server.update(Update::Workers((0..40_000).map(worker).collect())).expect("engine");
    let mut deaf = connect(server.address());
    deaf.write_all(b"GET /status HTTP/1.1\r\nHost: a\r\n\r\n").expect("send");
    assert_eq!(rest(connect(server.address())), "", "silent");
    assert_eq!(rest(slow), "");
    // By now its time is over as well: it was the second to come.
    let received = rest(deaf);
    assert!(received.starts_with("HTTP/1.1 200 OK\r\n") && !received.ends_with("]\n}\n"), "{}", received.len());
    until_alive(server.address(), "/");
    server.close().expect("own process");
    answering.join();
}

on_each_backend!(the_board_shows_workers_as_the_engine_knows_them);
fn the_board_shows_workers_as_the_engine_knows_them(engine: &Engine) {
    let server = serve(engine);
    let group = engine.spawn(vec![zoo(&["exit", "3"]), zoo(&["sleep"])]).expect("spawn");
    support::wait_for(&group, |group| group.exits(0).ok().filter(|exits| exits.len() == 1));
    // The first has ended before the agent says that it was started.
    let started = |(rank, pid): (u64, &i32)| Started { local_rank: rank, rank: 4 + rank, pid: *pid };
    let pids: Vec<_> = (0..).zip(group.pids()).map(started).collect();
    server.update(Update::Job { run_id: "run".into(), role: "trainer".into() }).expect("engine");
    server.update(Update::Workers(pids)).expect("engine");
    server.update(Update::State(AgentState::Running)).expect("engine");
    let unready = format!("not ready: rank 4 (pid {}) exited with code 3\n", group.pids()[0]);
    assert_eq!(get(server.address(), "/readyz"), (503, unready));

    let status = |server: &HealthServer| -> serde_json::Value {
        serde_json::from_str(&get(server.address(), "/status").1).expect("JSON")
    };
    let shown = status(&server);
    assert_eq!((&shown["run_id"], &shown["state"]), (&"run".into(), &"running".into()));
    assert_eq!((&shown["workers"][0]["state"], &shown["workers"][0]["exit_code"]), (&"failed".into(), &3.into()));
    let running = &shown["workers"][1];
    assert_eq!(running["state"], "running");
    assert!(running["resident_bytes"].as_u64() > Some(0) && running["cpu_s"].is_number(), "{running}");

    assert!(group.signal(1, 9, false).expect("signal"));
    all_exits(&group);
    let shown = status(&server);
    assert_eq!((&shown["workers"][1]["signal"], &shown["workers"][1]["cpu_s"]), (&9.into(), &().into()));
    server.update(Update::Restart { cause: RestartCause::Failure, reason: "rank 4".into() }).expect("engine");
    server.update(Update::Phase { phase: RestartPhase::Stop, took: Duration::from_millis(2) }).expect("engine");
    let (_, metrics) = get(server.address(), "/metrics");
    for line in [
        "ferroelastic_worker_exits_total{outcome=\"failed\"} 2\n",
        "ferroelastic_restarts_total{cause=\"failure\"} 1\n",
        "ferroelastic_restart_phase_seconds_bucket{le=\"0.003\",phase=\"stop\"} 1\n",
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
}

#[test]
fn a_port_is_refused_with_a_reason_and_free_after_a_close() {
    let engine = Engine::start().expect("engine");
    let taken = TcpListener::bind("127.0.0.1:0").expect("bind");
    let port = taken.local_addr().expect("address").port();
    let refused = engine.health_server("127.0.0.1", port, TIMEOUT).expect_err("taken").to_string();
    assert_eq!(refused, format!("failed to listen on 127.0.0.1:{port}: address already in use"));
    drop(taken);
    for host in ["127.0.0.1", "localhost", "::1", "[::1]", "0.0.0.0", "::"] {
        let server = engine.health_server(host, port, TIMEOUT).unwrap_or_else(|error| panic!("{host}: {error}"));
        assert_eq!(get(server.address(), "/readyz").0, 503, "{host}");
        server.close().expect("own process");
        server.close().expect("again");
        assert!(!server.next_question().expect("own process"));
    }
    let unknown = engine.health_server("no.such.host.invalid", 0, TIMEOUT).expect_err("unknown").to_string();
    assert!(unknown.starts_with("failed to listen on no.such.host.invalid:0: "), "{unknown}");
}

#[test]
fn several_servers_do_not_mix_and_end_with_the_engine() {
    let engine = Engine::start().expect("engine");
    let (first, second) = (serve(&engine), serve(&engine));
    let (one, two) = (alive(&first), Answering::with(&second, || Err("second".into())));
    until_alive(first.address(), "/");
    assert_eq!(get(second.address(), "/").0, 503);
    assert!(engine.close(PATIENCE).expect("own process"));
    one.join();
    two.join();
    first.close().expect("a closed engine has closed its servers");
    assert!(std::net::TcpStream::connect(first.address()).is_err());
}
