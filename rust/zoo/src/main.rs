//! Misbehaving children for tests. Each says what it needs to say on one line of standard output, then does its worst.

use std::ffi::c_int;
use std::io::Write;
use std::process::exit;

const USAGE: &str = "usage: zoo exit N | signal N | sleep | deaf | stop | exit-at MONOTONIC_NS N \
    | orphan N | deaf-orphan N | escape N | flood LINES WIDTH | facts";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["exit", code] => exit(number(code)),
        ["signal", signal] => die_by(number(signal)),
        ["sleep"] => {
            say("ready");
            pause()
        }
        ["deaf"] => {
            ignore(libc::SIGTERM);
            say("ready");
            pause()
        }
        ["stop"] => {
            say("ready");
            raise(libc::SIGSTOP);
            pause()
        }
        ["exit-at", at, code] => {
            say("ready");
            wait_until(at.parse().unwrap_or_else(|_| usage()));
            exit(number(code))
        }
        ["orphan", code] => leave_behind(number(code), Orphan::Obedient),
        ["deaf-orphan", code] => leave_behind(number(code), Orphan::Deaf),
        ["escape", code] => leave_behind(number(code), Orphan::OwnSession),
        ["flood", lines, width] => flood(number(lines), number(width)),
        ["facts"] => facts(),
        _ => usage(),
    }
}

fn usage() -> ! {
    eprintln!("{USAGE}");
    exit(64)
}

fn number<T: std::str::FromStr>(word: &str) -> T {
    word.parse().unwrap_or_else(|_| usage())
}

fn say(line: &str) {
    let mut stdout = std::io::stdout().lock();
    // A test that does not listen is none of our business.
    let _ = writeln!(stdout, "{line}");
    let _ = stdout.flush();
}

fn pause() -> ! {
    loop {
        std::thread::park();
    }
}

fn raise(signal: c_int) {
    // SAFETY: takes an integer.
    unsafe { libc::raise(signal) };
}

fn ignore(signal: c_int) {
    // SAFETY: SIG_IGN runs no code of ours.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

/// Dies by `signal`, without leaving a core.
fn die_by(signal: c_int) -> ! {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit is valid for reads; SIG_DFL runs no code of ours (Rust installs handlers for SIGSEGV and SIGBUS).
    unsafe {
        libc::setrlimit(libc::RLIMIT_CORE, &raw const none);
        libc::signal(signal, libc::SIG_DFL);
        libc::kill(libc::getpid(), signal);
    }
    pause()
}

fn wait_until(monotonic_ns: i64) {
    let at = libc::timespec { tv_sec: monotonic_ns / 1_000_000_000, tv_nsec: monotonic_ns % 1_000_000_000 };
    // SAFETY: the time is valid for reads, the remainder may be null.
    unsafe { libc::clock_nanosleep(libc::CLOCK_MONOTONIC, libc::TIMER_ABSTIME, &raw const at, std::ptr::null_mut()) };
}

#[derive(Clone, Copy, PartialEq)]
enum Orphan {
    Obedient,
    Deaf,
    OwnSession,
}

/// Forks a child that stays, says its pid once it is settled, and exits.
fn leave_behind(code: i32, kind: Orphan) -> ! {
    let mut pipe = [0; 2];
    // SAFETY: the array has room for two descriptors; this process has one thread, so the child may do anything.
    let child = unsafe {
        libc::pipe(pipe.as_mut_ptr());
        libc::fork()
    };
    let [read, write] = pipe;
    if child == 0 {
        if kind == Orphan::Deaf {
            ignore(libc::SIGTERM);
        }
        // SAFETY: integers, and one byte that is valid for reads.
        unsafe {
            if kind == Orphan::OwnSession {
                libc::setsid();
            }
            libc::write(write, c"x".as_ptr().cast(), 1);
        }
        pause()
    }
    let mut byte = 0u8;
    // SAFETY: one byte that is valid for writes.
    unsafe { libc::read(read, (&raw mut byte).cast(), 1) };
    say(&child.to_string());
    exit(code)
}

/// Numbered lines of a fixed width, as fast as the stream takes them.
fn flood(lines: usize, width: usize) {
    let mut stdout = std::io::BufWriter::with_capacity(64 * 1024, std::io::stdout().lock());
    for line in 0..lines {
        if writeln!(stdout, "{line:0width$}").is_err() {
            exit(1);
        }
    }
    if stdout.flush().is_err() {
        exit(1);
    }
}

/// What this process was given: session, signal mask, dispositions, descriptors, CPUs.
fn facts() {
    // SAFETY: take and return integers.
    let (pid, group, session, parent) = unsafe { (libc::getpid(), libc::getpgrp(), libc::getsid(0), libc::getppid()) };
    say(&format!("pid={pid} group={group} session={session} parent={parent}"));
    let mut death_signal: c_int = -1;
    // SAFETY: the kernel stores one integer there.
    unsafe { libc::prctl(libc::PR_GET_PDEATHSIG, &raw mut death_signal) };
    say(&format!("death_signal={death_signal}"));
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    for line in status
        .lines()
        .filter(|line| ["SigBlk", "SigIgn", "Cpus_allowed_list"].iter().any(|field| line.starts_with(field)))
    {
        say(&line.replace(":\t", "="));
    }
    let mut open: Vec<String> = std::fs::read_dir("/proc/self/fd")
        .map(|entries| entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
        .unwrap_or_default();
    open.sort();
    say(&format!("fds={}", open.join(",")));
}
