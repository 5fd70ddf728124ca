//! Addresses of host names. The resolver may take minutes where a name server does not answer, and cannot be interrupted: it is asked from
//! a thread that nobody waits for.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::mpsc::channel;
use std::time::Duration;

use super::sigmask;
use super::threads;

/// Asks for the addresses of a host and hands them to `done`: at once for a numeric address, else from another thread, later.
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
    let ask = move || {
        // Signals are for the interpreter's main thread.
        sigmask::block_all().forever();
        done((host.as_str(), port).to_socket_addrs().map(Iterator::collect));
    };
    threads::builder("ferro-resolve").spawn(ask).map(drop)
}

/// The addresses of a host; `TimedOut` if the resolver takes longer than `timeout`.
pub fn resolve_within(host: &str, port: u16, timeout: Duration) -> io::Result<Vec<SocketAddr>> {
    let (answer, answers) = channel();
    resolve(host, port, move |addresses| {
        // Nobody may wait any more.
        let _ = answer.send(addresses);
    })?;
    let late = || io::Error::new(io::ErrorKind::TimedOut, format!("the resolver did not answer for {host:?} in time"));
    answers.recv_timeout(timeout).unwrap_or_else(|_| Err(late()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_resolved() {
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
