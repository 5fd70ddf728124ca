//! A client of a store: of ours, or of torch's.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use super::wire::{MAGIC, opcode};
use crate::rendezvous::deadline;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The connection cannot be made, or has ended.
    #[error("the connection to the store at {endpoint} failed: {source}")]
    Connection {
        /// Where the store is.
        endpoint: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Keys were not set in time.
    #[error("wait timeout after {}ms, keys: {keys}", timeout.as_millis())]
    TimedOut {
        /// How long it was waited.
        timeout: Duration,
        /// The keys, separated by commas.
        keys: String,
    },
    /// The server says what no server says.
    #[error("the store at {endpoint} answered {answer} to a wait")]
    Answer {
        /// Where the store is.
        endpoint: String,
        /// What it said.
        answer: u8,
    },
}

/// A host and its port as people write them: an IPv6 address is in brackets.
#[must_use]
pub fn endpoint(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// A connection to a store, for one request at a time.
#[derive(Debug)]
pub struct StoreClient {
    endpoint: String,
    stream: TcpStream,
}

impl StoreClient {
    /// Connects, and tries again until `timeout` has passed if nobody listens there yet.
    pub fn connect(host: &str, port: u16, timeout: Duration) -> Result<Self, ClientError> {
        const PAUSE: Duration = Duration::from_millis(20);
        let endpoint = endpoint(host, port);
        let deadline = deadline(Instant::now(), timeout);
        loop {
            match connect_once(host, port, deadline) {
                Ok(stream) => return Ok(Self { endpoint, stream }),
                Err(source) if Instant::now() + PAUSE >= deadline => {
                    return Err(ClientError::Connection { endpoint, source });
                }
                // Nothing tells when it does.
                Err(_) => std::thread::sleep(PAUSE),
            }
        }
    }

    /// `SET`.
    pub fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), ClientError> {
        self.send(opcode::SET, &[Field::Bytes(key), Field::Bytes(value)])
    }

    /// `COMPARE_SET`; the value that is there afterwards.
    pub fn compare_set(&mut self, key: &[u8], expected: &[u8], desired: &[u8]) -> Result<Vec<u8>, ClientError> {
        self.send(opcode::COMPARE_SET, &[Field::Bytes(key), Field::Bytes(expected), Field::Bytes(desired)])?;
        self.receive_bytes()
    }

    /// `GET`, of keys that are waited for.
    pub fn get(&mut self, keys: &[&[u8]], timeout: Duration) -> Result<Vec<Vec<u8>>, ClientError> {
        self.wait(keys, timeout)?;
        self.send(opcode::MULTI_GET, &[Field::Keys(keys)])?;
        keys.iter().map(|_| self.receive_bytes()).collect()
    }

    /// `MULTI_SET`.
    pub fn multi_set(&mut self, pairs: &[(&[u8], &[u8])]) -> Result<(), ClientError> {
        let count = Field::Number(i64::try_from(pairs.len()).unwrap_or(i64::MAX));
        let fields = pairs.iter().flat_map(|(key, value)| [Field::Bytes(key), Field::Bytes(value)]);
        self.send(opcode::MULTI_SET, &std::iter::once(count).chain(fields).collect::<Vec<_>>())
    }

    /// `ADD`; the sum.
    pub fn add(&mut self, key: &[u8], delta: i64) -> Result<i64, ClientError> {
        self.send(opcode::ADD, &[Field::Bytes(key), Field::Number(delta)])?;
        self.receive_number()
    }

    /// `APPEND`.
    pub fn append(&mut self, key: &[u8], value: &[u8]) -> Result<(), ClientError> {
        self.send(opcode::APPEND, &[Field::Bytes(key), Field::Bytes(value)])
    }

    /// `CHECK`: whether all keys are there.
    pub fn check(&mut self, keys: &[&[u8]]) -> Result<bool, ClientError> {
        self.send(opcode::CHECK, &[Field::Keys(keys)])?;
        Ok(self.receive::<1>()? == [0])
    }

    /// `DELETE_KEY`: whether it was there.
    pub fn delete(&mut self, key: &[u8]) -> Result<bool, ClientError> {
        self.send(opcode::DELETE_KEY, &[Field::Bytes(key)])?;
        Ok(self.receive_number()? != 0)
    }

    /// `GETNUMKEYS`.
    pub fn num_keys(&mut self) -> Result<i64, ClientError> {
        self.send(opcode::GET_NUM_KEYS, &[])?;
        self.receive_number()
    }

    /// `WAIT`, until all keys are there.
    pub fn wait(&mut self, keys: &[&[u8]], timeout: Duration) -> Result<(), ClientError> {
        const STOP_WAITING: u8 = 0;
        const CANCELED: u8 = 1;
        self.send(opcode::WAIT, &[Field::Keys(keys)])?;
        // No timeout at all would be none for the socket.
        let limit = Some(timeout.max(Duration::from_micros(1)));
        self.stream.set_read_timeout(limit).map_err(|source| self.broken(source))?;
        let waited = self.receive::<1>();
        self.stream.set_read_timeout(None).map_err(|source| self.broken(source))?;
        let is_late = |source: &io::Error| matches!(source.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
        match waited {
            Ok([STOP_WAITING]) => return Ok(()),
            Ok([answer]) => return Err(ClientError::Answer { endpoint: self.endpoint.clone(), answer }),
            Err(ClientError::Connection { source, .. }) if is_late(&source) => {}
            Err(error) => return Err(error),
        }
        self.send(opcode::CANCEL_WAIT, &[])?;
        // The keys may have come meanwhile: then that is said first.
        while self.receive::<1>()? != [CANCELED] {}
        let keys = keys.iter().map(|key| String::from_utf8_lossy(key)).collect::<Vec<_>>().join(", ");
        Err(ClientError::TimedOut { timeout, keys })
    }

    fn send(&mut self, opcode: u8, fields: &[Field<'_>]) -> Result<(), ClientError> {
        let mut request = vec![opcode];
        for field in fields {
            field.append_to(&mut request);
        }
        self.stream.write_all(&request).map_err(|source| self.broken(source))
    }

    fn receive<const N: usize>(&mut self) -> Result<[u8; N], ClientError> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).map_err(|source| self.broken(source))?;
        Ok(bytes)
    }

    fn receive_number(&mut self) -> Result<i64, ClientError> {
        Ok(i64::from_le_bytes(self.receive()?))
    }

    fn receive_bytes(&mut self) -> Result<Vec<u8>, ClientError> {
        let length = u64::from_le_bytes(self.receive()?);
        let mut bytes = Vec::new();
        let read = (&self.stream).take(length).read_to_end(&mut bytes).map_err(|source| self.broken(source))?;
        if u64::try_from(read).ok() == Some(length) {
            Ok(bytes)
        } else {
            Err(self.broken(ErrorKind::UnexpectedEof.into()))
        }
    }

    fn broken(&self, source: io::Error) -> ClientError {
        ClientError::Connection { endpoint: self.endpoint.clone(), source }
    }
}

/// A part of a request.
enum Field<'a> {
    Bytes(&'a [u8]),
    Number(i64),
    Keys(&'a [&'a [u8]]),
}

impl Field<'_> {
    fn append_to(&self, request: &mut Vec<u8>) {
        let length = |length: usize| u64::try_from(length).unwrap_or(u64::MAX).to_le_bytes();
        match self {
            Field::Bytes(bytes) => {
                request.extend_from_slice(&length(bytes.len()));
                request.extend_from_slice(bytes);
            }
            Field::Number(number) => request.extend_from_slice(&number.to_le_bytes()),
            Field::Keys(keys) => {
                request.extend_from_slice(&length(keys.len()));
                keys.iter().for_each(|key| Field::Bytes(key).append_to(request));
            }
        }
    }
}

fn connect_once(host: &str, port: u16, deadline: Instant) -> io::Result<TcpStream> {
    let mut error = io::Error::from(ErrorKind::AddrNotAvailable);
    for address in (host, port).to_socket_addrs()? {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let stream = TcpStream::connect_timeout(&address, left).and_then(|mut stream| {
            stream.set_nodelay(true)?;
            stream.write_all(&[&[opcode::VALIDATE][..], &MAGIC.to_le_bytes()].concat())?;
            Ok(stream)
        });
        match stream {
            Ok(stream) => return Ok(stream),
            Err(failed) => error = failed,
        }
    }
    Err(error)
}
