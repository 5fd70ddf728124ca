//! A process that outlives a killed agent by a moment, to end what the kernel does not end with it.
//!
//! `PR_SET_PDEATHSIG` reaches the workers and nobody else: data loader processes, servers and helpers that workers have started live on and
//! hold their GPUs. All of them have inherited an environment variable that marks the run. When the agent ends without a
//! farewell, the guard kills every process that carries the mark. Who wants to outlive the run removes the variable.

use std::ffi::c_int;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};

use super::wait::{Block, Collect, wait};

/// How often the guard looks for marked processes at most: who forks while being killed is found by the next look.
const MOST_LOOKS: usize = 100;

/// The agent's end of a guard.
#[derive(Debug)]
pub struct Guard {
    pid: i32,
    line: OwnedFd,
}

impl Guard {
    /// Forks the guard. `mark` is the `NAME=value` that marks the run in the environment of its processes.
    ///
    /// The child is this program without an exec, so there must be no other thread, whose locks it would inherit: `ResourceBusy` otherwise.
    pub fn start(mark: &[u8]) -> io::Result<Self> {
        if fs::read_dir("/proc/self/task")?.count() > 1 {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let (theirs, ours) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        // SAFETY: there is one thread, so the child may use whatever the parent may. It does not return from this branch.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                drop(ours);
                let farewell = std::panic::catch_unwind(|| stand_guard(&theirs)).unwrap_or(false);
                if !farewell {
                    kill_marked(mark);
                }
                // SAFETY: ends the process without running what the parent's libraries have registered for its end.
                unsafe { libc::_exit(0) }
            }
            pid => Ok(Self { pid, line: ours }),
        }
    }

    /// Process id of the guard.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The agent ends as it should: the guard goes, and touches nobody.
    pub fn dismiss(self) -> io::Result<()> {
        rustix::io::write(&self.line, b"x")?;
        wait(self.pid, Collect::Reap, Block::Yes)?;
        Ok(())
    }
}

/// Waits for a farewell (`true`) or for the end of the agent (`false`).
fn stand_guard(line: &OwnedFd) -> bool {
    // SAFETY: integers, a string that ends in NUL; SIG_IGN runs no code of ours. Descriptor 0 is the line, all others are closed:
    // who reads the agent's output must see its end.
    unsafe {
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, c"ferro-guard".as_ptr());
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGPIPE] {
            libc::signal(signal, libc::SIG_IGN);
        }
        libc::dup2(line.as_fd().as_raw_fd(), 0);
        if libc::syscall(libc::SYS_close_range, 1u32, u32::MAX, 0u32) < 0 {
            let highest = libc::sysconf(libc::_SC_OPEN_MAX).clamp(64, 65_536);
            for fd in 1..c_int::try_from(highest).unwrap_or(64) {
                libc::close(fd);
            }
        }
    }
    let mut byte = 0u8;
    loop {
        // SAFETY: one byte that is valid for writes.
        match unsafe { libc::read(0, (&raw mut byte).cast(), 1) } {
            -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            count => return count == 1,
        }
    }
}

/// Kills every process with the mark in its environment, until there is none.
fn kill_marked(mark: &[u8]) {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    for _ in 0..MOST_LOOKS {
        let Ok(entries) = fs::read_dir("/proc") else { return };
        let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let found = pids.filter(|pid| *pid != own && kill_if_marked(*pid, mark)).count();
        if found == 0 {
            return;
        }
    }
}

/// Whether the process has the mark; if so it was killed.
fn kill_if_marked(pid: i32, mark: &[u8]) -> bool {
    let marked = || {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|entry| entry == mark)
    };
    let Some(raw) = Pid::from_raw(pid) else { return false };
    if !marked() {
        return false;
    }
    match pidfd_open(raw, PidfdFlags::empty()) {
        // Looked at again with the process held: the number may have gone to somebody else in between.
        Ok(process) => marked() && pidfd_send_signal(&process, Signal::KILL).is_ok(),
        Err(rustix::io::Errno::SRCH) => false,
        Err(_) => kill_process(raw, Signal::KILL).is_ok(),
    }
}
