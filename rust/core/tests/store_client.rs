//! A client of a store whose server says nothing any more.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ferroelastic_core::host::StoreServer;
use ferroelastic_core::store::StoreClient;
use ferroelastic_core::store::client::ClientError;
use ferroelastic_core::store::wire::Limits;

const TIMEOUT: Duration = Duration::from_millis(200);
/// A machine that is busy with something else takes its time.
const PATIENCE: Duration = Duration::from_secs(8);

/// A server that is stopped: the kernel takes connections for it, and bytes, as many as there is room for.
fn stopped() -> (TcpListener, StoreClient) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let port = listener.local_addr().expect("address").port();
    (listener, StoreClient::connect("127.0.0.1", port, TIMEOUT).expect("connect"))
}

/// A server that reads everything, and has said `answer` by then.
fn saying(answer: &'static [u8]) -> (JoinHandle<()>, StoreClient) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let port = listener.local_addr().expect("address").port();
    let client = StoreClient::connect("127.0.0.1", port, TIMEOUT).expect("connect");
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("accept");
        stream.write_all(answer).expect("write");
        let _ = drain(&mut stream);
    });
    (server, client)
}

fn drain(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.read_to_end(&mut Vec::new()).map(drop)
}

/// Asserts that a request is given up in time, and that the connection is not used for another one.
fn assert_given_up<T: std::fmt::Debug>(
    mut client: StoreClient,
    request: impl FnOnce(&mut StoreClient) -> Result<T, ClientError>,
) {
    let begin = Instant::now();
    let error = request(&mut client).expect_err("no answer");
    assert!(matches!(error, ClientError::NoReply { .. }), "{error}");
    assert!(error.to_string().ends_with("did not answer within 0.2s"), "{error}");
    assert!(begin.elapsed() < PATIENCE);
    let again = client.add(b"k", 1).expect_err("given up");
    assert_eq!(again.to_string(), format!("the connection was closed after an earlier error: {error}"));
}

#[test]
fn a_request_without_an_answer_is_given_up() {
    let (_listener, client) = stopped();
    assert_given_up(client, |client| client.add(b"k", 1));
    let (_listener, client) = stopped();
    assert_given_up(client, |client| client.check(&[b"k"]));
    let (_listener, client) = stopped();
    assert_given_up(client, |client| client.compare_set(b"k", b"", b"v"));
    // It begins to answer, and does not go on.
    let (server, client) = saying(b"\x04\0\0\0\0\0\0\0val");
    assert_given_up(client, |client| client.compare_set(b"k", b"", b"v"));
    server.join().expect("join");
}

#[test]
fn a_wait_that_the_server_does_not_end_is_given_up() {
    let (_listener, client) = stopped();
    assert_given_up(client, |client| client.wait(&[b"k"], TIMEOUT));
    let (_listener, client) = stopped();
    assert_given_up(client, |client| client.get(&[b"k"], TIMEOUT));
    // The keys are there, and their values do not come.
    let (server, client) = saying(b"\0");
    assert_given_up(client, |client| client.get(&[b"k"], TIMEOUT));
    server.join().expect("join");
}

#[test]
fn a_request_that_the_server_does_not_read_is_given_up() {
    let value = vec![0; 64 << 20];
    let (_listener, client) = stopped();
    assert_given_up(client, |client| client.set(b"k", &value));
    let (_listener, client) = stopped();
    assert_given_up(client, |client| client.multi_set(&[(b"k", &value)]));
}

#[test]
fn a_wait_in_vain_leaves_the_connection_as_it_was() {
    let address = "127.0.0.1:0".parse().expect("an address");
    let server = StoreServer::start(address, Limits::default(), None).expect("start");
    // As good as no limit.
    let mut client = StoreClient::connect("127.0.0.1", server.address().port(), Duration::MAX).expect("connect");
    for timeout in [Duration::ZERO, Duration::from_millis(20)] {
        let late = client.wait(&[b"a", b"b"], timeout).expect_err("not there");
        assert!(matches!(late, ClientError::TimedOut { .. }), "{late}");
        assert!(late.to_string().ends_with("keys: a, b"), "{late}");
    }
    assert_eq!(client.add(b"a", 2).expect("served"), 2);
    client.set(b"b", &vec![7; 1 << 20]).expect("served");
    let values = client.get(&[b"a", b"b"], Duration::MAX).expect("there");
    assert_eq!(values, [b"2".to_vec(), vec![7; 1 << 20]]);
    client.set_timeout(TIMEOUT);
    assert!(client.check(&[b"a"]).expect("served"));
}
