//! Cost of a restart for the host of a rendezvous, by the number of agents. `cargo bench --bench rendezvous`
//!
//! The host is real, and each agent is a socket of this process. One agent reports a failure, all read the end of the round, all join the
//! next round, and all read its beginning. Every message is checked.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use ferroelastic_benches::print_percentiles;
use ferroelastic_core::host::StoreServer;
use ferroelastic_core::rendezvous::message::{AgentMessage, HostMessage, Introduction, Join, decode, encode};
use ferroelastic_core::rendezvous::policy::FailureFacts;
use ferroelastic_core::rendezvous::rounds::HostSettings;
use ferroelastic_core::store::wire::UPGRADE;
use ferroelastic_core::store::wire::{Limits, MAGIC};

const TIMEOUT: Duration = Duration::from_secs(20);
/// Opcodes of `TCPStore`.
const VALIDATE: u8 = 0;
const PING: u8 = 13;
const NONCE: [u8; 4] = *b"ferr";

struct Agent {
    stream: TcpStream,
    input: Vec<u8>,
}

impl Agent {
    fn enter(port: u16, number: u32, nodes: u32) -> Self {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("connect");
        stream.set_nodelay(true).expect("nodelay");
        stream.set_read_timeout(Some(TIMEOUT)).expect("timeout");
        let mut hello = vec![VALIDATE];
        hello.extend_from_slice(&MAGIC.to_le_bytes());
        hello.push(PING);
        hello.extend_from_slice(&NONCE);
        hello.push(UPGRADE);
        let introduction = Introduction::new("job".into(), format!("node{number:04}"), (nodes, nodes));
        encode(&AgentMessage::Enter(introduction), &mut hello);
        stream.write_all(&hello).expect("write");
        let mut echo = [0; 4];
        stream.read_exact(&mut echo).expect("echo");
        assert_eq!(echo, NONCE);
        let mut agent = Self { stream, input: Vec::new() };
        assert!(matches!(agent.receive(), HostMessage::Welcome { .. }));
        agent
    }

    fn send(&mut self, message: &AgentMessage) {
        let mut frame = Vec::new();
        encode(message, &mut frame);
        self.stream.write_all(&frame).expect("write");
    }

    fn join(&mut self, after: Option<u64>) {
        let timeout = Duration::from_secs(600);
        self.send(&AgentMessage::Join(Join { after, role: "default".into(), local_world_size: 8, timeout }));
    }

    fn receive(&mut self) -> HostMessage {
        loop {
            if let Some(message) = decode(&mut self.input).expect("a message") {
                return message;
            }
            let mut chunk = [0; 16 * 1024];
            let read = self.stream.read(&mut chunk).expect("read");
            assert_ne!(read, 0, "the host closed the connection");
            self.input.extend_from_slice(&chunk[..read]);
        }
    }

    fn wait_for_round(&mut self) -> u64 {
        match self.receive() {
            HostMessage::Begin(place) => place.round,
            other => panic!("expected the beginning of a round, got {other:?}"),
        }
    }
}

fn restart(nodes: u32, rounds: u64) {
    let settings = HostSettings {
        run_id: "job".into(),
        min_nodes: nodes,
        max_nodes: nodes,
        last_call: TIMEOUT,
        silence: Duration::from_secs(600),
        address: None,
        max_membership_changes: None,
    };
    let address: SocketAddr = "127.0.0.1:0".parse().expect("an address");
    let host = StoreServer::start(address, Limits::default(), Some(settings)).expect("host");
    let port = host.address().port();
    let mut agents: Vec<Agent> = (0..nodes).map(|number| Agent::enter(port, number, nodes)).collect();
    for agent in &mut agents {
        agent.join(None);
    }
    assert!(agents.iter_mut().all(|agent| agent.wait_for_round() == 0));
    let (mut notified, mut restarted) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let failed = Instant::now();
        let text = "rank 0 exited with code 1".into();
        let (facts, detail) = (FailureFacts::default(), String::new());
        agents[0].send(&AgentMessage::Failed { round, at_ns: 1, text, code: 1, facts, detail });
        for agent in &mut agents {
            assert!(matches!(agent.receive(), HostMessage::Over { round: ended, .. } if ended == round));
        }
        notified.push(failed.elapsed());
        for agent in &mut agents {
            agent.join(Some(round));
        }
        assert!(agents.iter_mut().all(|agent| agent.wait_for_round() == round + 1));
        restarted.push(failed.elapsed());
    }
    print_percentiles(&format!("{nodes:>5} agents: a failure until all are notified"), notified);
    print_percentiles(&format!("{nodes:>5} agents: a failure until all are in the next round"), restarted);
}

fn main() {
    for nodes in [2, 32, 256, 1024] {
        restart(nodes, 50);
    }
}
