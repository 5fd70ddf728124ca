//! A client of a store, either of this package or of torch.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::wire::{MAGIC, opcode};
use crate::sys::clock::after;
use crate::sys::net::endpoint;
use crate::sys::resolve::resolve_within;

/// How long a server has to answer that a wait is cancelled. It answers at once, so this does not depend on the timeout of the wait.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(10);

/// Errors of a client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The connection could not be made, or has ended.
    #[error("the connection to the store at {endpoint} failed: {source}")]
    Connection {
        /// Address of the store.
        endpoint: String,
        /// The error of the system call.
        source: io::Error,
    },
    /// The server has not taken or not answered a request in time. The connection is closed.
    #[error("the store at {endpoint} did not answer within {}s", timeout.as_secs_f64())]
    NoReply {
        /// Address of the store.
        endpoint: String,
        /// The timeout of the request.
        timeout: Duration,
    },
    /// An earlier request has failed, so the next bytes could be the rest of its answer.
    #[error("the connection was closed after an earlier error: {0}")]
    Closed(String),
    /// Keys were not set in time.
    #[error("wait timeout after {}ms, keys: {keys}", timeout.as_millis())]
    TimedOut {
        /// The timeout of the wait.
        timeout: Duration,
        /// The keys, separated by commas.
        keys: String,
    },
    /// The server sent an unknown reply.
    #[error("the store at {endpoint} sent the unknown reply {reply} to a WAIT request")]
    UnexpectedReply {
        /// Address of the store.
        endpoint: String,
        /// The reply.
        reply: u8,
    },
}

/// A connection to a store, for one request at a time.
#[derive(Debug)]
pub struct StoreClient {
    endpoint: String,
    stream: TcpStream,
    /// Timeout of a request, without the time spent waiting for keys.
    timeout: Duration,
    /// The error that closed the connection.
    close_reason: Option<String>,
}

impl StoreClient {
    /// Connects, and retries until `timeout` has passed if no server listens there yet.
    ///
    /// `timeout` is also the timeout of each request, from its first byte to the last byte of its answer.
    pub fn connect(host: &str, port: u16, timeout: Duration) -> Result<Self, ClientError> {
        const PAUSE: Duration = Duration::from_millis(20);
        let endpoint = endpoint(host, port);
        let deadline = after(timeout);
        loop {
            match connect_once(host, port, deadline) {
                Ok(stream) => return Ok(Self { endpoint, stream, timeout, close_reason: None }),
                Err(source) if Instant::now() + PAUSE >= deadline => {
                    return Err(ClientError::Connection { endpoint, source });
                }
                // No event reports when a server listens.
                Err(_) => std::thread::sleep(PAUSE),
            }
        }
    }

    /// Sets the timeout of later requests.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// `SET`.
    pub fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), ClientError> {
        self.exchange(|exchange| exchange.send(opcode::SET, &[Argument::Bytes(key), Argument::Bytes(value)]))
    }

    /// `COMPARE_SET`. Returns the value after the operation.
    pub fn compare_set(&mut self, key: &[u8], expected: &[u8], desired: &[u8]) -> Result<Vec<u8>, ClientError> {
        let fields = [Argument::Bytes(key), Argument::Bytes(expected), Argument::Bytes(desired)];
        self.exchange(|exchange| {
            exchange.send(opcode::COMPARE_SET, &fields)?;
            exchange.receive_bytes()
        })
    }

    /// Waits for the keys, then `MULTI_GET`.
    pub fn get(&mut self, keys: &[&[u8]], timeout: Duration) -> Result<Vec<Vec<u8>>, ClientError> {
        self.wait(keys, timeout)?;
        self.exchange(|exchange| {
            exchange.send(opcode::MULTI_GET, &[Argument::Keys(keys)])?;
            keys.iter().map(|_| exchange.receive_bytes()).collect()
        })
    }

    /// `MULTI_SET`.
    pub fn multi_set(&mut self, pairs: &[(&[u8], &[u8])]) -> Result<(), ClientError> {
        let count = Argument::Number(i64::try_from(pairs.len()).unwrap_or(i64::MAX));
        let fields = pairs.iter().flat_map(|(key, value)| [Argument::Bytes(key), Argument::Bytes(value)]);
        let fields: Vec<_> = std::iter::once(count).chain(fields).collect();
        self.exchange(|exchange| exchange.send(opcode::MULTI_SET, &fields))
    }

    /// `ADD`. Returns the sum.
    pub fn add(&mut self, key: &[u8], delta: i64) -> Result<i64, ClientError> {
        self.exchange(|exchange| {
            exchange.send(opcode::ADD, &[Argument::Bytes(key), Argument::Number(delta)])?;
            exchange.receive_number()
        })
    }

    /// `APPEND`.
    pub fn append(&mut self, key: &[u8], value: &[u8]) -> Result<(), ClientError> {
        self.exchange(|exchange| exchange.send(opcode::APPEND, &[Argument::Bytes(key), Argument::Bytes(value)]))
    }

    /// `CHECK`. Returns whether all keys are present.
    pub fn check(&mut self, keys: &[&[u8]]) -> Result<bool, ClientError> {
        self.exchange(|exchange| {
            exchange.send(opcode::CHECK, &[Argument::Keys(keys)])?;
            Ok(exchange.receive::<1>()? == [0])
        })
    }

    /// `DELETE_KEY`. Returns whether the key was present.
    pub fn delete(&mut self, key: &[u8]) -> Result<bool, ClientError> {
        self.exchange(|exchange| {
            exchange.send(opcode::DELETE_KEY, &[Argument::Bytes(key)])?;
            Ok(exchange.receive_number()? != 0)
        })
    }

    /// `GETNUMKEYS`.
    pub fn num_keys(&mut self) -> Result<i64, ClientError> {
        self.exchange(|exchange| {
            exchange.send(opcode::GET_NUM_KEYS, &[])?;
            exchange.receive_number()
        })
    }

    /// `WAIT`: blocks until all keys are present.
    pub fn wait(&mut self, keys: &[&[u8]], timeout: Duration) -> Result<(), ClientError> {
        const STOP_WAITING: u8 = 0;
        const CANCELED: u8 = 1;
        // Minimum time for an answer if all keys are present.
        const MIN_WAIT: Duration = Duration::from_millis(1);
        self.exchange(|exchange| exchange.send(opcode::WAIT, &[Argument::Keys(keys)]))?;
        let reply = Exchange { stream: &self.stream, deadline: after(timeout.max(MIN_WAIT)) }.receive::<1>();
        match reply {
            Ok([STOP_WAITING]) => return Ok(()),
            Ok([reply]) => {
                let endpoint = self.endpoint.clone();
                return Err(self.close(ClientError::UnexpectedReply { endpoint, reply }));
            }
            Err(source) if is_timeout(&source) => {}
            Err(source) => return Err(self.connection_error(source, timeout)),
        }
        self.exchange_within(self.timeout.min(CANCEL_TIMEOUT), |exchange| {
            exchange.send(opcode::CANCEL_WAIT, &[])?;
            // If the keys were set meanwhile, that answer comes first.
            while exchange.receive::<1>()? != [CANCELED] {}
            Ok(())
        })?;
        let keys = keys.iter().map(|key| String::from_utf8_lossy(key)).collect::<Vec<_>>().join(", ");
        Err(ClientError::TimedOut { timeout, keys })
    }

    fn exchange<T>(&mut self, exchange: impl FnOnce(&mut Exchange<'_>) -> io::Result<T>) -> Result<T, ClientError> {
        self.exchange_within(self.timeout, exchange)
    }

    /// Sends a request and receives its answer within `timeout`.
    fn exchange_within<T>(
        &mut self,
        timeout: Duration,
        exchange: impl FnOnce(&mut Exchange<'_>) -> io::Result<T>,
    ) -> Result<T, ClientError> {
        if let Some(cause) = &self.close_reason {
            return Err(ClientError::Closed(cause.clone()));
        }
        let answer = exchange(&mut Exchange { stream: &self.stream, deadline: after(timeout) });
        answer.map_err(|source| self.connection_error(source, timeout))
    }

    fn connection_error(&mut self, source: io::Error, timeout: Duration) -> ClientError {
        let endpoint = self.endpoint.clone();
        self.close(if is_timeout(&source) {
            ClientError::NoReply { endpoint, timeout }
        } else {
            ClientError::Connection { endpoint, source }
        })
    }

    fn close(&mut self, error: ClientError) -> ClientError {
        self.close_reason = Some(error.to_string());
        // Fails if the connection has ended.
        let _ = self.stream.shutdown(Shutdown::Both);
        error
    }
}

/// A request and its answer, with one deadline.
struct Exchange<'a> {
    stream: &'a TcpStream,
    deadline: Instant,
}

impl Exchange<'_> {
    fn send(&mut self, opcode: u8, fields: &[Argument<'_>]) -> io::Result<()> {
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

    fn time_left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        // The socket takes zero as no timeout.
        if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(left.max(Duration::from_micros(1))) }
    }
}

impl Read for Exchange<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.time_left()?))?;
        self.stream.read(buffer)
    }
}

impl Write for Exchange<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.time_left()?))?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether the error is a timeout.
fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// An argument of a request.
enum Argument<'a> {
    Bytes(&'a [u8]),
    Number(i64),
    Keys(&'a [&'a [u8]]),
}

impl Argument<'_> {
    fn append_to(&self, request: &mut Vec<u8>) {
        let length = |length: usize| u64::try_from(length).unwrap_or(u64::MAX).to_le_bytes();
        match self {
            Argument::Bytes(bytes) => {
                request.extend_from_slice(&length(bytes.len()));
                request.extend_from_slice(bytes);
            }
            Argument::Number(number) => request.extend_from_slice(&number.to_le_bytes()),
            Argument::Keys(keys) => {
                request.extend_from_slice(&length(keys.len()));
                keys.iter().for_each(|key| Argument::Bytes(key).append_to(request));
            }
        }
    }
}

fn connect_once(host: &str, port: u16, deadline: Instant) -> io::Result<TcpStream> {
    let addresses = resolve_within(host, port, deadline.saturating_duration_since(Instant::now()))?;
    connect_to_one(&addresses, deadline)
}

/// Tries the addresses one after the other. Splits the remaining time evenly between them, with at most 5 s each, because an unreachable
/// address may drop packets silently.
fn connect_to_one(addresses: &[SocketAddr], deadline: Instant) -> io::Result<TcpStream> {
    const MAX_SHARE: Duration = Duration::from_secs(5);
    const MIN_SHARE: Duration = Duration::from_millis(1);
    let mut error = io::Error::from(ErrorKind::AddrNotAvailable);
    for (index, address) in addresses.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let untried = u32::try_from(addresses.len() - index).unwrap_or(u32::MAX);
        let share = (left / untried).clamp(MIN_SHARE, MAX_SHARE);
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
    fn an_unresponsive_address_leaves_time_for_the_next() {
        // A listener whose queue has one place, which is taken. It drops further connection attempts silently.
        let full = socket(AddressFamily::INET, SocketType::STREAM, None).expect("socket");
        bind(&full, &SocketAddr::from(([127, 0, 0, 1], 0))).expect("bind");
        listen(&full, 0).expect("listen");
        let unresponsive = SocketAddr::try_from(getsockname(&full).expect("address")).expect("address");
        let _queued = TcpStream::connect(unresponsive).expect("connect");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let good = listener.local_addr().expect("address");

        // Each unresponsive address costs a third of the time. A busy machine may delay some of the attempts past the deadline, but not all.
        let timeout = Duration::from_millis(600);
        let attempt = || {
            let begin = Instant::now();
            let stream = connect_to_one(&[unresponsive, unresponsive, good], begin + timeout).expect("the third");
            assert_eq!(stream.peer_addr().expect("address"), good);
            begin.elapsed()
        };
        let took: Vec<_> = std::iter::repeat_with(attempt).take(5).collect();
        assert!(took.iter().all(|took| *took > timeout / 2), "{took:?}: the first two were not tried");
        assert!(took.iter().any(|took| *took < timeout), "{took:?}: the first two took the time of the third");
        assert!(connect_to_one(&[], Instant::now() + timeout).is_err());
    }
}
