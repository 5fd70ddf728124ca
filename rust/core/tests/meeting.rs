//! Agents that meet through real sockets.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use ferroelastic_core::host::StoreServer;
use ferroelastic_core::membership::RendezvousClient;
use ferroelastic_core::published::Wake;
use ferroelastic_core::rendezvous::member::{self, Call, Failure, MembershipState};
use ferroelastic_core::rendezvous::message::{AgentMessage, Introduction, Join, Place, encode};
use ferroelastic_core::rendezvous::policy::FailureFacts;
use ferroelastic_core::rendezvous::rounds::HostSettings;
use ferroelastic_core::store::wire::{Limits, MAGIC};
use ferroelastic_core::vocabulary::RestartCause;

const PATIENCE: Duration = Duration::from_secs(20);

fn host(min_nodes: u32, max_nodes: u32, silence: Duration) -> StoreServer {
    let settings = HostSettings {
        run_id: "job".into(),
        min_nodes,
        max_nodes,
        last_call: Duration::from_millis(50),
        silence,
        address: None,
        max_membership_changes: None,
    };
    let address: SocketAddr = "127.0.0.1:0".parse().expect("an address");
    StoreServer::start(address, Limits::default(), Some(settings)).expect("host")
}

fn introduction(name: &str, nodes: (u32, u32)) -> Introduction {
    Introduction::new("job".into(), name.into(), nodes)
}

fn agent(port: u16, name: &str, nodes: (u32, u32)) -> RendezvousClient {
    let settings = member::MemberSettings {
        endpoint: format!("127.0.0.1:{port}"),
        connect_timeout: Duration::from_secs(1),
        is_host: false,
    };
    RendezvousClient::start("127.0.0.1", port, introduction(name, nodes), settings).expect("client")
}

fn join(client: &RendezvousClient) {
    let timeout = Duration::from_secs(60);
    client.call(Call::Join { role: "default".into(), local_world_size: 2, timeout }).expect("call");
}

/// Waits until an agent stands as wanted.
fn wait_for<T>(client: &RendezvousClient, want: impl Fn(&MembershipState) -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let generation = client.generation().expect("generation");
        let standing = client.state().expect("standing");
        if let Some(found) = want(&standing) {
            return found;
        }
        assert!(Instant::now() < deadline, "it stays {standing:?}");
        client.wait(generation, Some(PATIENCE), [None; 2]).expect("wait");
    }
}

fn place(client: &RendezvousClient) -> Place {
    wait_for(client, |standing| if let MembershipState::Placed(place) = standing { Some(place.clone()) } else { None })
}

fn over(client: &RendezvousClient) -> (RestartCause, String) {
    wait_for(client, |standing| match standing {
        MembershipState::Over(_, cause) => Some((cause.kind, cause.text.clone())),
        _ => None,
    })
}

fn failure(client: &RendezvousClient) -> Failure {
    wait_for(
        client,
        |standing| if let MembershipState::Failed(failure) = standing { Some(failure.clone()) } else { None },
    )
}

/// A client of the store, as far as it takes one to be taken for a worker.
fn worker(port: u16) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    stream.write_all(&[0]).expect("write");
    stream.write_all(&MAGIC.to_le_bytes()).expect("write");
    stream
}

/// A connection that has come to say what agents say, and has said this.
fn visitor(port: u16, said: &[AgentMessage]) -> TcpStream {
    let mut stream = worker(port);
    let mut nonce = [0; 4];
    stream.write_all(&[13, 1, 2, 3, 4]).expect("write");
    stream.read_exact(&mut nonce).expect("a client");
    stream.write_all(&[&[0xFE][..], &frames(said)].concat()).expect("write");
    stream
}

fn frames(said: &[AgentMessage]) -> Vec<u8> {
    let mut frames = Vec::new();
    for request in said {
        encode(request, &mut frames);
    }
    frames
}

fn wish(local_world_size: u64) -> AgentMessage {
    AgentMessage::Join(Join { after: None, role: "default".into(), local_world_size, timeout: PATIENCE })
}

/// What is said until the connection ends.
fn last_words(stream: &mut TcpStream) -> String {
    let mut words = Vec::new();
    stream.read_to_end(&mut words).expect("the end, in time");
    String::from_utf8_lossy(&words).into_owned()
}

fn sized(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u64).to_le_bytes()[..], bytes].concat()
}

fn keys(stream: &mut TcpStream) -> i64 {
    let mut reply = [0; 8];
    stream.write_all(&[7]).expect("write");
    stream.read_exact(&mut reply).expect("reply");
    i64::from_le_bytes(reply)
}

#[test]
fn a_restart_finds_an_empty_store_and_a_new_round() {
    let server = host(2, 2, Duration::from_secs(5));
    let port = server.address().port();
    let agents = ["a", "b"].map(|name| agent(port, name, (2, 2)));
    agents.iter().for_each(join);
    assert_eq!(agents.each_ref().map(|agent| place(agent).round), [0, 0]);

    let mut former = worker(port);
    former.write_all(&[&[1][..], &sized(b"/key"), &sized(b"value")].concat()).expect("write");
    assert_eq!(keys(&mut former), 1);
    let failed = Call::Failed {
        at_ns: 7,
        text: "rank 1 exited with 1".into(),
        code: 1,
        facts: FailureFacts::default(),
        detail: String::new(),
    };
    agents[1].call(failed).expect("call");
    for agent in &agents {
        assert_eq!(over(agent), (RestartCause::Failure, "rank 1 exited with 1 on b".into()));
        join(agent);
    }
    for agent in &agents {
        let place = place(agent);
        assert_eq!((place.round, place.failures), (1, 1));
    }
    assert_eq!(former.read(&mut [0]).expect("the end"), 0);
    assert_eq!(keys(&mut worker(port)), 0);
}

#[test]
fn the_alarm_is_on_while_a_round_is_over() {
    let server = host(1, 2, Duration::from_secs(5));
    let port = server.address().port();
    let first = agent(port, "a", (1, 2));
    join(&first);
    place(&first);
    let generation = first.generation().expect("generation");
    let wait = || {
        first
            .wait(generation + 1000, Some(Duration::ZERO), [Some(first.alarm().expect("own process")), None])
            .expect("wait")
    };
    assert_eq!(wait(), Wake::Timeout);
    let second = agent(port, "b", (1, 2));
    join(&second);
    assert_eq!(over(&first), (RestartCause::Membership, format!("b (agent {}) joins", std::process::id())));
    assert_eq!((wait(), wait()), (Wake::WakeFd, Wake::WakeFd));
    join(&first);
    assert_eq!(place(&first).group_world_size, 2);
    assert_eq!(wait(), Wake::Timeout);
}

#[test]
fn a_lost_agent_is_noticed_when_its_connection_ends() {
    let server = host(1, 2, Duration::from_secs(60));
    let port = server.address().port();
    let agents = ["a", "b"].map(|name| agent(port, name, (1, 2)));
    agents.iter().for_each(join);
    for agent in &agents {
        place(agent);
    }
    let [first, second] = agents;
    drop(second);
    let (kind, text) = over(&first);
    assert_eq!(kind, RestartCause::Membership);
    assert!(text.starts_with("b (agent") && text.ends_with("was lost: its connection was closed"), "{text}");
    join(&first);
    let place = place(&first);
    assert_eq!((place.round, place.group_world_size, place.membership_changes), (1, 1, 1));
}

#[test]
fn all_leave_together_when_all_have_succeeded() {
    let server = host(2, 2, Duration::from_secs(5));
    let port = server.address().port();
    let agents = ["a", "b"].map(|name| agent(port, name, (2, 2)));
    agents.iter().for_each(join);
    for agent in &agents {
        place(agent);
    }
    for agent in &agents {
        assert!(matches!(agent.state().expect("standing"), MembershipState::Placed(_)));
        agent.call(Call::Finished).expect("call");
    }
    for agent in &agents {
        wait_for(agent, |standing| (*standing == MembershipState::Released).then_some(()));
    }
    // The host waits for those who are still there.
    let closing = std::thread::spawn(move || {
        let start = Instant::now();
        server.close(PATIENCE).expect("close");
        start.elapsed()
    });
    drop(agents);
    assert!(closing.join().expect("join") < PATIENCE);
}

#[test]
fn a_host_that_is_gone_is_a_clear_end() {
    let server = host(1, 1, Duration::from_secs(5));
    let port = server.address().port();
    let client = agent(port, "a", (1, 1));
    join(&client);
    place(&client);
    drop(server);
    assert_eq!(over(&client).0, RestartCause::Membership);
    join(&client);
    let Failure::Unreachable(text) = failure(&client) else { panic!("another failure") };
    assert!(text.contains(&format!("127.0.0.1:{port} is gone")), "{text}");
}

#[test]
fn a_host_that_comes_later_is_found() {
    let former = host(1, 1, Duration::from_secs(5));
    let port = former.address().port();
    // A drop does not wait until the port is free.
    former.close(Duration::ZERO).expect("closed");
    let client = agent(port, "a", (1, 1));
    join(&client);
    let settings = HostSettings {
        run_id: "job".into(),
        min_nodes: 1,
        max_nodes: 1,
        last_call: Duration::ZERO,
        silence: Duration::from_secs(5),
        address: None,
        max_membership_changes: None,
    };
    let address: SocketAddr = ([127, 0, 0, 1], port).into();
    let _server = StoreServer::start(address, Limits::default(), Some(settings)).expect("host");
    place(&client);
}

#[test]
fn servers_that_are_no_rendezvous_are_distinguished() {
    // A store of torch: it echoes, and ends the connection at an opcode that it does not know.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let port = listener.local_addr().expect("address").port();
    let torch = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("accept");
        let mut begin = [0; 10];
        stream.read_exact(&mut begin).expect("read");
        stream.write_all(&begin[6..]).expect("write");
        stream.read_exact(&mut [0]).expect("read");
    });
    let client = agent(port, "a", (1, 1));
    join(&client);
    let Failure::Refused(text) = failure(&client) else { panic!("another failure") };
    assert!(text.contains("is a TCPStore of torch"), "{text}");
    torch.join().expect("join");

    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let port = listener.local_addr().expect("address").port();
    let web = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("accept");
        stream.write_all(b"HTTP/1.1 400 Bad AgentMessage\r\n\r\n").expect("write");
        let _ = stream.read(&mut [0; 1024]);
    });
    let client = agent(port, "a", (1, 1));
    join(&client);
    let Failure::Refused(text) = failure(&client) else { panic!("another failure") };
    assert!(text.contains("is neither a TCPStore nor a ferrorun rendezvous"), "{text}");
    web.join().expect("join");
}

#[test]
fn a_store_alone_takes_no_agents() {
    let address: SocketAddr = "127.0.0.1:0".parse().expect("an address");
    let server = StoreServer::start(address, Limits::default(), None).expect("server");
    let client = agent(server.address().port(), "a", (1, 1));
    join(&client);
    assert!(matches!(failure(&client), Failure::Refused(_)));
}

#[test]
fn an_agent_of_another_job_is_refused() {
    let server = host(2, 2, Duration::from_secs(5));
    let client = agent(server.address().port(), "a", (1, 3));
    join(&client);
    let Failure::Refused(text) = failure(&client) else { panic!("another failure") };
    assert!(text.contains("--nnodes=2:2"), "{text}");
}

#[test]
fn garbage_ends_its_connection_and_nothing_else() {
    let server = host(1, 1, Duration::from_secs(5));
    let port = server.address().port();
    for garbage in
        [&b"\xff\xff\xff\x7f"[..], b"\x05\x00\x00\x00{{{{{", b"\x02\x00\x00\x00{}", b"\x06\x00\x00\x00\"Beat\""]
    {
        let mut stream = worker(port);
        stream.write_all(&[0xFE]).expect("write");
        stream.write_all(garbage).expect("write");
        stream.shutdown(std::net::Shutdown::Write).expect("shutdown");
        let mut rest = Vec::new();
        // A reset is an end as well.
        let _ = stream.read_to_end(&mut rest);
    }
    let client = agent(port, "a", (1, 1));
    join(&client);
    place(&client);
}

#[test]
fn a_worker_that_reports_a_failure_ends_the_round() {
    let server = host(1, 1, Duration::from_secs(5));
    let port = server.address().port();
    let client = agent(port, "a", (1, 1));
    join(&client);
    place(&client);
    let rank = 3i32.to_le_bytes();
    worker(port).write_all(&[&[1][..], &sized(b"/remote_error"), &sized(&rank)].concat()).expect("write");
    assert_eq!(over(&client), (RestartCause::Failure, "rank 3 wrote /remote_error to the store".into()));
}

#[test]
fn a_silent_agent_is_lost() {
    let server = host(1, 2, Duration::from_millis(300));
    let port = server.address().port();
    let first = agent(port, "a", (1, 2));
    join(&first);
    place(&first);
    // It says who it is, joins, and nothing more.
    let _silent = visitor(port, &[AgentMessage::Enter(introduction("silent", (1, 2))), wish(1)]);
    assert!(over(&first).1.contains("joins"));
    join(&first);
    assert_eq!(place(&first).group_world_size, 2);
    let (_, text) = over(&first);
    assert!(text.contains("silent (agent") && text.contains("it was silent for 0.3 s"), "{text}");
    join(&first);
    assert_eq!(place(&first).group_world_size, 1);
}

#[test]
fn the_longest_times_are_accepted() {
    let settings = HostSettings {
        run_id: "job".into(),
        min_nodes: 1,
        max_nodes: 2,
        last_call: Duration::MAX,
        silence: Duration::MAX,
        address: None,
        max_membership_changes: None,
    };
    let address: SocketAddr = "127.0.0.1:0".parse().expect("an address");
    let host = StoreServer::start(address, Limits::default(), Some(settings)).expect("host");
    let [first, second] = ["one", "two"].map(|name| agent(host.address().port(), name, (1, 2)));
    for client in [&first, &second] {
        let timeout = Duration::MAX;
        client.call(Call::Join { role: "default".into(), local_world_size: 1, timeout }).expect("call");
    }
    assert_eq!((place(&first).world_size, place(&second).world_size), (2, 2));
    drop((first, second));
    host.close(Duration::MAX).expect("closed");
}

#[test]
fn taking_remarks_is_not_an_event() {
    let host = host(1, 1, Duration::from_secs(5));
    let client = agent(host.address().port(), "one", (1, 1));
    join(&client);
    place(&client);
    let before = client.generation().expect("generation");
    assert_eq!(client.take_warnings().expect("own process"), Vec::<String>::new());
    assert_eq!(client.generation().expect("generation"), before);
}

#[test]
fn an_agent_that_introduces_itself_twice_is_disconnected() {
    let server = host(1, 2, Duration::from_secs(60));
    let port = server.address().port();
    let enter = || AgentMessage::Enter(introduction("b", (1, 2)));
    let first = agent(port, "a", (1, 2));
    join(&first);
    place(&first);
    let mut second = visitor(port, &[enter(), wish(1)]);
    assert!(over(&first).1.contains("joins"));
    join(&first);
    assert_eq!(place(&first).group_world_size, 2);
    second.write_all(&frames(&[enter()])).expect("write");
    let (kind, text) = over(&first);
    assert_eq!(kind, RestartCause::Membership);
    assert!(text.ends_with("it introduced itself twice"), "{text}");
    assert!(last_words(&mut second).contains("Refused"));
}

#[test]
fn an_agent_with_workers_without_number_is_refused() {
    let server = host(2, 2, Duration::from_secs(60));
    let port = server.address().port();
    let enter = || AgentMessage::Enter(introduction("b", (2, 2)));
    for _ in 0..2 {
        let mut greedy = visitor(port, &[enter(), wish(u64::MAX)]);
        let words = last_words(&mut greedy);
        assert!(words.contains("18446744073709551615 workers on one node are over the limit"), "{words}");
    }
    let agents = ["a", "b"].map(|name| agent(port, name, (2, 2)));
    agents.iter().for_each(join);
    assert_eq!(agents.each_ref().map(|agent| place(agent).world_size), [4, 4]);
}

#[test]
fn an_agent_that_never_introduces_itself_is_lost() {
    let server = host(1, 1, Duration::from_millis(300));
    let mut visit = visitor(server.address().port(), &[]);
    assert_eq!(last_words(&mut visit), "", "its time is over");
}

#[test]
fn an_agent_that_never_introduces_itself_is_not_waited_for() {
    let server = host(1, 1, Duration::from_secs(60));
    let _visit = visitor(server.address().port(), &[]);
    let begin = Instant::now();
    server.close(PATIENCE).expect("close");
    assert!(begin.elapsed() < PATIENCE / 2, "{:?}", begin.elapsed());
}
