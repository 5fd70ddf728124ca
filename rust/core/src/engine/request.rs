//! What handles ask of the engine thread.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use super::health::HealthRequest;
use super::view::View;
use super::watchdog::Work;
use crate::error::Result;
use crate::logs::{TailReport, TailSpec};
use crate::supervise::{Event, Moment};
use crate::sys::beats::Page;
use crate::sys::fifo::Fifo;
use crate::sys::guard::{Guard, Program};
use crate::sys::lease::LeasePage;
use crate::sys::spawn::Command;
use crate::sys::wait::{Status, Usage};
use crate::watchdog::{Config, Gathered, Reports};

/// Where an answer goes; it has room for it, so that the engine thread never waits to give one.
pub(super) type Reply<T> = SyncSender<T>;

/// A group that was made.
pub(super) struct Started {
    pub(super) id: u64,
    pub(super) pids: Vec<i32>,
    pub(super) view: Arc<View>,
}

/// A process that Python started.
pub(super) struct Observed {
    pub(super) pid: i32,
    /// A descriptor that becomes readable when the process ends, for systems without pidfd.
    pub(super) sentinel: Option<OwnedFd>,
}

pub(super) enum Request {
    Spawn {
        commands: Vec<Command>,
        reply: Reply<Result<Started>>,
    },
    Observe {
        processes: Vec<Observed>,
        reply: Reply<Result<Started>>,
    },
    /// Stop, stop on failure, hurry.
    Decide {
        group: u64,
        event: Event,
    },
    Signal {
        group: u64,
        index: usize,
        signal: i32,
        leader_only: bool,
        reply: Reply<io::Result<bool>>,
    },
    Release {
        group: u64,
    },
    /// From a waiting thread, where there are no pidfds.
    Ended {
        process: u64,
        status: Status,
        usage: Usage,
        at: Moment,
    },
    Tail {
        spec: TailSpec,
        reply: Reply<Result<u64>>,
    },
    FinishTail {
        tail: u64,
        patience: Duration,
        reply: Reply<TailReport>,
    },
    DropTail {
        tail: u64,
    },
    /// A watchdog, its files already made.
    Watch {
        config: Config,
        files: (Fifo, Page),
        reports: Arc<Reports>,
        reply: Reply<u64>,
    },
    /// Something to do to a watchdog.
    Watchdog {
        id: u64,
        work: Work,
    },
    /// Evidence that a thread has gathered.
    Gathered {
        watchdog: u64,
        gathered: Gathered,
    },
    Unwatch {
        id: u64,
        reply: Option<Reply<()>>,
    },
    Health(HealthRequest),
    AdoptGuard {
        guard: Guard,
        program: Program,
        reply: Reply<Result<()>>,
    },
    WatchLease(Arc<LeasePage>),
    OwnOrphans,
    UseCgroup {
        folder: Option<OwnedFd>,
        reply: Reply<bool>,
    },
    DismissGuard {
        reply: Reply<()>,
    },
    Close {
        kill_wait: Duration,
    },
}
