//! Orders from a handle to its health server on the engine thread.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::liveness::Answer;
use super::question::ProgressQuestion;
use super::server::Servers;
use super::status::Update;
use crate::error::Result;
use crate::supervise::Exit;
use crate::sys::net::Listener;
use crate::sys::poller::Poller;
use crate::thread::Reply;

/// An order to the health servers.
pub(crate) enum HealthOrder {
    Open { listener: Listener, question: Arc<ProgressQuestion>, timeout: Duration, reply: Reply<Result<u64>> },
    Started { server: u64, at: Instant },
    Answered { server: u64, at: Instant, answer: Answer },
    Update { server: u64, update: Update },
    Close { server: u64, reply: Option<Reply<()>> },
}

impl HealthOrder {
    /// Carries out the order. `id` becomes the id of a new server; `exits` are the exits of all supervised processes.
    pub(crate) fn handle<'a>(
        self,
        servers: &mut Servers,
        poller: &Poller,
        id: u64,
        exits: impl Iterator<Item = &'a [Exit]>,
    ) {
        match self {
            Self::Open { listener, question, timeout, reply } => {
                let _ = reply.send(servers.open(id, listener, question, timeout, poller).map(|()| id));
            }
            Self::Started { server, at } => servers.started(server, at),
            Self::Answered { server, at, answer } => servers.answered(server, at, answer),
            Self::Update { server, update } => {
                let is_new_round = matches!(update, Update::Workers(_));
                servers.update(server, Instant::now(), update);
                if is_new_round {
                    // A worker may have exited before this order arrived.
                    exits.for_each(|exits| servers.record_exits(exits));
                }
            }
            Self::Close { server, reply } => {
                servers.close(server, poller);
                if let Some(reply) = reply {
                    let _ = reply.send(());
                }
            }
        }
    }
}
