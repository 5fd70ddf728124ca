//! System calls of the misbehaving children.

use std::ffi::c_int;

pub(crate) fn raise(signal: c_int) {
    // SAFETY: takes an integer.
    unsafe { libc::raise(signal) };
}

pub(crate) fn ignore(signal: c_int) {
    // SAFETY: SIG_IGN runs no code of ours.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

/// Ends by `signal`, without a core dump.
pub(crate) fn die_by(signal: c_int) -> ! {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit is valid for reads; SIG_DFL runs no code of ours (Rust installs handlers for SIGSEGV and SIGBUS).
    unsafe {
        libc::setrlimit(libc::RLIMIT_CORE, &raw const none);
        libc::signal(signal, libc::SIG_DFL);
        libc::kill(libc::getpid(), signal);
    }
    crate::pause()
}

pub(crate) fn wait_until(monotonic_ns: i64) {
    let at = libc::timespec { tv_sec: monotonic_ns / 1_000_000_000, tv_nsec: monotonic_ns % 1_000_000_000 };
    // SAFETY: the time is valid for reads, the remainder may be null.
    unsafe { libc::clock_nanosleep(libc::CLOCK_MONOTONIC, libc::TIMER_ABSTIME, &raw const at, std::ptr::null_mut()) };
}

pub(crate) fn block(signal: c_int) {
    // SAFETY: the set is initialised before it is used.
    unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigaddset(&raw mut set, signal);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
    }
}

pub(crate) fn wait_for_signal(signal: c_int) {
    // SAFETY: the set is initialised before it is used, the information about the signal may be null.
    unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigaddset(&raw mut set, signal);
        libc::sigwaitinfo(&raw const set, std::ptr::null_mut());
    }
}

pub(crate) fn monotonic_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the time is valid for writes.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

/// The process, process group, session and parent ids, and the parent death signal.
pub(crate) fn identity() -> ([i32; 4], c_int) {
    let mut death_signal: c_int = -1;
    // SAFETY: take and return integers; the kernel stores one integer at the address.
    unsafe {
        libc::prctl(libc::PR_GET_PDEATHSIG, &raw mut death_signal);
        ([libc::getpid(), libc::getpgrp(), libc::getsid(0), libc::getppid()], death_signal)
    }
}

/// Forks a child that runs `prepare`, then `stay`, and exits. Returns its pid after `prepare`.
pub(crate) fn fork_ready(prepare: impl FnOnce(), stay: impl FnOnce()) -> i32 {
    let mut pipe = [0; 2];
    // SAFETY: the array has room for two descriptors; this process has one thread, so the child may do anything.
    let child = unsafe {
        libc::pipe(pipe.as_mut_ptr());
        libc::fork()
    };
    let [read, write] = pipe;
    if child == 0 {
        prepare();
        // SAFETY: one byte that is valid for reads.
        unsafe { libc::write(write, c"x".as_ptr().cast(), 1) };
        stay();
        std::process::exit(0)
    }
    let mut byte = 0u8;
    // SAFETY: one byte that is valid for writes.
    unsafe { libc::read(read, (&raw mut byte).cast(), 1) };
    child
}

/// Waits until the `parent` of this process has ended.
pub(crate) fn wait_until_orphaned(parent: u32) {
    // SAFETY: takes nothing.
    while unsafe { libc::getppid() }.cast_unsigned() == parent {
        wait_until(i64::try_from(monotonic_ns()).unwrap_or(0) + 500_000);
    }
}

pub(crate) fn new_group() {
    // SAFETY: takes integers.
    unsafe { libc::setpgid(0, 0) };
}

pub(crate) fn new_session() {
    // SAFETY: takes nothing.
    unsafe { libc::setsid() };
}
