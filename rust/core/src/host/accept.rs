//! Accepting connections while the process has descriptors left.

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

/// Connections accepted before the existing ones have their turn.
const ACCEPTED_PER_TURN: usize = 256;

/// Pause after a connection could not be accepted.
const PAUSE: Duration = Duration::from_millis(100);

/// Descriptors left to the rest of the agent's process.
const RESERVE: u64 = 64;

/// When descriptors run short, a connection that has sent nothing for this long is closed. Agents and workers send at once.
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
                    if !(is_full && self.turn_away()) {
                        self.pause();
                    }
                    return;
                }
            };
            let is_short = self.is_short_of(stream.as_fd().as_raw_fd());
            self.last_peer += 1;
            let peer = self.last_peer;
            let _ = stream.set_nodelay();
            if self.poller.add(&stream, peer, Interest::Readable).is_ok() {
                self.connections.insert(peer, Connection::new(stream, Decoder::new(self.limits)));
            }
            if is_short {
                return self.make_room();
            }
        }
    }

    /// Whether so few descriptors are left that the rest of this process needs them.
    fn is_short_of(&self, number: RawFd) -> bool {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        self.agents.is_some() && u64::try_from(number).is_ok_and(|number| number.saturating_add(RESERVE) >= limit)
    }

    /// Closes the connections that have sent nothing for too long. If there are none, it accepts no further connection until one has been
    /// silent for that long; new connections wait in the listener's queue.
    fn make_room(&mut self) {
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
            "file descriptors ran short: closed {} connections to the rendezvous that had said nothing for {} s; raise the limit (ulimit -n) or find their sender",
            old.len(),
            SILENT_TIMEOUT.as_secs()
        );
        self.decide(HostEvent::Stranger(text));
    }

    /// The process has no descriptor left: accepts the next connection on the spare one and drops it, so that the poller stops reporting
    /// it. Its client retries later. Returns whether that succeeded.
    fn turn_away(&mut self) -> bool {
        let is_done = self.spare.take().is_some() && self.listener.as_ref().is_some_and(|from| from.accept().is_ok());
        self.spare = WakeFd::new().ok();
        is_done
    }

    /// Connections can be neither accepted nor turned away now. They stay in the queue, and the poller does not report them for a while.
    fn pause(&mut self) {
        self.pause_until(Instant::now() + PAUSE);
    }

    fn pause_until(&mut self, at: Instant) {
        self.listen(Interest::Hangup);
        self.listen_at = Some(at);
        self.set_timer();
    }

    pub(super) fn listen(&self, interest: Interest) {
        if let Some(listener) = &self.listener {
            // Cannot fail: the descriptor is valid.
            let _ = self.poller.modify(listener, LISTENER, interest);
        }
    }
}
