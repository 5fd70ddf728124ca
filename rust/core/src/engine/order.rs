//! Orders from handles to the engine thread.

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use super::processes::SharedFile;
use super::progress::GroupProgress;
use crate::error::Result;
use crate::health::HealthOrder;
use crate::logs::TeeEvent;
use crate::supervise::GroupEvent;
use crate::sys::beats::BeatPage;
use crate::sys::clock::Moment;
use crate::sys::fifo::Fifo;
use crate::sys::guard::{Guard, Program};
use crate::sys::lease::LeasePage;
use crate::sys::spawn::Command;
use crate::sys::wait::{ExitStatus, Usage};
use crate::thread::{NativeThread, Reply, ThreadOrder};
use crate::warm::{WarmProgress, WarmSpec};
use crate::watchdog::{Config, Evidence, Reports, WatchdogOrder};

/// The connection from a handle to the engine thread. The thread ends when the last handle is dropped.
pub(super) type Line = NativeThread<EngineOrder>;

/// A new group.
pub(super) struct StartedGroup {
    pub(super) id: u64,
    pub(super) pids: Vec<i32>,
    pub(super) progress: Arc<GroupProgress>,
    /// Indices of the processes that were released from a pool.
    pub(super) warm: Vec<usize>,
}

/// A process that the program itself started and reaps.
pub(super) struct Observed {
    pub(super) pid: i32,
    /// A descriptor that becomes readable when the process ends. Used on kernels without pidfds.
    pub(super) sentinel: Option<OwnedFd>,
}

/// An order about a pool of warm workers.
pub(super) enum PoolOrder {
    Open {
        spec: Box<WarmSpec>,
        reply: Reply<Result<(u64, Arc<WarmProgress>)>>,
    },
    Resize {
        id: u64,
        children: usize,
        delayed: bool,
    },
    /// Releases one process that the program supervises. The descriptors come with their numbers in that process.
    Release {
        id: u64,
        command: Box<Command>,
        fds: Vec<(RawFd, OwnedFd)>,
        reply: Reply<Option<i32>>,
    },
    Close {
        id: u64,
        reply: Option<Reply<()>>,
    },
}

/// An order to the engine thread.
pub(super) enum EngineOrder {
    Spawn {
        commands: Vec<Command>,
        pool: Option<u64>,
        stop_file: SharedFile,
        reply: Reply<Result<StartedGroup>>,
    },
    Pool(PoolOrder),
    Observe {
        processes: Vec<Observed>,
        stop_file: SharedFile,
        reply: Reply<Result<StartedGroup>>,
    },
    /// An event for the state machine of a group.
    GroupEvent {
        group: u64,
        event: GroupEvent,
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
    /// An exit, reported by a waiting thread on kernels without pidfds.
    Exited {
        process: u64,
        status: ExitStatus,
        usage: Usage,
        at: Moment,
    },
    Logs(TeeEvent),
    /// Adds a watchdog whose pipe and heartbeat page exist.
    CreateWatchdog {
        config: Config,
        files: (Fifo, BeatPage),
        reports: Arc<Reports>,
        reply: Reply<u64>,
    },
    Watchdog {
        id: u64,
        order: WatchdogOrder,
    },
    /// Reads the pipe of a watchdog until it is empty, then handles the expired timers.
    DrainWatchdog {
        id: u64,
        reply: Reply<()>,
    },
    /// Evidence from a collecting thread.
    Evidence {
        watchdog: u64,
        evidence: Evidence,
    },
    CloseWatchdog {
        id: u64,
        reply: Option<Reply<()>>,
    },
    Health(HealthOrder),
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

impl ThreadOrder for EngineOrder {
    fn close() -> Self {
        Self::Close { kill_wait: Duration::ZERO }
    }
}
