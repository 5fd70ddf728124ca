//! Starting a process with `vfork` semantics and a pidfd from `clone(2)`.
//!
//! `std::process::Command` with a `pre_exec` hook forks: it copies the page tables of the agent, 7.4 ms at 400 MB. `posix_spawn` cannot
//! arm a parent death signal. This module uses `clone(CLONE_VM | CLONE_VFORK | CLONE_PIDFD)`: the child shares the agent's memory until it
//! executes the program, and the calling thread is suspended until then. The parent allocates all data of the child before the clone.

use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};

use super::sigmask;
use crate::error::SpawnError;

/// Destination of a standard stream of a process.
#[derive(Clone, Debug, Default)]
pub enum Stdio {
    /// The agent's stream.
    #[default]
    Inherit,
    /// This file, created or truncated.
    File(PathBuf),
    /// This descriptor, for instance the end of a pipe. Its number is 3 or higher.
    Fd(Arc<OwnedFd>),
}

/// How to start one process.
#[derive(Clone, Debug, Default)]
pub struct Command {
    /// Program and arguments. A program without a slash is looked up in the `PATH` of `env`.
    pub argv: Vec<CString>,
    /// The whole environment, as `NAME=value`.
    pub env: Vec<CString>,
    /// Standard input; `None` inherits the agent's.
    pub stdin: Option<Arc<OwnedFd>>,
    /// Standard output.
    pub stdout: Stdio,
    /// Standard error.
    pub stderr: Stdio,
    /// Working directory; `None` inherits the agent's.
    pub cwd: Option<CString>,
    /// Logical CPUs on which the process may run; `None` inherits the agent's.
    pub cpus: Option<Vec<usize>>,
    /// Soft limit of open descriptors (`RLIMIT_NOFILE`); `None` inherits the agent's.
    pub open_files: Option<u64>,
    /// Do not kill the process when the thread that spawned it ends.
    pub outlives_agent: bool,
}

/// A process that was just started: the leader of its own session and process group.
#[derive(Debug)]
pub struct Spawned {
    /// Process id, also its process group and session id.
    pub pid: i32,
    /// Its pidfd, if requested.
    pub pidfd: Option<OwnedFd>,
}

/// The steps the child takes between `clone` and `execve`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Stage {
    Setsid = 1,
    Limits,
    DeathSignal,
    Stdin,
    Stdout,
    Stderr,
    Affinity,
    Chdir,
    Execve,
}

impl Stage {
    const ALL: [Self; 9] = [
        Self::Setsid,
        Self::Limits,
        Self::DeathSignal,
        Self::Stdin,
        Self::Stdout,
        Self::Stderr,
        Self::Affinity,
        Self::Chdir,
        Self::Execve,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Setsid => "setsid",
            Self::Limits => "setrlimit(RLIMIT_NOFILE)",
            Self::DeathSignal => "prctl(PR_SET_PDEATHSIG)",
            Self::Stdin => "dup2 stdin",
            Self::Stdout => "dup2 stdout",
            Self::Stderr => "dup2 stderr",
            Self::Affinity => "sched_setaffinity",
            Self::Chdir => "chdir",
            Self::Execve => "execve",
        }
    }
}

/// Data of the child in shared memory. The child writes only `failure`.
struct ChildPlan {
    programs: Vec<*const c_char>,
    argv: Vec<*const c_char>,
    envp: Vec<*const c_char>,
    stdin: RawFd,
    stdout: RawFd,
    stderr: RawFd,
    outlives_agent: bool,
    open_files: Option<libc::rlimit>,
    cwd: *const c_char,
    cpus: Vec<u64>,
    agent: libc::pid_t,
    highest_fd: c_int,
    failure: (u8, c_int),
}

/// Stack of the child. It can be reused for one spawn after the other.
#[derive(Debug)]
pub struct SpawnStack(Vec<u128>);

impl SpawnStack {
    const BYTES: usize = 64 * 1024;

    /// Allocates the stack.
    #[must_use]
    pub fn new() -> Self {
        Self(vec![0; Self::BYTES / size_of::<u128>()])
    }

    pub(super) fn top(&mut self) -> *mut c_void {
        self.0.as_mut_ptr_range().end.cast()
    }

    #[cfg(target_arch = "x86_64")]
    fn base(&mut self) -> *mut c_void {
        self.0.as_mut_ptr().cast()
    }
}

impl Default for SpawnStack {
    fn default() -> Self {
        Self::new()
    }
}

/// Starts `command`. `index` is its position in the group, for the error. With `pidfd`, the result has a pidfd. The process is born in
/// `cgroup` if possible, otherwise in the agent's.
///
/// The process has its own session, an empty signal mask, default signal dispositions, and no descriptors except its standard streams.
/// Unless `outlives_agent` is set, the kernel kills it with SIGKILL when the *calling thread* ends: call this from a thread that lives as
/// long as the agent.
pub fn spawn(
    command: &Command,
    index: usize,
    pidfd: bool,
    cgroup: Option<BorrowedFd<'_>>,
    stack: &mut SpawnStack,
) -> Result<Spawned, SpawnError> {
    let fail = |stage, object: &OsStr, source: io::Error| SpawnError {
        index,
        stage,
        object: object.to_string_lossy().into_owned(),
        source,
    };
    let program = command.argv.first().map_or(c"", CString::as_c_str);
    let program_name = OsStr::from_bytes(program.to_bytes());
    let open = |stage, stdio: &Stdio| match stdio {
        Stdio::Inherit => Ok(None),
        Stdio::File(path) => {
            open_log(path).map(|file| Some(Arc::new(file))).map_err(|source| fail(stage, path.as_os_str(), source))
        }
        Stdio::Fd(fd) => Ok(Some(Arc::clone(fd))),
    };
    let stdout = open("open stdout", &command.stdout)?;
    let stderr = open("open stderr", &command.stderr)?;
    let candidates = candidates(program, &command.env);

    let pointers = |strings: &[CString]| -> Vec<*const c_char> {
        strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let mut plan = ChildPlan {
        programs: pointers(&candidates),
        argv: pointers(&command.argv),
        envp: pointers(&command.env),
        stdin: command.stdin.as_ref().map_or(-1, AsRawFd::as_raw_fd),
        stdout: stdout.as_ref().map_or(-1, AsRawFd::as_raw_fd),
        stderr: stderr.as_ref().map_or(-1, AsRawFd::as_raw_fd),
        outlives_agent: command.outlives_agent,
        open_files: command.open_files.map(open_files_limit),
        cwd: command.cwd.as_ref().map_or(std::ptr::null(), |cwd| cwd.as_ptr()),
        cpus: command.cpus.as_deref().map(cpu_mask).unwrap_or_default(),
        agent: i32::try_from(std::process::id()).unwrap_or(-1),
        highest_fd: highest_fd(),
        failure: (0, 0),
    };

    // A signal handler of the agent must not run in the child while it shares this memory.
    let blocked = sigmask::block_all();
    let mut raw_pidfd: c_int = -1;
    let cloned = clone_child(&mut plan, stack, pidfd.then_some(&mut raw_pidfd), cgroup);
    drop(blocked);
    let pid = cloned.map_err(|source| fail("clone", program_name, source))?;
    // SAFETY: with CLONE_PIDFD the kernel has stored a new descriptor there that nobody else owns.
    let pidfd = (pidfd && raw_pidfd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(raw_pidfd) });

    // SAFETY: `failure` is written by the child only, which is past it: it has executed the program or has exited.
    let (stage, errno) = unsafe { std::ptr::read_volatile(&raw const plan.failure) };
    let Some(stage) = Stage::ALL.into_iter().find(|known| *known as u8 == stage) else {
        return Ok(Spawned { pid, pidfd });
    };
    // Does not block for long: the child exits immediately after writing the failure.
    let _ = super::wait::wait(pid, super::wait::Collect::Reap, super::wait::Block::Yes);
    let object = match (stage, &command.cwd) {
        (Stage::Chdir, Some(cwd)) => OsStr::from_bytes(cwd.to_bytes()),
        _ => program_name,
    };
    Err(fail(stage.name(), object, io::Error::from_raw_os_error(errno)))
}

/// Clones the child. Returns when it has executed its program or exited.
fn clone_child(
    plan: &mut ChildPlan,
    stack: &mut SpawnStack,
    pidfd: Option<&mut c_int>,
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<libc::pid_t> {
    let plan = std::ptr::from_mut(plan).cast::<c_void>();
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | if pidfd.is_some() { libc::CLONE_PIDFD } else { 0 };
    let pidfd = pidfd.map_or(std::ptr::null_mut(), std::ptr::from_mut);
    if let Some(cgroup) = cgroup {
        // SAFETY: the child runs `child_main` on its own stack and touches only `plan`, which outlives it because CLONE_VFORK holds this
        // thread until the child has executed or exited. It has its own descriptor table and dispositions (no CLONE_FILES, no
        // CLONE_SIGHAND).
        if let Ok(pid) = unsafe { clone_into_cgroup(flags, stack, plan, pidfd, cgroup) } {
            return Ok(pid);
        }
        // Fall back to the agent's cgroup: the kernel is too old, a policy denies the call, or the cgroup was removed.
    }
    // SAFETY: as above.
    let pid = unsafe {
        libc::clone(
            child_main,
            stack.top(),
            flags | libc::SIGCHLD,
            plan,
            pidfd,
            std::ptr::null_mut::<c_void>(),
            std::ptr::null_mut::<c_void>(),
        )
    };
    if pid < 0 { Err(io::Error::last_os_error()) } else { Ok(pid) }
}

/// `clone3(2)` with `CLONE_INTO_CGROUP` (Linux 5.7): the child is born in the cgroup. Moving it there later would take 10 ms, because the
/// kernel then waits for all CPUs, and would miss processes that the child has started before.
///
/// libc has no wrapper that takes a stack, so this makes the system call in assembly.
///
/// # Safety
///
/// As for `clone(2)` with `child_main`; `plan` is a [`ChildPlan`].
#[cfg(target_arch = "x86_64")]
unsafe fn clone_into_cgroup(
    flags: c_int,
    stack: &mut SpawnStack,
    plan: *mut c_void,
    pidfd: *mut c_int,
    cgroup: BorrowedFd<'_>,
) -> io::Result<libc::pid_t> {
    // libc declares this constant as a 32-bit integer, in which the value does not fit.
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    // SAFETY: plain integers, for which zeros are valid.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = u64::from(flags.cast_unsigned()) | CLONE_INTO_CGROUP;
    arguments.pidfd = pidfd as u64;
    arguments.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    arguments.stack = stack.base() as u64;
    arguments.stack_size = SpawnStack::BYTES as u64;
    arguments.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    let result: i64;
    // SAFETY: in the parent the kernel changes rax, rcx and r11 only. The child is on its own stack, whose end is a multiple of 16; it
    // calls `child_main`, which does not return.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, {plan}",
            "call {entry}",
            "ud2",
            "2:",
            plan = in(reg) plan,
            entry = in(reg) child_main as extern "C" fn(*mut c_void) -> c_int,
            inout("rax") libc::SYS_clone3 => result,
            in("rdi") &raw mut arguments,
            in("rsi") size_of::<libc::clone_args>(),
            out("rcx") _,
            out("r11") _,
        );
    }
    let error = || io::Error::from_raw_os_error(i32::try_from(-result).unwrap_or(libc::EINVAL));
    libc::pid_t::try_from(result).ok().filter(|pid| *pid > 0).ok_or_else(error)
}

/// Implemented for x86-64 only.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn clone_into_cgroup(
    _flags: c_int,
    _stack: &mut SpawnStack,
    _plan: *mut c_void,
    _pidfd: *mut c_int,
    _cgroup: BorrowedFd<'_>,
) -> io::Result<libc::pid_t> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Whether [`spawn`] can start processes in this cgroup. Tries it with a process that exits immediately.
pub fn can_spawn_in(cgroup: BorrowedFd<'_>, stack: &mut SpawnStack) -> bool {
    let empty = vec![std::ptr::null()];
    let mut plan = ChildPlan {
        programs: empty.clone(),
        argv: empty.clone(),
        envp: empty,
        stdin: -1,
        stdout: -1,
        stderr: -1,
        outlives_agent: true,
        open_files: None,
        cwd: std::ptr::null(),
        cpus: Vec::new(),
        agent: 0,
        highest_fd: 0,
        failure: (0, 0),
    };
    let blocked = sigmask::block_all();
    let flags = libc::CLONE_VM | libc::CLONE_VFORK;
    // SAFETY: as in `clone_child`. Without a program to execute the child exits.
    let cloned = unsafe { clone_into_cgroup(flags, stack, (&raw mut plan).cast(), std::ptr::null_mut(), cgroup) };
    drop(blocked);
    if let Ok(pid) = cloned {
        let _ = super::wait::wait(pid, super::wait::Collect::Reap, super::wait::Block::Yes);
    }
    cloned.is_ok()
}

/// Runs in the child. Must only make async-signal-safe calls: no allocation, no lock, no panic, no return.
extern "C" fn child_main(argument: *mut c_void) -> c_int {
    let plan: *mut ChildPlan = argument.cast();
    // SAFETY: the parent's thread stands still until this process has executed or exited, so the plan is ours alone.
    unsafe {
        let failed = |stage: Stage| -> ! {
            std::ptr::write_volatile(&raw mut (*plan).failure, (stage as u8, *libc::__errno_location()));
            libc::_exit(127)
        };
        // SIG_DFL is 0. Uses the system call, because libc's function refuses two signals that it reserves. The agent may have inherited
        // them as ignored.
        let default = [0usize; 4];
        let mut signal: c_int = 1;
        while signal <= 64 {
            // Fails for SIGKILL and SIGSTOP, which have no disposition to reset.
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                std::ptr::null_mut::<c_void>(),
                size_of::<u64>(),
            );
            signal = signal.wrapping_add(1);
        }
        if libc::setsid() < 0 {
            failed(Stage::Setsid);
        }
        if !(*plan).outlives_agent {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0 {
                failed(Stage::DeathSignal);
            }
            // The agent may have died before the signal was armed.
            if libc::getppid() != (*plan).agent {
                libc::_exit(127);
            }
        }
        if (*plan).stdin >= 0 && libc::dup2((*plan).stdin, 0) < 0 {
            failed(Stage::Stdin);
        }
        if (*plan).stdout >= 0 && libc::dup2((*plan).stdout, 1) < 0 {
            failed(Stage::Stdout);
        }
        if (*plan).stderr >= 0 && libc::dup2((*plan).stderr, 2) < 0 {
            failed(Stage::Stderr);
        }
        let open_files = &raw const (*plan).open_files;
        if let Some(limit) = &*open_files
            && libc::setrlimit(libc::RLIMIT_NOFILE, limit) < 0
        {
            failed(Stage::Limits);
        }
        let cpus = &raw const (*plan).cpus;
        if !(*cpus).is_empty() {
            let bytes = (*cpus).len().wrapping_mul(size_of::<u64>());
            if libc::sched_setaffinity(0, bytes, (*cpus).as_ptr().cast()) < 0 {
                failed(Stage::Affinity);
            }
        }
        if !(*plan).cwd.is_null() && libc::chdir((*plan).cwd) < 0 {
            failed(Stage::Chdir);
        }
        if libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32) < 0 {
            // `close_range` needs Linux 5.9.
            let mut fd = 3;
            while fd <= (*plan).highest_fd {
                libc::close(fd);
                fd = fd.wrapping_add(1);
            }
        }
        let mut none = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());

        // Like execvp(3): skip directories of PATH that lack the program; remember EACCES.
        let mut program = (*plan).programs.as_ptr();
        let mut denied = false;
        while !(*program).is_null() {
            libc::execve(*program, (*plan).argv.as_ptr(), (*plan).envp.as_ptr());
            match *libc::__errno_location() {
                libc::EACCES => denied = true,
                libc::ENOENT | libc::ENOTDIR => {}
                _ => failed(Stage::Execve),
            }
            program = program.add(1);
        }
        if denied {
            *libc::__errno_location() = libc::EACCES;
        }
        failed(Stage::Execve)
    }
}

/// The paths to try for `program`, in order.
fn candidates(program: &CStr, env: &[CString]) -> Vec<CString> {
    if program.to_bytes().contains(&b'/') {
        return vec![program.to_owned()];
    }
    let path = env.iter().find_map(|entry| entry.to_bytes().strip_prefix(b"PATH=")).unwrap_or(b"/bin:/usr/bin");
    path.split(|byte| *byte == b':')
        .filter_map(|directory| {
            let directory = if directory.is_empty() { b"." } else { directory };
            CString::new([directory, b"/", program.to_bytes()].concat()).ok()
        })
        .collect()
}

pub(crate) fn open_log(path: &Path) -> io::Result<OwnedFd> {
    // With O_APPEND, a worker that opens its stream again and helpers that inherit it do not overwrite each other's output.
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::APPEND | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, Mode::from_raw_mode(0o666))?;
    // If the agent runs with a closed standard stream, the log could get its number. dup2 would then do nothing, and exec would close it.
    Ok(rustix::io::fcntl_dupfd_cloexec(&fd, 3)?)
}

/// The soft limit of open descriptors, within the hard one.
fn open_files_limit(soft: u64) -> libc::rlimit {
    let hard = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(libc::RLIM_INFINITY);
    libc::rlimit { rlim_cur: soft.min(hard), rlim_max: hard }
}

/// Sets the soft limit of open descriptors of this process, within the hard one.
pub(crate) fn limit_open_files(soft: u64) -> io::Result<()> {
    let limit = open_files_limit(soft);
    // SAFETY: the kernel reads a structure.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn cpu_mask(cpus: &[usize]) -> Vec<u64> {
    let words = cpus.iter().max().map_or(0, |highest| highest / 64 + 1);
    let mut mask = vec![0; words];
    for cpu in cpus {
        mask[cpu / 64] |= 1 << (cpu % 64);
    }
    mask
}

/// Upper bound of the descriptor numbers in use, for kernels without `close_range`. The margin covers descriptors that other threads open
/// before the clone.
fn highest_fd() -> c_int {
    let highest = std::fs::read_dir("/proc/self/fd").map_or(0, |entries| {
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).max().unwrap_or(0)
    });
    highest + 256
}

/// `prctl(PR_SET_PDEATHSIG)` for the calling process: it receives `signal` when the thread that created it ends.
pub fn arm_parent_death_signal(signal: c_int) -> io::Result<()> {
    // SAFETY: takes an integer, touches no memory.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
