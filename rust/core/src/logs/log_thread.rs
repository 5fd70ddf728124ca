//! The thread that copies the workers' streams that are not redirected (`ferro-log`). Supervision does not wait for it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::events::Events;
use super::relay::{RelayReport, RelayState, unpack_token};
use crate::error::Result;
use crate::thread::{CloseOutcome, Inbox, NativeThread, Reply, Service, ThreadOrder};

/// An order to the thread.
pub(super) enum LogOrder {
    Relay {
        id: u64,
        relay: Box<RelayState>,
    },
    FlushRelay {
        id: u64,
        reply: Reply<()>,
    },
    /// Handling the order closes the workers' ends. Until then the streams do not end.
    FinishRelay {
        id: u64,
        timeout: Duration,
        reply: Reply<RelayReport>,
    },
    /// The handle is dropped.
    ReleaseRelay {
        id: u64,
    },
    Close,
}

impl ThreadOrder for LogOrder {
    fn close() -> Self {
        Self::Close
    }
}

/// The handle of the thread.
#[derive(Debug)]
pub(crate) struct LogThread {
    pub(super) line: NativeThread<LogOrder>,
    last_id: AtomicU64,
}

impl LogThread {
    /// Starts the thread.
    pub(crate) fn start() -> Result<Self> {
        Ok(Self { line: NativeThread::start("ferro-log", LogService::new)?, last_id: AtomicU64::new(0) })
    }

    /// Copies the available bytes and ends the thread. `false` if the thread has not ended within `timeout`.
    pub(crate) fn close(&self, timeout: Duration) -> Result<bool> {
        let ended = self.line.close(LogOrder::Close, Some(timeout))?;
        Ok(matches!(ended, CloseOutcome::Ended(_)))
    }

    pub(super) fn next_id(&self) -> u64 {
        self.last_id.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// The state of the thread.
struct LogService {
    events: Events<LogOrder>,
    relays: BTreeMap<u64, RelayState>,
    is_closing: bool,
}

impl LogService {
    fn new(inbox: Inbox<LogOrder>) -> Result<Self> {
        Ok(Self { events: Events::new(inbox, "ferro-log")?, relays: BTreeMap::new(), is_closing: false })
    }

    fn handle(&mut self, order: LogOrder) {
        match order {
            LogOrder::Relay { id, relay } => {
                self.relays.entry(id).or_insert(*relay).watch(&self.events.poller);
            }
            LogOrder::FlushRelay { id, reply } => {
                if let Some(relay) = self.relays.get_mut(&id) {
                    relay.copy_all(&self.events.poller);
                }
                let _ = reply.send(());
            }
            LogOrder::FinishRelay { id, timeout, reply } => match self.relays.get_mut(&id) {
                Some(relay) => relay.finish(timeout, Instant::now(), reply),
                None => drop(reply.send(RelayReport::default())),
            },
            LogOrder::ReleaseRelay { id } => {
                if let Some(relay) = self.relays.get(&id) {
                    relay.release_worker_ends();
                }
            }
            LogOrder::Close => self.is_closing = true,
        }
    }
}

impl Service for LogService {
    type Order = LogOrder;

    fn serve(&mut self) -> Result<()> {
        let mut ready = Vec::new();
        while !self.is_closing {
            let next = self.relays.values().filter_map(RelayState::next_tick).min();
            let is_busy = self.relays.values().any(RelayState::is_busy);
            let orders = self.events.wait(next, is_busy, &mut ready)?;
            for order in orders {
                self.handle(order);
            }
            for token in ready.drain(..) {
                let (id, slot) = unpack_token(token);
                if let Some(relay) = self.relays.get_mut(&id) {
                    relay.handle_ready(slot, &self.events.poller);
                }
            }
            let now = Instant::now();
            let poller = &self.events.poller;
            self.relays.retain(|_, relay| {
                relay.tick(now, poller);
                let is_over = relay.is_over();
                if is_over {
                    relay.close(poller);
                }
                !is_over
            });
        }
        Ok(())
    }

    fn finish(&mut self, _outcome: &Result<()>) {
        for relay in self.relays.values_mut() {
            relay.close_worker_ends();
            relay.close(&self.events.poller);
            relay.hand_over();
        }
    }
}
