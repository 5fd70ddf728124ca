//! What the engine's tests share.
#![allow(dead_code, unused_imports, unused_macros, reason = "each test program uses some of it")]

pub(crate) mod sys;

use std::ffi::CString;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ferroelastic_core::Engine;
use ferroelastic_core::engine::{Group, StopReport};
use ferroelastic_core::published::Wake;
use ferroelastic_core::supervise::{Exit, StopPlan};
use ferroelastic_core::sys::probe::{self, Support};
use ferroelastic_core::sys::procfs;
use ferroelastic_core::sys::spawn::{Command, Stdio};
use ferroelastic_core::vocabulary::StopReason;

/// No test waits longer for a fact that must come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A way to notice exits.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Backend {
    /// pidfds that also signal the group of their process.
    GroupPidfds,
    Pidfds,
    /// The fallback: one `waitid` thread per worker.
    Threads,
}

impl Backend {
    const ALL: [Self; 3] = [Self::GroupPidfds, Self::Pidfds, Self::Threads];

    /// An engine on this backend; `None`, with a line of output, where the kernel does not have it.
    pub(crate) fn engine(self) -> Option<Engine> {
        let best = probe::probe();
        let support = match self {
            Self::GroupPidfds if best.group_signals => best,
            Self::Pidfds if best.pidfd => Support { group_signals: false, ..best },
            Self::Threads => Support::NONE,
            _ => {
                eprintln!("skipped: this kernel does not have the backend {self:?}");
                return None;
            }
        };
        eprintln!("backend {self:?}"); // shown only when the test fails
        Some(Engine::start_with(support).expect("engine"))
    }

    pub(crate) fn run(self, test: fn(&Engine)) {
        if let Some(engine) = self.engine() {
            test(&engine);
        }
    }
}

/// Makes a function of an engine one test per backend: `name::on_group_pidfds`, `name::on_pidfds`, `name::on_threads`.
macro_rules! on_each_backend {
    ($name:ident) => {
        mod $name {
            use crate::support::Backend;

            #[test]
            fn on_group_pidfds() {
                Backend::GroupPidfds.run(super::$name);
            }

            #[test]
            fn on_pidfds() {
                Backend::Pidfds.run(super::$name);
            }

            #[test]
            fn on_threads() {
                Backend::Threads.run(super::$name);
            }
        }
    };
}
pub(crate) use on_each_backend;

/// One engine after the other, for tests that look at the whole process. The output of a failed test ends with its backend.
pub(crate) fn engines() -> impl Iterator<Item = Engine> {
    Backend::ALL.into_iter().filter_map(Backend::engine)
}

/// An engine on the best backend.
pub(crate) fn best_engine() -> Engine {
    engines().next().expect("threads are always there")
}

pub(crate) fn zoo(words: &[&str]) -> Command {
    let argv = [env!("CARGO_BIN_EXE_zoo")].iter().chain(words);
    Command { argv: argv.map(|word| CString::new(*word).expect("no NUL")).collect(), ..Command::default() }
}

/// Standard output of a worker as a FIFO: reading a line waits for the fact that it tells.
pub(crate) struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
}

impl Lines {
    pub(crate) fn new(folder: &Path, name: &str) -> Self {
        let path = folder.join(name);
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).expect("mkfifo");
        // Also open for writing: then neither end waits for the other to open.
        let file = File::options().read(true).write(true).open(&path).expect("open fifo");
        Self { path, reader: BufReader::new(file) }
    }

    pub(crate) fn of(&self, mut command: Command) -> Command {
        command.stdout = Stdio::File(self.path.clone());
        command
    }

    pub(crate) fn next(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).expect("a line");
        line.trim_end().to_owned()
    }
}

pub(crate) fn plan(grace: Duration) -> StopPlan {
    StopPlan { grace, signal: 15, reason: StopReason::Signal, ..StopPlan::kill(PATIENCE) }
}

/// Waits until `fact` holds. For facts that nothing reports.
pub(crate) fn eventually(fact: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !fact() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until `fact` holds of the group.
pub(crate) fn wait_for<T>(group: &Group, fact: impl Fn(&Group) -> Option<T>) -> T {
    loop {
        let generation = group.generation().expect("own process");
        if let Some(value) = fact(group) {
            return value;
        }
        let woken = group.wait(generation, Some(PATIENCE), [None; 2]).expect("wait");
        assert_eq!(woken, Wake::Event, "nothing happened for {PATIENCE:?}");
    }
}

pub(crate) fn all_exits(group: &Group) -> Vec<Exit> {
    let size = group.pids().len();
    wait_for(group, |group| group.exits(0).ok().filter(|exits| exits.len() == size))
}

pub(crate) fn stopped(group: &Group) -> StopReport {
    wait_for(group, |group| group.stop_report().expect("own process"))
}

pub(crate) fn is_alive(pid: i32) -> bool {
    procfs::stat(pid).is_some_and(|stat| !stat.is_dead())
}
