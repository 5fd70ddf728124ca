//! Listening for TCP connections: non-blocking, closed on exec, no SIGPIPE.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, accept_with, bind, connect, getpeername,
    getsockname, listen, recv, send, shutdown, socket_with, sockopt,
};

/// A host and its port as users write them: an IPv6 address is in brackets.
#[must_use]
pub fn endpoint(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// Connections that the kernel completes before they are accepted; it takes the least of this and `somaxconn`.
const BACKLOG: i32 = 4096;

/// Longest pause between two probes of a silent connection: the kernel takes no longer one.
const MOST_KEEPALIVE: Duration = Duration::from_secs(32_767);

/// A socket that listens.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    address: SocketAddr,
}

impl Listener {
    /// Listens on the first address of a host name that can be bound; port 0 picks a free port. Blocks in the resolver.
    pub fn bind_name(host: &str, port: u16) -> io::Result<Self> {
        let mut failed = io::Error::new(io::ErrorKind::AddrNotAvailable, "the host has no address");
        for address in (host, port).to_socket_addrs()? {
            match Self::bind(address) {
                Ok(listener) => return Ok(listener),
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    /// Listens on `address`; port 0 picks a free port.
    ///
    /// An address that another process has just released can be bound at once. The IPv6 address `::` accepts IPv4 as well.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let fd = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
        sockopt::set_socket_reuseaddr(&fd, true)?;
        if address.is_ipv6() {
            sockopt::set_ipv6_v6only(&fd, false)?;
        }
        bind(&fd, &address)?;
        listen(&fd, BACKLOG)?;
        let address = SocketAddr::try_from(getsockname(&fd)?)?;
        Ok(Self { fd, address })
    }

    /// Where it listens, with the port that was taken.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The next connection; `WouldBlock` if there is none.
    pub fn accept(&self) -> io::Result<Stream> {
        Ok(Stream(accept_with(&self.fd, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?))
    }

    /// What a process forked from this one inherits, for it to close.
    #[must_use]
    pub fn inherited(&self) -> InheritedListener {
        InheritedListener { number: self.fd.as_raw_fd(), address: self.address }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // A forked child may hold a copy, which would go on to take connections that nobody accepts.
        let _ = shutdown(&self.fd, Shutdown::Both);
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The copy of a listener in a forked child, where the thread that owns it does not exist.
#[derive(Clone, Copy, Debug)]
pub struct InheritedListener {
    number: RawFd,
    address: SocketAddr,
}

impl InheritedListener {
    /// Closes the copy, unless its number belongs to something else by now.
    ///
    /// To be called in the forked child only: in the parent the descriptor has its owner.
    pub fn close_in_child(self) {
        // SAFETY: only passed to getsockname and getsockopt, which say EBADF for a number that is not open.
        let borrowed = unsafe { BorrowedFd::borrow_raw(self.number) };
        let address = getsockname(borrowed).ok().and_then(|address| SocketAddr::try_from(address).ok());
        if address == Some(self.address) && matches!(sockopt::socket_acceptconn(borrowed), Ok(true)) {
            // SAFETY: it is the listener. Its owner is a thread of the parent, so nobody in this process closes it a second time.
            drop(unsafe { OwnedFd::from_raw_fd(self.number) });
        }
    }
}

/// One connection.
#[derive(Debug)]
pub struct Stream(OwnedFd);

impl Stream {
    /// Begins to connect. It is writable when that has succeeded or failed, which [`Stream::connected`] tells.
    pub fn connect(address: SocketAddr) -> io::Result<Self> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let fd = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
        match connect(&fd, &address) {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(Self(fd)),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether [`Stream::connect`] has succeeded; `false` while it goes on.
    pub fn connected(&self) -> io::Result<bool> {
        sockopt::socket_error(&self.0)??;
        match getpeername(&self.0) {
            Ok(peer) => Ok(peer.is_some()),
            Err(rustix::io::Errno::NOTCONN) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Its address on this side.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        Ok(SocketAddr::try_from(getsockname(&self.0)?)?)
    }

    /// Its address on the other side.
    pub fn peer_address(&self) -> io::Result<SocketAddr> {
        let Some(address) = getpeername(&self.0)? else { return Err(io::ErrorKind::NotConnected.into()) };
        Ok(SocketAddr::try_from(address)?)
    }

    /// Bytes that have come in, 0 at the end; `WouldBlock` if there are none yet.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match recv(&self.0, &mut *buffer, RecvFlags::empty()) {
                Ok((read, _)) => return Ok(read),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends as much as there is room for; `WouldBlock` if there is none.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match send(&self.0, bytes, SendFlags::NOSIGNAL) {
                Ok(sent) => return Ok(sent),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends what is written at once: small replies must not wait for more (`TCP_NODELAY`).
    pub fn set_nodelay(&self) -> io::Result<()> {
        Ok(sockopt::set_tcp_nodelay(&self.0, true)?)
    }

    /// Ends the connection when the peer's machine has acknowledged nothing for so long, with something to acknowledge or without
    /// (`TCP_USER_TIMEOUT`, `SO_KEEPALIVE`). Until then what is lost is sent again at least each second, where the kernel can
    /// (`TCP_RTO_MAX_MS`, Linux 6.15): its own pauses double, and after an interruption of 9 s the next attempt may be 6 s away.
    pub fn set_patience(&self, patience: Duration) -> io::Result<()> {
        const TCP_RTO_MAX_MS: libc::c_int = 44;
        const PROBES: u32 = 5;
        let rto_max_ms: libc::c_int = 1000;
        let milliseconds = u32::try_from(patience.as_millis()).unwrap_or(u32::MAX).max(1);
        sockopt::set_tcp_user_timeout(&self.0, milliseconds)?;
        let pause = (patience / PROBES).clamp(Duration::from_secs(1), MOST_KEEPALIVE);
        sockopt::set_tcp_keepidle(&self.0, pause)?;
        sockopt::set_tcp_keepintvl(&self.0, pause)?;
        sockopt::set_socket_keepalive(&self.0, true)?;
        // SAFETY: an integer of the size that is given. An older kernel says ENOPROTOOPT.
        unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                libc::IPPROTO_TCP,
                TCP_RTO_MAX_MS,
                (&raw const rto_max_ms).cast(),
                libc::socklen_t::try_from(size_of_val(&rto_max_ms)).unwrap_or(0),
            );
        }
        Ok(())
    }

    /// Whether the peer's machine has acknowledged all that was sent (`TCP_INFO`). It does that for a process that is suspended.
    pub fn is_acknowledged(&self) -> io::Result<bool> {
        // SAFETY: a plain C structure, for which zeros are valid.
        let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
        let mut length = libc::socklen_t::try_from(size_of_val(&info)).unwrap_or(0);
        // SAFETY: the descriptor is open, the structure valid for writes of this length.
        let result = unsafe {
            libc::getsockopt(
                self.0.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                (&raw mut info).cast(),
                &raw mut length,
            )
        };
        if result == 0 { Ok(info.tcpi_unacked == 0) } else { Err(io::Error::last_os_error()) }
    }

    /// Tells the peer that nothing more comes.
    pub fn finish_writing(&self) {
        // Fails only where the peer is gone, which the next read tells.
        let _ = shutdown(&self.0, Shutdown::Write);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // A forked child may hold a copy, which would keep the connection open.
        let _ = shutdown(&self.0, Shutdown::Both);
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_listen_and_say_where() {
        for host in ["127.0.0.1:0", "[::1]:0", "0.0.0.0:0", "[::]:0"] {
            let listener = Listener::bind(host.parse().expect("an address")).expect(host);
            assert_ne!(listener.address().port(), 0, "{host}");
            let port = listener.address().port();
            let nobody = listener.accept().expect_err("no connection");
            assert_eq!(nobody.kind(), io::ErrorKind::WouldBlock);
            let to = if host.contains("::1") { "::1" } else { "127.0.0.1" };
            std::net::TcpStream::connect((to, port)).expect("connect");
            listener.accept().expect("a connection");
        }
    }

    #[test]
    fn a_port_that_is_taken_is_refused_and_free_again_after_a_drop() {
        let listener = Listener::bind("127.0.0.1:0".parse().expect("an address")).expect("bind");
        let address = listener.address();
        let refused = Listener::bind(address).expect_err("taken");
        assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);
        drop(listener);
        Listener::bind(address).expect("free");
    }

    #[test]
    fn a_dropped_listener_takes_no_connections_through_a_copy() {
        let listener = Listener::bind("127.0.0.1:0".parse().expect("an address")).expect("bind");
        let address = listener.address();
        let copy = listener.as_fd().try_clone_to_owned().expect("dup");
        drop(listener);
        assert!(std::net::TcpStream::connect(address).is_err());
        Listener::bind(address).expect("free, although the copy is open");
        drop(copy);
    }

    #[test]
    fn a_forked_copy_is_closed_by_its_number_and_nothing_else_is() {
        let listener = Listener::bind("127.0.0.1:0".parse().expect("an address")).expect("bind");
        // In place of a fork: a second descriptor of the same socket, which this test does not own any more.
        let copy = listener.as_fd().try_clone_to_owned().expect("dup");
        let number = std::os::fd::IntoRawFd::into_raw_fd(copy);
        let inherited = InheritedListener { number, address: listener.address() };
        inherited.close_in_child();
        assert!(!std::path::Path::new(&format!("/proc/self/fd/{number}")).exists());
        // The number is free or somebody else's now.
        inherited.close_in_child();
        let other = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        InheritedListener { number: other.as_raw_fd(), address: listener.address() }.close_in_child();
        other.local_addr().expect("still open");
    }
}
