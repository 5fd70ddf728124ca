//! Misbehaving children for tests. Each says what it needs to say on one line of standard output, then does its worst.

mod sys;

use std::io::Write;
use std::process::exit;

const USAGE: &str = "usage: zoo exit N | signal N | sleep | deaf | stop | exit-at MONOTONIC_NS N \
    | orphan N | deaf-orphan N | escape N | regroup N | cleaner FILE | finisher FILE | flood LINES WIDTH | facts | worker FOLDER FAILURES";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["exit", code] => exit(number(code)),
        ["signal", signal] => sys::die_by(number(signal)),
        ["sleep"] => {
            say("ready");
            pause()
        }
        ["deaf"] => {
            sys::ignore(libc::SIGTERM);
            say("ready");
            pause()
        }
        ["stop"] => {
            say("ready");
            sys::raise(libc::SIGSTOP);
            pause()
        }
        ["exit-at", at, code] => {
            say("ready");
            sys::wait_until(at.parse().unwrap_or_else(|_| usage()));
            exit(number(code))
        }
        ["orphan", code] => leave_behind(number(code), Orphan::Obedient),
        ["deaf-orphan", code] => leave_behind(number(code), Orphan::Deaf),
        ["escape", code] => leave_behind(number(code), Orphan::OwnSession),
        ["regroup", code] => leave_behind(number(code), Orphan::OwnGroup),
        ["cleaner", file] => cleaner(file),
        ["finisher", file] => finisher(file),
        ["flood", lines, width] => flood(number(lines), number(width)),
        ["facts"] => facts(),
        ["worker", folder, failures] => worker(folder, number(failures)),
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

#[derive(Clone, Copy)]
enum Orphan {
    Obedient,
    Deaf,
    OwnSession,
    OwnGroup,
}

/// Forks a child that stays, says its pid once it is settled, and exits.
fn leave_behind(code: i32, kind: Orphan) -> ! {
    let child = sys::fork_settled(
        || match kind {
            Orphan::Obedient => {}
            Orphan::Deaf => sys::ignore(libc::SIGTERM),
            Orphan::OwnSession => sys::new_session(),
            Orphan::OwnGroup => sys::new_group(),
        },
        || pause(),
    );
    say(&child.to_string());
    exit(code)
}

/// Ignores SIGTERM and has a helper that does so too, and that leaves `file` when this process is gone: like Python's resource tracker.
fn cleaner(file: &str) -> ! {
    sys::ignore(libc::SIGTERM);
    let parent = std::process::id();
    sys::fork_settled(|| (), || leave_when_orphaned(parent, file, 0));
    say("ready");
    pause()
}

/// Exits with 0, and has a helper that leaves `file` some time later, unless SIGTERM ends it.
fn finisher(file: &str) -> ! {
    let parent = std::process::id();
    sys::fork_settled(|| (), || leave_when_orphaned(parent, file, 50_000_000));
    exit(0)
}

fn leave_when_orphaned(parent: u32, file: &str, after_ns: i64) {
    sys::wait_for_orphanage(parent);
    sys::wait_until(i64::try_from(sys::monotonic_ns()).unwrap_or(0) + after_ns);
    let _ = std::fs::write(file, "");
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

/// A worker of an elastic job that trains nothing: in `folder` it leaves when it started, when it was signalled and when it failed.
///
/// In each of the first `failures` attempts the last rank waits until all ranks have started, notes the time and exits with code 1. The others
/// note when SIGTERM reaches them. In the attempt after that everybody exits with code 0 once all have started.
/// Attempts are counted by the failures noted so far: of torchrun's agents, only that of the failed worker counts a restart.
fn worker(folder: &str, failures: u32) {
    let started = sys::monotonic_ns();
    let variable = |name: &str| {
        let value = std::env::var(name).ok().and_then(|value| value.parse::<u32>().ok());
        value.unwrap_or_else(|| usage())
    };
    let (rank, world_size) = (variable("RANK"), variable("WORLD_SIZE"));
    let attempt =
        (0..failures).find(|attempt| !is_noted(folder, "failed", *attempt, world_size - 1)).unwrap_or(failures);
    let open = |what: &str| std::fs::File::create(note_path(folder, what, attempt, rank)).unwrap_or_else(|_| exit(65));
    // Opened before it counts: to create a file takes longer than what is measured.
    let note =
        |mut file: std::fs::File, at: u64| file.write_all(at.to_string().as_bytes()).unwrap_or_else(|_| exit(65));
    sys::block(libc::SIGTERM);
    if attempt < failures && rank + 1 < world_size {
        let signalled = open("signalled");
        note(open("started"), started);
        sys::wait_for_signal(libc::SIGTERM);
        note(signalled, sys::monotonic_ns());
        exit(0)
    }
    let failed = open("failed");
    note(open("started"), started);
    while !(0..world_size).all(|rank| is_noted(folder, "started", attempt, rank)) {
        sys::wait_until(i64::try_from(sys::monotonic_ns()).unwrap_or(0) + 1_000_000);
    }
    if attempt < failures {
        note(failed, sys::monotonic_ns());
        exit(1)
    }
}

fn note_path(folder: &str, what: &str, attempt: u32, rank: u32) -> std::path::PathBuf {
    std::path::Path::new(folder).join(format!("{what}.{attempt}.{rank}"))
}

fn is_noted(folder: &str, what: &str, attempt: u32, rank: u32) -> bool {
    std::fs::metadata(note_path(folder, what, attempt, rank)).is_ok_and(|file| file.len() > 0)
}

/// What this process was given: session, signal mask, dispositions, descriptors, CPUs.
fn facts() {
    let ([pid, group, session, parent], death_signal) = sys::identity();
    say(&format!("pid={pid} group={group} session={session} parent={parent}"));
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
