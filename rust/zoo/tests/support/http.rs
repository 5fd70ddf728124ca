//! A client of a health server, and the thread that answers its questions.
#![allow(dead_code, reason = "each test program uses some of it")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use ferroelastic_core::engine::HealthServer;

use super::PATIENCE;

pub(crate) fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    stream
}

/// As [`rest`], of a connection that is to end without a reset.
pub(crate) fn clean_rest(mut stream: TcpStream) -> String {
    let mut received = String::new();
    stream.read_to_string(&mut received).expect("no reset");
    received
}

/// Everything that comes until the end, which has to come.
pub(crate) fn rest(mut stream: TcpStream) -> String {
    let mut received = Vec::new();
    match stream.read_to_end(&mut received) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(error) => panic!("{error} after {:?}", String::from_utf8_lossy(&received)),
    }
    String::from_utf8(received).expect("text")
}

pub(crate) fn exchange(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = connect(address);
    stream.write_all(request).expect("send");
    rest(stream)
}

/// Status and body.
pub(crate) fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let response = exchange(address, format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n").as_bytes());
    split(&response)
}

/// Asks until the answer is 200, and returns it. A busy machine may take longer than the thread that answers has.
pub(crate) fn until_alive(address: SocketAddr, path: &str) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (code, text) = get(address, path);
        if code == 200 {
            return text;
        }
        let is_slow = ["the interpreter is stuck", "alive_callback has not"].iter().any(|late| text.starts_with(late));
        assert!(is_slow && Instant::now() < deadline, "{code} {text}");
    }
}

pub(crate) fn split(response: &str) -> (u16, String) {
    let (head, body) = response.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no response: {response:?}"));
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    assert!(head.contains("\r\nConnection: close"), "{head}");
    assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())) || body.is_empty(), "{head}");
    (status, body.to_owned())
}

/// Answers every question until the server is closed; `asked` has one message for each.
pub(crate) struct Answering {
    thread: JoinHandle<()>,
    pub(crate) asked: Receiver<()>,
}

impl Answering {
    pub(crate) fn with(server: &Arc<HealthServer>, answer: impl Fn() -> Result<f64, String> + Send + 'static) -> Self {
        let (note, asked) = channel();
        let server = Arc::clone(server);
        let thread = std::thread::spawn(move || {
            while server.next_question().expect("own process") {
                server.started().expect("engine");
                let _ = note.send(());
                server.answer(answer()).expect("engine");
            }
        });
        Self { thread, asked }
    }

    pub(crate) fn join(self) {
        self.thread.join().expect("no panic");
    }
}

pub(crate) fn now_s() -> f64 {
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since_epoch.expect("after 1970").as_secs_f64()
}
