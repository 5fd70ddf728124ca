//! Connects agents with the rendezvous: passes their messages to the decisions and carries out the actions.

use std::time::{Duration, Instant};

use super::connection::{Connection, Protocol};
use super::frames::AgentFrames;
use super::thread::HostThread;
use super::torchrun_peer::{self, Admission};
use crate::rendezvous::message::{self, AgentMessage, HostMessage, MAX_TEXT_BYTES};
use crate::rendezvous::rounds::{HostAction, HostEvent};
use crate::store::state::Peer;
use crate::store::wire::{Key, StoreRequest};
use crate::sys::clock::after;
use crate::text::bounded;

/// NCCL's watchdog sets this key when it gives up. The other ranks then dump their state and abort.
const DUMP_KEY: &[u8] = b"/exception_dump";
/// By default the dump takes 15 s at most.
const DUMP_GRACE: Duration = Duration::from_secs(20);
/// NCCL's watchdog sets this key when a collective has failed. Its process then exits by itself with the exit code.
const ERROR_KEY: &[u8] = b"/remote_error";
const ERROR_GRACE: Duration = Duration::from_secs(1);

/// Maximum number of reports about torchrun agents, because they retry again and again.
const MAX_TORCHRUN_REPORTS: u32 = 8;

impl HostThread {
    /// A connection has changed to the rendezvous protocol; `rest` holds the bytes after the upgrade.
    pub(super) fn upgrade(&mut self, peer: Peer, rest: Vec<u8>) {
        self.state.forget(peer);
        let Some(agents) = &mut self.agents else {
            self.flush();
            return self.disconnect(peer);
        };
        agents.unintroduced.push_back((after(agents.silence), peer));
        if let Some(connection) = self.connections.get_mut(&peer) {
            connection.protocol = Protocol::Agent(AgentFrames::new(rest));
            // If this fails, heartbeats alone detect a broken network.
            let _ = connection.stream.set_peer_timeout(agents.silence);
        }
        self.take_messages(peer);
        self.set_timer();
    }

    /// Handles the complete messages of an agent.
    pub(super) fn take_messages(&mut self, peer: Peer) {
        while let Some(frames) = self.connections.get_mut(&peer).and_then(Connection::frames) {
            match frames.next() {
                Ok(Some(mut request)) => {
                    if let AgentMessage::Enter(agent) = &mut request {
                        agent.is_host &= agent.pid == std::process::id() && self.is_local(peer);
                    }
                    self.decide(HostEvent::from_message(peer, request));
                }
                Ok(None) => break,
                Err(violation) => self.reject_agent(peer, &violation.to_string()),
            }
        }
        self.flush();
    }

    /// Rejects an agent that violates the protocol: sends it the reason and closes its connection.
    fn reject_agent(&mut self, peer: Peer, reason: &str) {
        self.decide(HostEvent::Lost(peer, reason.to_owned()));
        if let Some(connection) = self.connections.get_mut(&peer) {
            message::encode(&HostMessage::Refused { text: reason.to_owned() }, connection.output());
            self.to_flush.push(peer);
        }
        self.flush();
        self.disconnect(peer);
    }

    /// Closes the connections that have not introduced themselves by their deadline.
    pub(super) fn close_unintroduced(&mut self, now: Instant) {
        while let Some(agents) = &mut self.agents
            && let Some((until, peer)) = agents.unintroduced.front().copied()
            && now >= until
        {
            agents.unintroduced.pop_front();
            if self.connections.get(&peer).is_some_and(|connection| !connection.is_introduced()) {
                self.disconnect(peer);
            }
        }
    }

    /// Passes an event to the rendezvous and carries out the actions.
    pub(super) fn decide(&mut self, event: HostEvent) {
        let Some(agents) = &mut self.agents else { return };
        let mut actions = agents.rounds.step(Instant::now(), event);
        let (mut to_disconnect, mut probed) = (Vec::new(), Vec::new());
        for action in actions.drain(..) {
            match action {
                HostAction::RenewStore => self.renew_store(),
                HostAction::Send(peer, message) => {
                    if let Some(connection) = self.connections.get_mut(&peer) {
                        message::encode(&message, connection.output());
                        self.to_flush.push(peer);
                    }
                }
                HostAction::CheckProbe(peer) => probed.push(peer),
                HostAction::Disconnect(peer) => to_disconnect.push(peer),
            }
        }
        self.flush();
        for peer in probed {
            let stream = self.connections.get(&peer).map(|connection| &connection.stream);
            if let Some(is_acknowledged) = stream.and_then(|stream| stream.is_acknowledged().ok()) {
                self.decide(HostEvent::ProbeChecked(peer, is_acknowledged));
            }
        }
        for peer in to_disconnect {
            self.disconnect(peer);
        }
        self.set_timer();
    }

    /// Whether an agent is connected.
    pub(super) fn has_agents(&self) -> bool {
        self.connections.values().any(Connection::is_introduced)
    }

    /// Tells all agents that the rendezvous has ended with this node.
    pub(super) fn announce_end(&mut self, text: &str) {
        let (text, detail) = (bounded(text, MAX_TEXT_BYTES).to_owned(), String::new());
        let message = HostMessage::Closed { text, code: 1, detail, is_loss: true, decision: None };
        for connection in self.connections.values_mut().filter(|connection| connection.is_introduced()) {
            message::encode(&message, connection.output());
            // An agent whose socket buffer is full sees the end of the connection instead.
            let _ = connection.send();
        }
    }

    /// Inspects a request before the store applies it; `false` if the store must not apply it.
    pub(super) fn admit(&mut self, peer: Peer, request: &StoreRequest) -> bool {
        if self.agents.is_none() {
            return true;
        }
        let admission = torchrun_peer::screen(request);
        if admission != Admission::Worker {
            self.report_torchrun_peer(peer);
        }
        match admission {
            Admission::Worker => {
                if let StoreRequest::Set { key, value } = request {
                    self.check_announcement(key, value);
                }
                true
            }
            Admission::Answer(answer) => {
                if let Some(connection) = self.connections.get_mut(&peer) {
                    connection.reply(answer);
                    self.to_flush.push(peer);
                }
                false
            }
            Admission::Disconnect => {
                self.disconnect(peer);
                false
            }
        }
    }

    fn report_torchrun_peer(&mut self, peer: Peer) {
        let address = self.connections.get(&peer).and_then(|connection| connection.stream.peer_address().ok());
        let from = address.map_or_else(String::new, |address| format!(" from {}", address.ip()));
        let Some(agents) = &mut self.agents else { return };
        agents.rejected_torchrun += 1;
        if agents.rejected_torchrun <= MAX_TORCHRUN_REPORTS {
            let text = format!(
                "an agent of torchrun{from} tried to join and was turned away: start that node with ferrorun too"
            );
            self.decide(HostEvent::ForeignPeer(text));
        }
    }

    /// Handles a key that a worker has set: it may announce a failure.
    fn check_announcement(&mut self, key: &Key, value: &[u8]) {
        let grace = match &**key {
            DUMP_KEY => DUMP_GRACE,
            ERROR_KEY => ERROR_GRACE,
            _ => return,
        };
        // The value is the rank as a native int.
        let sender =
            value.try_into().map_or_else(|_| "a worker".into(), |rank| format!("rank {}", i32::from_le_bytes(rank)));
        let key = String::from_utf8_lossy(key);
        self.decide(HostEvent::FailureAnnounced { text: format!("{sender} wrote {key} to the store"), grace });
    }

    fn is_local(&self, peer: Peer) -> bool {
        let stream = self.connections.get(&peer).map(|connection| &connection.stream);
        let addresses = stream.and_then(|stream| stream.local_address().ok().zip(stream.peer_address().ok()));
        addresses.is_some_and(|(here, there)| here.ip() == there.ip())
    }
}
