//! A client of a store: of ours, or of torch's.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::wire::{MAGIC, opcode};
use crate::sys::resolve::resolve_within;
use crate::sys::timer::after;

/// A server that lives answers at once that a wait is over. It need not have as long as the keys had.
const CANCEL_PATIENCE: Duration = Duration::from_secs(10);

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
    /// The server has not taken a request, or not answered it, in time. The connection is not used again.
    #[error("the store at {endpoint} did not answer within {}s", timeout.as_secs_f64())]
    Silent {
        /// Where the store is.
        endpoint: String,
        /// How long it was waited.
        timeout: Duration,
    },
    /// An earlier request has failed half-way: what comes next would be taken for the answer to another one.
    #[error("the connection is not used any more, for {0}")]
    GivenUp(String),
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
    /// How long a request takes at most, other than to wait for keys.
    timeout: Duration,
    /// Why the connection is not used any more.
    given_up: Option<String>,
}

impl StoreClient {
    /// Connects, and tries again until `timeout` has passed if nobody listens there yet.
    ///
    /// So long a request takes at most, too, from its first byte to the last one of its answer.
    pub fn connect(host: &str, port: u16, timeout: Duration) -> Result<Self, ClientError> {
        const PAUSE: Duration = Duration::from_millis(20);
        let endpoint = endpoint(host, port);
        let deadline = after(timeout);
        loop {
            match connect_once(host, port, deadline) {
                Ok(stream) => return Ok(Self { endpoint, stream, timeout, given_up: None }),
                Err(source) if Instant::now() + PAUSE >= deadline => {
                    return Err(ClientError::Connection { endpoint, source });
                }
                // Nothing tells when it does.
                Err(_) => std::thread::sleep(PAUSE),
            }
        }
    }

    /// Lets requests take so long from now on.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// `SET`.
    pub fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), ClientError> {
        self.exchange(|talk| talk.send(opcode::SET, &[Field::Bytes(key), Field::Bytes(value)]))
    }

    /// `COMPARE_SET`; the value that is there afterwards.
    pub fn compare_set(&mut self, key: &[u8], expected: &[u8], desired: &[u8]) -> Result<Vec<u8>, ClientError> {
        let fields = [Field::Bytes(key), Field::Bytes(expected), Field::Bytes(desired)];
        self.exchange(|talk| {
            talk.send(opcode::COMPARE_SET, &fields)?;
            talk.receive_bytes()
        })
    }

    /// `GET`, of keys that are waited for.
    pub fn get(&mut self, keys: &[&[u8]], timeout: Duration) -> Result<Vec<Vec<u8>>, ClientError> {
        self.wait(keys, timeout)?;
        self.exchange(|talk| {
            talk.send(opcode::MULTI_GET, &[Field::Keys(keys)])?;
            keys.iter().map(|_| talk.receive_bytes()).collect()
        })
    }

    /// `MULTI_SET`.
    pub fn multi_set(&mut self, pairs: &[(&[u8], &[u8])]) -> Result<(), ClientError> {
        let count = Field::Number(i64::try_from(pairs.len()).unwrap_or(i64::MAX));
        let fields = pairs.iter().flat_map(|(key, value)| [Field::Bytes(key), Field::Bytes(value)]);
        let fields: Vec<_> = std::iter::once(count).chain(fields).collect();
        self.exchange(|talk| talk.send(opcode::MULTI_SET, &fields))
    }

    /// `ADD`; the sum.
    pub fn add(&mut self, key: &[u8], delta: i64) -> Result<i64, ClientError> {
        self.exchange(|talk| {
            talk.send(opcode::ADD, &[Field::Bytes(key), Field::Number(delta)])?;
            talk.receive_number()
        })
    }

    /// `APPEND`.
    pub fn append(&mut self, key: &[u8], value: &[u8]) -> Result<(), ClientError> {
        self.exchange(|talk| talk.send(opcode::APPEND, &[Field::Bytes(key), Field::Bytes(value)]))
    }

    /// `CHECK`: whether all keys are there.
    pub fn check(&mut self, keys: &[&[u8]]) -> Result<bool, ClientError> {
        self.exchange(|talk| {
            talk.send(opcode::CHECK, &[Field::Keys(keys)])?;
            Ok(talk.receive::<1>()? == [0])
        })
    }

    /// `DELETE_KEY`: whether it was there.
    pub fn delete(&mut self, key: &[u8]) -> Result<bool, ClientError> {
        self.exchange(|talk| {
            talk.send(opcode::DELETE_KEY, &[Field::Bytes(key)])?;
            Ok(talk.receive_number()? != 0)
        })
    }

    /// `GETNUMKEYS`.
    pub fn num_keys(&mut self) -> Result<i64, ClientError> {
        self.exchange(|talk| {
            talk.send(opcode::GET_NUM_KEYS, &[])?;
            talk.receive_number()
        })
    }

    /// `WAIT`, until all keys are there.
    pub fn wait(&mut self, keys: &[&[u8]], timeout: Duration) -> Result<(), ClientError> {
        const STOP_WAITING: u8 = 0;
        const CANCELED: u8 = 1;
        // Time for an answer about keys that are there.
        const LEAST: Duration = Duration::from_millis(1);
        self.exchange(|talk| talk.send(opcode::WAIT, &[Field::Keys(keys)]))?;
        let waited = Exchange { stream: &self.stream, deadline: after(timeout.max(LEAST)) }.receive::<1>();
        match waited {
            Ok([STOP_WAITING]) => return Ok(()),
            Ok([answer]) => {
                let endpoint = self.endpoint.clone();
                return Err(self.give_up(ClientError::Answer { endpoint, answer }));
            }
            Err(source) if is_late(&source) => {}
            Err(source) => return Err(self.failed(source, timeout)),
        }
        self.exchange_within(self.timeout.min(CANCEL_PATIENCE), |talk| {
            talk.send(opcode::CANCEL_WAIT, &[])?;
            // The keys may have come meanwhile: then that is said first.
            while talk.receive::<1>()? != [CANCELED] {}
            Ok(())
        })?;
        let keys = keys.iter().map(|key| String::from_utf8_lossy(key)).collect::<Vec<_>>().join(", ");
        Err(ClientError::TimedOut { timeout, keys })
    }

    fn exchange<T>(&mut self, talk: impl FnOnce(&mut Exchange<'_>) -> io::Result<T>) -> Result<T, ClientError> {
        self.exchange_within(self.timeout, talk)
    }

    /// Sends a request and takes what there is of an answer, within so much time.
    fn exchange_within<T>(
        &mut self,
        timeout: Duration,
        talk: impl FnOnce(&mut Exchange<'_>) -> io::Result<T>,
    ) -> Result<T, ClientError> {
        if let Some(cause) = &self.given_up {
            return Err(ClientError::GivenUp(cause.clone()));
        }
        let answer = talk(&mut Exchange { stream: &self.stream, deadline: after(timeout) });
        answer.map_err(|source| self.failed(source, timeout))
    }

    fn failed(&mut self, source: io::Error, timeout: Duration) -> ClientError {
        let endpoint = self.endpoint.clone();
        self.give_up(if is_late(&source) {
            ClientError::Silent { endpoint, timeout }
        } else {
            ClientError::Connection { endpoint, source }
        })
    }

    fn give_up(&mut self, error: ClientError) -> ClientError {
        self.given_up = Some(error.to_string());
        // It fails where the connection has ended.
        let _ = self.stream.shutdown(Shutdown::Both);
        error
    }
}

/// What is said and answered until a deadline.
struct Exchange<'a> {
    stream: &'a TcpStream,
    deadline: Instant,
}

impl Exchange<'_> {
    fn send(&mut self, opcode: u8, fields: &[Field<'_>]) -> io::Result<()> {
        let mut request = vec![opcode];
        for field in fields {
            field.append_to(&mut request);
        }
        self.write_all(&request)
    }

    fn receive<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn receive_number(&mut self) -> io::Result<i64> {
        Ok(i64::from_le_bytes(self.receive()?))
    }

    fn receive_bytes(&mut self) -> io::Result<Vec<u8>> {
        let length = u64::from_le_bytes(self.receive()?);
        let mut bytes = Vec::new();
        let read = self.take(length).read_to_end(&mut bytes)?;
        if u64::try_from(read).ok() == Some(length) { Ok(bytes) } else { Err(ErrorKind::UnexpectedEof.into()) }
    }

    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        // No timeout at all would be none for the socket.
        if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(left.max(Duration::from_micros(1))) }
    }
}

impl Read for Exchange<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.left()?))?;
        self.stream.read(buffer)
    }
}

impl Write for Exchange<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether a deadline has passed.
fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
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
    let addresses = resolve_within(host, port, deadline.saturating_duration_since(Instant::now()))?;
    connect_to_one(&addresses, deadline)
}

/// Tries one address after the other. None takes more than its share of the time, nor so much that the others are hardly tried: packets to
/// an address that a name has in vain may be lost without a word.
fn connect_to_one(addresses: &[SocketAddr], deadline: Instant) -> io::Result<TcpStream> {
    const LONGEST: Duration = Duration::from_secs(5);
    const SHORTEST: Duration = Duration::from_millis(1);
    let mut error = io::Error::from(ErrorKind::AddrNotAvailable);
    for (index, address) in addresses.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let untried = u32::try_from(addresses.len() - index).unwrap_or(u32::MAX);
        let share = (left / untried).clamp(SHORTEST, LONGEST);
        let stream = TcpStream::connect_timeout(address, share).and_then(|mut stream| {
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

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketType, bind, getsockname, listen, socket};

    use super::*;

    #[test]
    fn an_address_that_does_not_answer_leaves_time_for_the_next() {
        // A listener that takes one connection, which nobody accepts: what comes after it is dropped without a word.
        let full = socket(AddressFamily::INET, SocketType::STREAM, None).expect("socket");
        bind(&full, &SocketAddr::from(([127, 0, 0, 1], 0))).expect("bind");
        listen(&full, 0).expect("listen");
        let deaf = SocketAddr::try_from(getsockname(&full).expect("address")).expect("address");
        let _taken = TcpStream::connect(deaf).expect("connect");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let good = listener.local_addr().expect("address");

        // Each deaf address costs a third of the time. A busy machine may delay some of the attempts past the deadline, but not all.
        let timeout = Duration::from_millis(600);
        let attempt = || {
            let begin = Instant::now();
            let stream = connect_to_one(&[deaf, deaf, good], begin + timeout).expect("the third");
            assert_eq!(stream.peer_addr().expect("address"), good);
            begin.elapsed()
        };
        let took: Vec<_> = std::iter::repeat_with(attempt).take(5).collect();
        assert!(took.iter().all(|took| *took > timeout / 2), "{took:?}: the first two were not tried");
        assert!(took.iter().any(|took| *took < timeout), "{took:?}: the first two took the time of the third");
        assert!(connect_to_one(&[], Instant::now() + timeout).is_err());
    }
}
