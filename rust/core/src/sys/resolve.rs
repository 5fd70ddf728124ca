//! Resolving host names. The system resolver may block for minutes if a name server does not answer, and it cannot be interrupted. It
//! therefore runs in a thread that is never joined.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::mpsc::channel;
use std::time::Duration;

use super::sigmask;
use super::threads;

/// Resolves a host and passes its addresses to `done`: immediately for a numeric address, otherwise later from another thread.
pub fn resolve(
    host: &str,
    port: u16,
    done: impl FnOnce(io::Result<Vec<SocketAddr>>) + Send + 'static,
) -> io::Result<()> {
    if let Ok(address) = host.parse::<IpAddr>() {
        done(Ok(vec![SocketAddr::new(address, port)]));
        return Ok(());
    }
    let host = host.to_owned();
    let resolve = move || {
        // Signals must be delivered to the interpreter's main thread.
        sigmask::block_all().forever();
        done((host.as_str(), port).to_socket_addrs().map(Iterator::collect));
    };
    threads::builder("ferro-resolve").spawn(resolve).map(drop)
}

/// The addresses of a host. Fails with `TimedOut` if the resolver takes longer than `timeout`.
pub fn resolve_within(host: &str, port: u16, timeout: Duration) -> io::Result<Vec<SocketAddr>> {
    let (sender, receiver) = channel();
    resolve(host, port, move |addresses| {
        // Fails after the timeout, when the receiver is gone.
        let _ = sender.send(addresses);
    })?;
    let timed_out = || {
        let seconds = timeout.as_secs_f64();
        let text = format!("the resolver did not answer for {host:?} within {seconds} s");
        io::Error::new(io::ErrorKind::TimedOut, text)
    };
    receiver.recv_timeout(timeout).unwrap_or_else(|_| Err(timed_out()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numeric_addresses_are_resolved() {
        for host in ["127.0.0.1", "localhost"] {
            let found = resolve_within(host, 7, Duration::from_secs(60)).expect(host);
            assert!(found.iter().all(|address| address.ip().is_loopback() && address.port() == 7), "{found:?}");
        }
        assert_eq!(
            resolve_within("::1", 7, Duration::ZERO).expect("a number"),
            ["[::1]:7".parse().expect("an address")]
        );
    }
}
