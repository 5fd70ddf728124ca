//! Orders from a handle to its watchdog on the engine thread.

use std::time::{Duration, Instant};

use super::report::WatchdogCounts;
use super::server::{WatchdogServer, WorkerProcess};
use super::wire::TimerRequest;
use crate::error::Result;
use crate::sys::clock::Moment;
use crate::sys::poller::Poller;
use crate::thread::Reply;

/// An order to a watchdog, carried out immediately. Orders that only read do not change timers.
pub(crate) enum WatchdogOrder {
    Start(Reply<Result<()>>),
    SetWorkers(Vec<WorkerProcess>, Reply<()>),
    Register(Vec<TimerRequest>, Reply<()>),
    Clear(Vec<i32>, Reply<()>),
    Timers(Reply<Vec<TimerRequest>>),
    Counts(Reply<WatchdogCounts>),
    LastHeard(i32, Reply<Option<Duration>>),
    Overdue(Reply<Duration>),
    #[cfg(test)]
    Run(Box<dyn FnOnce(&mut WatchdogServer) + Send>),
}

impl WatchdogServer {
    /// Carries out an order and replies. Sending fails if the caller has stopped waiting.
    pub(crate) fn handle(&mut self, order: WatchdogOrder, poller: &Poller) {
        match order {
            WatchdogOrder::Start(reply) => drop(reply.send(self.start(poller))),
            WatchdogOrder::SetWorkers(workers, reply) => {
                self.set_workers(workers);
                let _ = reply.send(());
            }
            WatchdogOrder::Register(requests, reply) => {
                let now = Moment::now();
                for request in requests {
                    self.accept(request, now, poller);
                }
                let _ = reply.send(());
            }
            WatchdogOrder::Clear(pids, reply) => {
                for pid in pids {
                    self.clear(pid);
                }
                let _ = reply.send(());
            }
            WatchdogOrder::Timers(reply) => drop(reply.send(self.timers())),
            WatchdogOrder::Counts(reply) => drop(reply.send(self.counts())),
            WatchdogOrder::LastHeard(pid, reply) => drop(reply.send(self.last_heard(pid, Moment::now()))),
            WatchdogOrder::Overdue(reply) => drop(reply.send(self.overdue(Instant::now()))),
            #[cfg(test)]
            WatchdogOrder::Run(work) => work(self),
        }
    }
}
