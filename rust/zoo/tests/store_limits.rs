//! A store among clients that misbehave. Alone in its process: it uses up descriptors, and measures memory.

#[path = "support/noise.rs"]
mod noise;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ferroelastic_core::host::StoreServer;
use ferroelastic_core::store::wire::{Limits, MAGIC};
use noise::Noise;
use rustix::net::{AddressFamily, SocketType, connect, socket};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};

const PATIENCE: Duration = Duration::from_secs(60);
const CROWD: usize = 10_000;
const MIB: usize = 1 << 20;

const SET: u8 = 1;
const GET: u8 = 3;
const GET_NUM_KEYS: u8 = 7;
const MULTI_SET: u8 = 11;
const PING: u8 = 13;

fn sized(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u64).to_le_bytes(), bytes].concat()
}

fn get(key: &[u8]) -> Vec<u8> {
    [vec![GET], sized(key)].concat()
}

fn set(key: &[u8], value: &[u8]) -> Vec<u8> {
    [vec![SET], sized(key), sized(value)].concat()
}

/// A client of the store.
struct Client(TcpStream);

impl Client {
    fn new(address: SocketAddr) -> Self {
        let mut client = Self::unknown(address);
        client.send(&[&[0], &MAGIC.to_le_bytes()[..]].concat());
        client
    }

    /// One that has not said that it is a client.
    fn unknown(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).expect("connect");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        stream.set_write_timeout(Some(PATIENCE)).expect("set");
        stream.set_nodelay(true).expect("set");
        Self(stream)
    }

    fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).expect("send");
    }

    fn receive<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes).expect("receive");
        bytes
    }

    /// The server has seen what was sent before.
    fn ping(&mut self) {
        self.send(&[PING, 1, 2, 3, 4]);
        assert_eq!(self.receive(), [1, 2, 3, 4]);
    }

    fn value_size(&mut self, key: &[u8]) -> usize {
        self.send(&get(key));
        self.skip_value()
    }

    fn skip_value(&mut self) -> usize {
        let size = u64::from_le_bytes(self.receive());
        let skipped = std::io::copy(&mut (&mut self.0).take(size), &mut std::io::sink()).expect("receive");
        usize::try_from(skipped).expect("small")
    }

    fn keys(&mut self) -> i64 {
        self.send(&[GET_NUM_KEYS]);
        i64::from_le_bytes(self.receive())
    }

    /// Waits for the server to end the connection, whatever it answers before.
    fn ends(mut self) -> bool {
        match std::io::copy(&mut self.0, &mut std::io::sink()) {
            Ok(_) => true,
            // A reset is an end as well, a timeout is none.
            Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
        }
    }
}

fn start() -> StoreServer {
    StoreServer::start("127.0.0.1:0".parse().expect("an address"), Limits::default(), None).expect("start")
}

fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("own status");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
    line.split_ascii_whitespace().nth(1).and_then(|kib| kib.parse::<usize>().ok()).expect("a number") * 1024
}

/// Processor time of this process.
fn busy() -> Duration {
    clock_gettime(ClockId::ProcessCPUTime).try_into().expect("a time")
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("own descriptors").count()
}

#[test]
fn misbehaving_clients_neither_starve_others_nor_use_up_memory() {
    thousands_that_are_idle_cost_little();
    deaf_ones_cost_what_they_asked_for_once();
    one_that_takes_all_it_can_get_leaves_others_their_turn();
    keys_of_megabytes_are_refused();
    noise_ends_its_own_connection();
    a_client_killed_in_the_middle_of_a_request_leaves_nothing();
    without_descriptors_the_server_rests_and_goes_on_later();
}

/// All of them have sent something large before.
fn thousands_that_are_idle_cost_little() {
    let limits = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limits.maximum, ..limits });
    let allowed =
        getrlimit(Resource::Nofile).current.map_or(usize::MAX, |limit| usize::try_from(limit).expect("small"));
    // Both ends of each are in this process.
    let size = CROWD.min((allowed - 100) / 2);
    let server = start();
    let value = vec![0; 100_000];
    let mut first = Client::new(server.address());
    first.send(&set(b"k", &value));
    assert_eq!(first.value_size(b"k"), value.len());
    let before = resident();
    let mut crowd = Vec::with_capacity(size);
    for _ in 0..size {
        let mut client = Client::new(server.address());
        client.send(&set(b"k", &value));
        assert_eq!(client.value_size(b"k"), value.len());
        crowd.push(client);
    }
    let grown = resident().saturating_sub(before);
    println!("{size} idle clients: {} bytes each", grown / size);
    assert!(grown < size * 4096, "{grown} bytes more with {size} clients");
    first.ping();
    drop(crowd);
    first.ping();
}

/// They ask for 8 GiB each, and read nothing.
fn deaf_ones_cost_what_they_asked_for_once() {
    const DEAF: usize = 16;
    let server = start();
    let mut client = Client::new(server.address());
    client.send(&set(b"k", &vec![0; 8 * MIB]));
    client.ping();
    let before = resident();
    let mut deaf: Vec<Client> = (0..DEAF).map(|_| Client::new(server.address())).collect();
    for peer in &mut deaf {
        peer.send(&get(b"k").repeat(1000));
    }
    for _ in 0..1000 {
        client.ping();
    }
    let grown = resident().saturating_sub(before);
    println!("{DEAF} deaf clients: {} bytes each", grown / DEAF);
    assert!(grown < DEAF * 10 * MIB, "{grown} bytes more with {DEAF} deaf clients");
    // One that begins to read after all has missed nothing.
    for _ in 0..20 {
        assert_eq!(deaf[0].skip_value(), 8 * MIB);
    }
}

fn one_that_takes_all_it_can_get_leaves_others_their_turn() {
    const VALUES: usize = 20_000;
    let server = start();
    let mut client = Client::new(server.address());
    client.send(&set(b"k", &vec![0; MIB / 10]));
    client.ping();
    let received = Arc::new(AtomicUsize::new(0));
    let mut greedy = Client::new(server.address());
    greedy.send(&get(b"k").repeat(3000));
    let reader = {
        let received = Arc::clone(&received);
        std::thread::spawn(move || {
            for number in 0..VALUES {
                greedy.skip_value();
                received.store(number, Ordering::Relaxed);
                if number % 1000 == 0 && number + 3000 < VALUES {
                    greedy.send(&get(b"k").repeat(1000));
                }
            }
        })
    };
    while received.load(Ordering::Relaxed) == 0 {
        std::thread::yield_now();
    }
    let mut waits = Vec::new();
    for _ in 0..50 {
        let before = received.load(Ordering::Relaxed);
        client.ping();
        waits.push(received.load(Ordering::Relaxed) - before);
    }
    waits.sort_unstable();
    println!("others wait for {} values of 100 KiB, at most {}", waits[25], waits[49]);
    // A machine that is busy with something else makes some of them long.
    assert!(waits[0] < 200, "{waits:?} values were sent while another client waited for 4 bytes");
    reader.join().expect("all values");
}

fn keys_of_megabytes_are_refused() {
    let server = start();
    let before = resident();
    for _ in 0..100 {
        let mut client = Client::new(server.address());
        // The connection may be ended before all of it was sent.
        let _ = client.0.write_all(&get(&vec![b'k'; 8 * MIB]));
        assert!(client.ends());
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 32 * MIB, "{grown} bytes more");
    Client::new(server.address()).ping();
}

fn noise_ends_its_own_connection() {
    let server = start();
    let mut client = Client::new(server.address());
    let mut random = Noise::new();
    let mut bytes = vec![0; 1_000_000];
    for round in 0..50 {
        random.fill(&mut bytes);
        let mut noisy = if round % 2 == 0 { Client::new(server.address()) } else { Client::unknown(server.address()) };
        let _ = noisy.0.write_all(&bytes);
        assert!(noisy.ends());
        client.ping();
    }
}

fn a_client_killed_in_the_middle_of_a_request_leaves_nothing() {
    let server = start();
    let mut client = Client::new(server.address());
    client.ping();
    let (descriptors_before, before) = (descriptors(), resident());
    let list =
        [vec![MULTI_SET], 3u64.to_le_bytes().to_vec(), sized(b"a"), sized(&vec![0; 4 * MIB]), sized(b"b")].concat();
    for cut in [1, 5, 9, 10, 20, MIB, list.len()] {
        for _ in 0..20 {
            Client::new(server.address()).send(&list[..cut]);
        }
    }
    while descriptors() > descriptors_before {
        client.ping();
    }
    assert_eq!(client.keys(), 0);
    let grown = resident().saturating_sub(before);
    assert!(grown < 64 * MIB, "{grown} bytes more");
}

/// Not even its spare one is to be had again.
fn without_descriptors_the_server_rests_and_goes_on_later() {
    const REST: Duration = Duration::from_millis(500);
    let server = start();
    let mut client = Client::new(server.address());
    client.ping();
    let late = socket(AddressFamily::INET, SocketType::STREAM, None).expect("socket");
    let limits = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(3), ..limits }).expect("set");
    connect(&late, &server.address()).expect("the kernel takes it");
    client.ping();
    let before = busy();
    std::thread::sleep(REST);
    let took = busy().saturating_sub(before);
    client.ping();
    setrlimit(Resource::Nofile, limits).expect("set");
    println!("without descriptors: {took:?} of processor time in {REST:?}");
    assert!(took < REST / 4, "{took:?} of processor time in {REST:?}");
    let mut late = Client(late.into());
    late.0.set_read_timeout(Some(PATIENCE)).expect("set");
    late.send(&[&[0], &MAGIC.to_le_bytes()[..]].concat());
    late.ping();
}
