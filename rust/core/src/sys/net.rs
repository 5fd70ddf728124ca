//! TCP listeners and connections: non-blocking, closed on exec, without SIGPIPE.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, accept_with, bind, connect, getpeername,
    getsockname, listen, recv, send, shutdown, socket_with, sockopt,
};

/// `host:port`, with an IPv6 address in brackets.
#[must_use]
pub fn endpoint(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// Length of the accept queue. The kernel limits it to `somaxconn`.
const BACKLOG: i32 = 4096;

/// Maximum interval of keepalive probes that the kernel accepts.
const MAX_KEEPALIVE: Duration = Duration::from_secs(32_767);

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    address: SocketAddr,
}

impl Listener {
    /// Listens on the first address of `host` that can be bound; port 0 picks a free port. Blocks in the resolver.
    ///
    /// Fails with the error of the last address.
    pub fn bind_name(host: &str, port: u16) -> io::Result<Self> {
        let mut last_error = io::Error::new(io::ErrorKind::AddrNotAvailable, "the host has no address");
        for address in (host, port).to_socket_addrs()? {
            match Self::bind(address) {
                Ok(listener) => return Ok(listener),
                Err(error) => last_error = error,
            }
        }
        Err(last_error)
    }

    /// Listens on `address`; port 0 picks a free port.
    ///
    /// Sets `SO_REUSEADDR`: an address that was just released can be bound again at once. The IPv6 address `::` also accepts IPv4.
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

    /// The bound address, with the actual port.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The next connection; `WouldBlock` if there is none.
    pub fn accept(&self) -> io::Result<Stream> {
        Ok(Stream(accept_with(&self.fd, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?))
    }

    /// The copy of this listener that a forked child inherits and should close.
    #[must_use]
    pub fn inherited(&self) -> InheritedListener {
        InheritedListener { number: self.fd.as_raw_fd(), address: self.address }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // A copy in a forked child would keep the socket listening, and clients would connect to it in vain.
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
    /// Closes the copy, unless its descriptor number now refers to something else.
    ///
    /// Call this only in the forked child: in the parent the descriptor belongs to the [`Listener`].
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

/// A TCP connection.
#[derive(Debug)]
pub struct Stream(OwnedFd);

impl Stream {
    /// Starts to connect. The stream becomes writable when that has succeeded or failed; [`Stream::connected`] returns the outcome.
    pub fn connect(address: SocketAddr) -> io::Result<Self> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let fd = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
        match connect(&fd, &address) {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(Self(fd)),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether the connection is established; `false` while it is in progress.
    pub fn connected(&self) -> io::Result<bool> {
        sockopt::socket_error(&self.0)??;
        match getpeername(&self.0) {
            Ok(peer) => Ok(peer.is_some()),
            Err(rustix::io::Errno::NOTCONN) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The local address.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        Ok(SocketAddr::try_from(getsockname(&self.0)?)?)
    }

    /// The address of the peer.
    pub fn peer_address(&self) -> io::Result<SocketAddr> {
        let Some(address) = getpeername(&self.0)? else { return Err(io::ErrorKind::NotConnected.into()) };
        Ok(SocketAddr::try_from(address)?)
    }

    /// Reads available bytes and returns their number; 0 at the end of the stream. Fails with `WouldBlock` if there are none yet.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match recv(&self.0, &mut *buffer, RecvFlags::empty()) {
                Ok((read, _)) => return Ok(read),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends as many bytes as fit into the send buffer and returns their number. Fails with `WouldBlock` if it is full.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match send(&self.0, bytes, SendFlags::NOSIGNAL) {
                Ok(sent) => return Ok(sent),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Disables Nagle's algorithm (`TCP_NODELAY`), which would delay small replies.
    pub fn set_nodelay(&self) -> io::Result<()> {
        Ok(sockopt::set_tcp_nodelay(&self.0, true)?)
    }

    /// Closes the connection when the peer's machine has acknowledged nothing for `timeout`, whether data is in flight
    /// (`TCP_USER_TIMEOUT`) or not (`SO_KEEPALIVE`).
    ///
    /// Limits the retransmission interval to 1 s where the kernel supports it (`TCP_RTO_MAX_MS`, Linux 6.15). By default the interval
    /// doubles, so that after an interruption of 9 s the next attempt may be 6 s away.
    pub fn set_peer_timeout(&self, timeout: Duration) -> io::Result<()> {
        const TCP_RTO_MAX_MS: libc::c_int = 44;
        const PROBES: u32 = 5;
        let rto_max_ms: libc::c_int = 1000;
        let milliseconds = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX).max(1);
        sockopt::set_tcp_user_timeout(&self.0, milliseconds)?;
        let interval = (timeout / PROBES).clamp(Duration::from_secs(1), MAX_KEEPALIVE);
        sockopt::set_tcp_keepidle(&self.0, interval)?;
        sockopt::set_tcp_keepintvl(&self.0, interval)?;
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

    /// Whether the peer's machine has acknowledged all sent bytes (`TCP_INFO`). Its kernel also does this while the process is suspended.
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

    /// Closes the sending direction. The peer reads the end of the stream.
    pub fn finish_writing(&self) {
        // Fails only if the connection is gone; the next read returns that error.
        let _ = shutdown(&self.0, Shutdown::Write);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // A copy in a forked child would keep the connection open.
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
    fn ipv4_and_ipv6_addresses_listen_and_report_their_port() {
        for host in ["127.0.0.1:0", "[::1]:0", "0.0.0.0:0", "[::]:0"] {
            let listener = Listener::bind(host.parse().expect("an address")).expect(host);
            assert_ne!(listener.address().port(), 0, "{host}");
            let port = listener.address().port();
            let error = listener.accept().expect_err("no connection");
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
            let to = if host.contains("::1") { "::1" } else { "127.0.0.1" };
            std::net::TcpStream::connect((to, port)).expect("connect");
            listener.accept().expect("a connection");
        }
    }

    #[test]
    fn a_port_in_use_is_refused_and_free_again_after_a_drop() {
        let listener = Listener::bind("127.0.0.1:0".parse().expect("an address")).expect("bind");
        let address = listener.address();
        let refused = Listener::bind(address).expect_err("taken");
        assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);
        drop(listener);
        Listener::bind(address).expect("free");
    }

    #[test]
    fn a_copy_of_a_dropped_listener_accepts_no_connections() {
        let listener = Listener::bind("127.0.0.1:0".parse().expect("an address")).expect("bind");
        let address = listener.address();
        let copy = listener.as_fd().try_clone_to_owned().expect("dup");
        drop(listener);
        assert!(std::net::TcpStream::connect(address).is_err());
        Listener::bind(address).expect("free, although the copy is open");
        drop(copy);
    }

    #[test]
    fn close_in_child_closes_only_the_copy_of_the_listener() {
        let listener = Listener::bind("127.0.0.1:0".parse().expect("an address")).expect("bind");
        // Instead of a fork: a second descriptor of the same socket, without an owner.
        let copy = listener.as_fd().try_clone_to_owned().expect("dup");
        let number = std::os::fd::IntoRawFd::into_raw_fd(copy);
        let inherited = InheritedListener { number, address: listener.address() };
        inherited.close_in_child();
        assert!(!std::path::Path::new(&format!("/proc/self/fd/{number}")).exists());
        // The number may be free now, or in use by another test.
        inherited.close_in_child();
        let other = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        InheritedListener { number: other.as_raw_fd(), address: listener.address() }.close_in_child();
        other.local_addr().expect("still open");
    }
}
