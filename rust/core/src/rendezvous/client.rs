//! An agent's membership in a rendezvous, as its program sees it. The thread that talks to the host is in `talker`.

use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::member::{self, Call, Settings, Standing};
use super::message::Introduction;
use super::talker::Talker;
use crate::error::{Error, Result};
use crate::published::{Published, Wake};
use crate::sys::lease::LeasePage;
use crate::sys::threads;
use crate::sys::wake::WakeFd;

const THREAD: &str = "ferro-rdzv";

/// What the program can see.
#[derive(Debug)]
pub(super) struct View {
    pub(super) standing: Standing,
    /// Wishes to join that the thread has not heard of.
    pub(super) joins_under_way: usize,
    /// This node, as the host is reached from it.
    pub(super) address: Option<IpAddr>,
    pub(super) remarks: Vec<String>,
    pub(super) failure: Option<String>,
    pub(super) is_closed: bool,
}

impl View {
    /// Of an agent that has not asked for anything.
    pub(super) fn new() -> Self {
        Self {
            standing: Standing::Idle,
            joins_under_way: 0,
            address: None,
            remarks: Vec::new(),
            failure: None,
            is_closed: false,
        }
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) view: Published<View>,
    /// Readable while there is something that an agent whose workers run has to look at.
    pub(super) alarm: WakeFd,
    /// Until when the workers may run.
    pub(super) lease: Arc<LeasePage>,
    pub(super) endpoint: String,
}

impl Shared {
    pub(super) fn publish(&self, change: impl FnOnce(&mut View)) {
        self.view.publish(|view| {
            change(view);
            // Under the lock of the view, so that the alarm is about what is published.
            let is_quiet = matches!(view.standing, Standing::Joining | Standing::Placed(_) | Standing::Idle);
            if is_quiet && view.remarks.is_empty() && !view.is_closed {
                self.alarm.drain();
            } else {
                self.alarm.wake();
            }
        });
    }
}

/// An agent's membership in a rendezvous. Ends when it is dropped.
#[derive(Debug)]
pub struct Client {
    calls: Sender<Option<Call>>,
    wake: Arc<WakeFd>,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    owner: u32,
}

impl Client {
    /// Begins a membership; connects when it is asked to join.
    ///
    /// `host` and `port` say where the rendezvous is, `who` is the agent. Where its name is empty, it is the address of this node.
    pub fn start(host: &str, port: u16, who: Introduction, settings: Settings) -> Result<Self> {
        let wake = WakeFd::new().map_err(|source| Error::os("create", "an eventfd", source))?;
        let alarm = WakeFd::new().map_err(|source| Error::os("create", "an eventfd", source))?;
        let wake = Arc::new(wake);
        let lease = LeasePage::create().map_err(|source| Error::os("create", "the page of a lease", source))?;
        let (lease, endpoint) = (Arc::new(lease), settings.endpoint.clone());
        let shared = Arc::new(Shared { view: Published::new(View::new()), alarm, lease, endpoint });
        let (calls, inbox) = channel();
        let talker = Talker::new((host.to_owned(), port), who, settings, inbox, Arc::clone(&wake), Arc::clone(&shared))
            .map_err(|source| Error::os("create", "the poller of a rendezvous", source))?;
        let thread = threads::builder(THREAD).spawn(move || talker.run());
        let thread = thread.map_err(|source| Error::os("start", "the thread of a rendezvous", source))?;
        Ok(Self { calls, wake, shared, thread: Mutex::new(Some(thread)), owner: std::process::id() })
    }

    /// Says what the agent wants.
    pub fn call(&self, call: Call) -> Result<()> {
        self.check_owner()?;
        if matches!(call, Call::Join { .. }) {
            self.shared.view.publish(|view| view.joins_under_way += 1);
        }
        self.calls.send(Some(call)).map_err(|_| Error::Closed)?;
        self.wake.wake();
        Ok(())
    }

    /// How the agent stands.
    pub fn standing(&self) -> Result<Standing> {
        self.check_owner()?;
        // What is known from before a wish to join says nothing about it.
        let standing = self.shared.view.read(|view| match view.joins_under_way {
            0 => view.standing.clone(),
            _ => Standing::Joining,
        });
        // After a suspension of this process its thread may not have looked yet.
        Ok(match standing {
            Standing::Placed(place) if self.shared.lease.is_over() => {
                Standing::Over(place, member::lapsed(&self.shared.endpoint))
            }
            standing => standing,
        })
    }

    /// Until when the workers of this node may run, in shared memory: the guard ends them then, also while this process is suspended.
    #[must_use]
    pub fn lease(&self) -> &Arc<LeasePage> {
        &self.shared.lease
    }

    /// How long the workers of this node may still run, if the lease has lapsed.
    #[must_use]
    pub fn lapsed_left(&self) -> Option<Duration> {
        self.shared.lease.left().filter(|_| self.shared.lease.is_over())
    }

    /// The address of this node by which it reaches the host, once it does.
    #[must_use]
    pub fn address(&self) -> Option<IpAddr> {
        self.shared.view.read(|view| view.address)
    }

    /// Takes what the host wants people to know.
    #[must_use]
    pub fn take_remarks(&self) -> Vec<String> {
        let mut remarks = Vec::new();
        // To look is no news: who waits for news looks each time.
        if self.shared.view.read(|view| view.remarks.is_empty()) {
            return remarks;
        }
        self.shared.publish(|view| remarks = std::mem::take(&mut view.remarks));
        remarks
    }

    /// Grows with each change of how the agent stands.
    pub fn generation(&self) -> Result<u64> {
        self.check_owner()?;
        Ok(self.shared.view.generation())
    }

    /// Blocks until there is something newer than `generation`, `timeout` has passed (`None`: never), or one of `others` is readable.
    pub fn wait(
        &self,
        generation: u64,
        timeout: Option<Duration>,
        others: [Option<BorrowedFd<'_>>; 2],
    ) -> Result<Wake> {
        self.check_owner()?;
        self.shared.view.wait(generation, timeout, others, |view| match &view.failure {
            Some(text) => Err(Error::Panicked { thread: THREAD, text: text.clone() }),
            None if view.is_closed => Err(Error::Closed),
            None => Ok(()),
        })
    }

    /// Readable while there are remarks, and from when a round is over, or the rendezvous, until the agent asks to join.
    #[must_use]
    pub fn alarm(&self) -> BorrowedFd<'_> {
        self.shared.alarm.as_fd()
    }

    /// Ends the membership. What was asked for before is still said.
    pub fn close(&self) -> Result<()> {
        self.check_owner()?;
        let _ = self.calls.send(None);
        self.wake.wake();
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = thread.join();
        }
        Ok(())
    }

    fn check_owner(&self) -> Result<()> {
        let here = std::process::id();
        if here == self.owner { Ok(()) } else { Err(Error::Forked { owner: self.owner, here }) }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.close();
    }
}
