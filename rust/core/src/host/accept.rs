//! Accepts connections while the process has descriptors left.

use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};

use super::connection::Connection;
use super::thread::{HostThread, LISTENER};
use crate::rendezvous::rounds::HostEvent;
use crate::store::state::Peer;
use crate::store::wire::Decoder;
use crate::sys::poller::Interest;
use crate::sys::wake::WakeFd;

/// Number of connections accepted before existing connections are served.
const ACCEPTED_PER_TURN: usize = 256;

/// Pause after a failure to accept a connection.
const PAUSE: Duration = Duration::from_millis(100);

/// Number of descriptors reserved for the rest of the agent's process.
const RESERVED_DESCRIPTORS: u64 = 64;

/// When descriptors run short, connections that have sent nothing for this long are closed. Agents and workers send at once.
const SILENT_TIMEOUT: Duration = Duration::from_secs(1);

impl HostThread {
    pub(super) fn accept(&mut self) {
        for _ in 0..ACCEPTED_PER_TURN {
            let Some(listener) = &self.listener else { return };
            let stream = match listener.accept() {
                Ok(stream) => stream,
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => {
                    let is_full = matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE));
                    if !(is_full && self.reject_next()) {
                        self.pause();
                    }
                    return;
                }
            };
            let is_near_limit = self.is_near_limit(stream.as_fd().as_raw_fd());
            self.last_peer += 1;
            let peer = self.last_peer;
            let _ = stream.set_nodelay();
            if self.poller.add(&stream, peer, Interest::Readable).is_ok() {
                self.connections.insert(peer, Connection::new(stream, Decoder::new(self.limits)));
            }
            if is_near_limit {
                return self.close_silent();
            }
        }
    }

    /// Whether so few descriptors are left that the rest of the process needs them.
    fn is_near_limit(&self, number: RawFd) -> bool {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        self.agents.is_some()
            && u64::try_from(number).is_ok_and(|number| number.saturating_add(RESERVED_DESCRIPTORS) >= limit)
    }

    /// Closes the connections that have sent nothing for too long. If there are none, it accepts no further connection until one has been
    /// silent for that long; new connections wait in the listener's queue.
    fn close_silent(&mut self) {
        let now = Instant::now();
        let silent = self.connections.iter().filter_map(|(peer, connection)| Some((*peer, connection.silent_since?)));
        let silent: Vec<_> = silent.collect();
        let is_old = |since: &Instant| now.saturating_duration_since(*since) >= SILENT_TIMEOUT;
        let old: Vec<Peer> = silent.iter().filter(|(_, since)| is_old(since)).map(|(peer, _)| *peer).collect();
        if old.is_empty() {
            let next = silent.iter().map(|(_, since)| *since + SILENT_TIMEOUT).min();
            return self.pause_until(next.unwrap_or(now + PAUSE));
        }
        for peer in &old {
            self.disconnect(*peer);
        }
        let text = format!(
            "file descriptors ran short: closed {} connections to the rendezvous that had sent nothing for {} s; raise the limit (ulimit -n) or find the program that opens them",
            old.len(),
            SILENT_TIMEOUT.as_secs()
        );
        self.decide(HostEvent::ForeignPeer(text));
    }

    /// The process has no descriptor left: frees the spare one, accepts the next connection on it and closes that, so that the poller stops
    /// reporting it. The client retries later. Returns whether this succeeded.
    fn reject_next(&mut self) -> bool {
        let is_rejected =
            self.spare.take().is_some() && self.listener.as_ref().is_some_and(|from| from.accept().is_ok());
        self.spare = WakeFd::new().ok();
        is_rejected
    }

    /// Stops accepting for a while. Connections stay in the listener's queue, and the poller does not report them.
    fn pause(&mut self) {
        self.pause_until(Instant::now() + PAUSE);
    }

    fn pause_until(&mut self, at: Instant) {
        self.watch_listener(Interest::Hangup);
        self.resume_at = Some(at);
        self.set_timer();
    }

    pub(super) fn watch_listener(&self, interest: Interest) {
        if let Some(listener) = &self.listener {
            // Cannot fail: the descriptor is valid.
            let _ = self.poller.modify(listener, LISTENER, interest);
        }
    }
}
