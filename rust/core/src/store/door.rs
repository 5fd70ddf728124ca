//! The store's door: connections are accepted while there are descriptors for them.

use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};

use super::connection::Connection;
use super::server::{LISTENER, Peer, Worker};
use super::wire::Decoder;
use crate::rendezvous::rounds::Event;
use crate::sys::poller::Interest;
use crate::sys::wake::WakeFd;

/// How many connections are accepted before those that are there have their turn.
const ACCEPTED_PER_TURN: usize = 256;

/// How long it does not listen after a connection could not be accepted.
const PAUSE: Duration = Duration::from_millis(100);

/// So many descriptors are left to the rest of the agent's process.
const RESERVE: u64 = 64;

/// When descriptors run short, a connection that has said nothing for so long is ended. Agents and workers speak at once.
const STRANGER_PATIENCE: Duration = Duration::from_secs(1);

impl Worker {
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

    /// Ends the connections that have said nothing for too long. Where there are none, no other is accepted until one has been silent for so
    /// long: others wait in the listener's queue.
    fn make_room(&mut self) {
        let now = Instant::now();
        let silent = self.connections.iter().filter_map(|(peer, connection)| Some((*peer, connection.silent_since?)));
        let silent: Vec<_> = silent.collect();
        let is_old = |since: &Instant| now.saturating_duration_since(*since) >= STRANGER_PATIENCE;
        let old: Vec<Peer> = silent.iter().filter(|(_, since)| is_old(since)).map(|(peer, _)| *peer).collect();
        if old.is_empty() {
            let next = silent.iter().map(|(_, since)| *since + STRANGER_PATIENCE).min();
            return self.pause_until(next.unwrap_or(now + PAUSE));
        }
        for peer in &old {
            self.end(*peer);
        }
        let text = format!(
            "file descriptors ran short: closed {} connections to the rendezvous that had said nothing for {} s; raise the limit (ulimit -n) or find their sender",
            old.len(),
            STRANGER_PATIENCE.as_secs()
        );
        self.decide(Event::Stranger(text));
    }

    /// No descriptor is to be had: the next connection is accepted on the spare one and dropped. Its client tries again later; left
    /// where it is, it would be reported for ever. Whether that was done.
    fn turn_away(&mut self) -> bool {
        let is_done = self.spare.take().is_some() && self.listener.as_ref().is_some_and(|from| from.accept().is_ok());
        self.spare = WakeFd::new().ok();
        is_done
    }

    /// Connections cannot be accepted now, nor turned away: they are left where they are, and not reported for a while.
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
            // It fails for a descriptor that is none.
            let _ = self.poller.modify(listener, LISTENER, interest);
        }
    }
}
