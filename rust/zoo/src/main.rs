//! Misbehaving child processes for tests. Each prints one line to standard output when it is ready, and then misbehaves.

mod sys;

use std::io::Write;
use std::process::exit;

const USAGE: &str = "usage: zoo exit N | signal N | sleep | deaf | stop | exit-at MONOTONIC_NS N \
    | orphan N | deaf-orphan N | loader | escape N | regroup N | cleaner FILE | finisher FILE | flood LINES WIDTH | facts | executor | worker FOLDER FAILURES";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["exit", code] => exit(number(code)),
        ["signal", signal] => sys::die_by(number(signal)),
        ["sleep"] => {
            print_line("ready");
            pause()
        }
        ["deaf"] => {
            sys::ignore(libc::SIGTERM);
            print_line("ready");
            pause()
        }
        ["stop"] => {
            print_line("ready");
            sys::raise(libc::SIGSTOP);
            pause()
        }
        ["exit-at", at, code] => {
            print_line("ready");
            sys::wait_until(at.parse().unwrap_or_else(|_| usage()));
            exit(number(code))
        }
        ["orphan", code] => exit_with_orphan(number(code), Orphan::Default),
        ["deaf-orphan", code] => exit_with_orphan(number(code), Orphan::IgnoresSigterm),
        ["loader"] => loader(),
        ["escape", code] => exit_with_orphan(number(code), Orphan::OwnSession),
        ["regroup", code] => exit_with_orphan(number(code), Orphan::OwnGroup),
        ["cleaner", file] => cleaner(file),
        ["finisher", file] => finisher(file),
        ["flood", lines, width] => flood(number(lines), number(width)),
        ["facts"] => facts(),
        ["executor"] => executor(),
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

fn print_line(line: &str) {
    let mut stdout = std::io::stdout().lock();
    // Fails if the test has closed the pipe, which is not an error.
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
    Default,
    IgnoresSigterm,
    OwnSession,
    OwnGroup,
}

/// Forks a child that does not end, prints its pid when it is ready, and exits with `code`.
fn exit_with_orphan(code: i32, kind: Orphan) -> ! {
    let child = sys::fork_ready(
        || match kind {
            Orphan::Default => {}
            Orphan::IgnoresSigterm => sys::ignore(libc::SIGTERM),
            Orphan::OwnSession => sys::new_session(),
            Orphan::OwnGroup => sys::new_group(),
        },
        || pause(),
    );
    print_line(&child.to_string());
    exit(code)
}

/// Ignores SIGTERM and starts a helper that does the same. The helper creates `file` when this process has ended: it imitates Python's
/// resource tracker.
fn cleaner(file: &str) -> ! {
    sys::ignore(libc::SIGTERM);
    let parent = std::process::id();
    sys::fork_ready(|| (), || create_when_orphaned(parent, file, 0));
    print_line("ready");
    pause()
}

/// Starts a child that SIGTERM ends, prints its pid, and waits for SIGTERM. Exits with code 0 if the child still runs then, else with 1.
fn loader() -> ! {
    let child = sys::fork_ready(|| (), || pause());
    sys::block(libc::SIGTERM);
    print_line(&child.to_string());
    sys::wait_for_signal(libc::SIGTERM);
    let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
    exit(i32::from(stat.is_empty() || stat.contains(") Z ")))
}

/// Starts a helper that creates `file` 50 ms after the end of this process, unless SIGTERM ends it, and exits with code 0.
fn finisher(file: &str) -> ! {
    let parent = std::process::id();
    sys::fork_ready(|| (), || create_when_orphaned(parent, file, 50_000_000));
    exit(0)
}

fn create_when_orphaned(parent: u32, file: &str, after_ns: i64) {
    sys::wait_until_orphaned(parent);
    sys::wait_until(i64::try_from(sys::monotonic_ns()).unwrap_or(0) + after_ns);
    let _ = std::fs::write(file, "");
}

/// Prints numbered lines of a fixed width as fast as possible.
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

/// A worker of an elastic job without training. It writes the times of its start, its SIGTERM and its failure to files in `folder`.
///
/// In each of the first `failures` attempts the last rank waits until all ranks have started, records the time and exits with code 1. The
/// other ranks record when they receive SIGTERM. In the next attempt all ranks exit with code 0 once all have started.
/// The attempt is the number of recorded failures, because of torchrun's agents only that of the failed worker counts a restart.
fn worker(folder: &str, failures: u32) {
    let started = sys::monotonic_ns();
    let variable = |name: &str| {
        let value = std::env::var(name).ok().and_then(|value| value.parse::<u32>().ok());
        value.unwrap_or_else(|| usage())
    };
    let (rank, world_size) = (variable("RANK"), variable("WORLD_SIZE"));
    let attempt =
        (0..failures).find(|attempt| !is_recorded(folder, "failed", *attempt, world_size - 1)).unwrap_or(failures);
    // Files are created before the measured event, because that takes longer than the measured time.
    let create =
        |event: &str| std::fs::File::create(record_path(folder, event, attempt, rank)).unwrap_or_else(|_| exit(65));
    let record =
        |mut file: std::fs::File, at: u64| file.write_all(at.to_string().as_bytes()).unwrap_or_else(|_| exit(65));
    sys::block(libc::SIGTERM);
    if attempt < failures && rank + 1 < world_size {
        let signalled = create("signalled");
        record(create("started"), started);
        sys::wait_for_signal(libc::SIGTERM);
        record(signalled, sys::monotonic_ns());
        exit(0)
    }
    let failed = create("failed");
    record(create("started"), started);
    while !(0..world_size).all(|rank| is_recorded(folder, "started", attempt, rank)) {
        sys::wait_until(i64::try_from(sys::monotonic_ns()).unwrap_or(0) + 1_000_000);
    }
    if attempt < failures {
        record(failed, sys::monotonic_ns());
        exit(1)
    }
}

fn record_path(folder: &str, event: &str, attempt: u32, rank: u32) -> std::path::PathBuf {
    std::path::Path::new(folder).join(format!("{event}.{attempt}.{rank}"))
}

fn is_recorded(folder: &str, event: &str, attempt: u32, rank: u32) -> bool {
    std::fs::metadata(record_path(folder, event, attempt, rank)).is_ok_and(|file| file.len() > 0)
}

/// Executes itself again and again, in one process.
fn executor() -> ! {
    use std::os::unix::process::CommandExt;
    let error = std::process::Command::new("/proc/self/exe").arg("executor").exec();
    panic!("{error}")
}

/// Prints the inherited attributes of this process: session, signal mask, dispositions, descriptors, CPUs.
fn facts() {
    let ([pid, group, session, parent], death_signal) = sys::identity();
    print_line(&format!("pid={pid} group={group} session={session} parent={parent}"));
    print_line(&format!("death_signal={death_signal}"));
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    for line in status
        .lines()
        .filter(|line| ["SigBlk", "SigIgn", "Cpus_allowed_list"].iter().any(|field| line.starts_with(field)))
    {
        print_line(&line.replace(":\t", "="));
    }
    let mut open: Vec<String> = std::fs::read_dir("/proc/self/fd")
        .map(|entries| entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
        .unwrap_or_default();
    open.sort();
    print_line(&format!("fds={}", open.join(",")));
}
