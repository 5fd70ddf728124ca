//! Evidence of hung workers, collected off the engine thread because reads of `/proc` and debuggers can be slow.
//!
//! One thread examines each worker and writes files beside the worker's logs:
//!
//! - `evidence.txt`: state, threads, wait channels and, if readable, kernel stacks.
//! - `stacks.PID.txt`: the stack of every Python thread, dumped by the worker itself if it has armed a handler
//!   ([`STACKS_SIGNAL_OFFSET`]), else by py-spy.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::sys::notify::Notifier;
use crate::sys::poller::wait_readable;
use crate::sys::process::ProcessHandle;
use crate::sys::procfs;

/// A worker with an armed handler dumps its stacks on the signal `SIGRTMIN` plus this offset.
pub(crate) const STACKS_SIGNAL_OFFSET: i32 = 13;

/// A dump has no end marker; it counts as complete after this long without a write.
const QUIET_TIME: Duration = Duration::from_millis(20);

const MAX_THREADS: usize = 256;
const MAX_FILE_BYTES: u64 = 1 << 20;

/// A process to examine.
#[derive(Debug)]
pub(crate) struct Subject {
    /// Ensures that the signal for the dump reaches this process or no process.
    pub(crate) handle: ProcessHandle,
    /// The worker's name in the evidence.
    pub(crate) label: String,
    /// Folder for the evidence.
    pub(crate) folder: PathBuf,
}

/// Examines all subjects in parallel, until `deadline` at the latest. Returns the written files by pid, in the order of the subjects.
pub(crate) fn collect(
    subjects: &[Subject],
    headline: &str,
    deadline: Instant,
    py_spy: Option<&Path>,
) -> Vec<(i32, Vec<PathBuf>)> {
    std::thread::scope(|scope| {
        let examine = |subject| move || examine(subject, headline, deadline, py_spy);
        let threads = subjects.iter().map(|subject| (subject.handle.pid(), scope.spawn(examine(subject))));
        let threads: Vec<_> = threads.collect();
        threads.into_iter().map(|(pid, thread)| (pid, thread.join().unwrap_or_default())).collect()
    })
}

fn examine(subject: &Subject, headline: &str, deadline: Instant, py_spy: Option<&Path>) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let path = subject.folder.join("evidence.txt");
    if append(&path, &describe(subject, headline)).is_ok() {
        files.push(path);
    }
    let pid = subject.handle.pid();
    let stacks = subject.folder.join(format!("stacks.{pid}.txt"));
    let armed = stacks.is_file() && catches(pid, libc::SIGRTMIN() + STACKS_SIGNAL_OFFSET);
    let dumped = if armed {
        dump_by_worker(subject, &stacks, deadline)
    } else {
        py_spy.map_or(Ok(false), |py_spy| dump_by_py_spy(py_spy, pid, &stacks, deadline))
    };
    if matches!(dumped, Ok(true)) {
        files.push(stacks);
    }
    files
}

/// Makes the worker dump its own stacks. `false` if it wrote nothing before the deadline.
fn dump_by_worker(subject: &Subject, file: &Path, deadline: Instant) -> io::Result<bool> {
    if subject.handle.is_stopped() {
        return Ok(false);
    }
    let notifier = Notifier::new()?;
    notifier.watch(file)?;
    let mut has_written = false;
    if !subject.handle.signal(libc::SIGRTMIN() + STACKS_SIGNAL_OFFSET)? {
        return Ok(false);
    }
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = if has_written { left.min(QUIET_TIME) } else { left };
        match wait_readable([Some(&notifier)], Some(timeout))? {
            [true] => {
                notifier.drain(|_| has_written = true);
            }
            [false] if has_written || Instant::now() >= deadline => return Ok(has_written),
            [false] => {}
        }
    }
}

/// Runs py-spy on the worker. `false` if it failed or missed the deadline.
fn dump_by_py_spy(py_spy: &Path, pid: i32, file: &Path, deadline: Instant) -> io::Result<bool> {
    let mut command = Command::new(py_spy);
    command.args(["dump", "--nonblocking", "--pid", &pid.to_string()]);
    let mut dump = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let mut text = Vec::new();
    let read: io::Result<bool> = dump.stdout.take().map_or(Ok(false), |mut output| {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match wait_readable([Some(&output)], Some(left))? {
                [true] => {
                    let mut chunk = [0; 8192];
                    match output.read(&mut chunk)? {
                        0 => return Ok(true),
                        read => text.extend_from_slice(&chunk[..read]),
                    }
                }
                [false] if left.is_zero() => return Ok(false),
                [false] => {}
            }
        }
    });
    if !matches!(read, Ok(true)) {
        let _ = dump.kill();
    }
    let succeeded = dump.wait()?.success() && read?;
    if succeeded {
        fs::write(file, text)?;
    }
    Ok(succeeded)
}

fn append(path: &Path, text: &str) -> io::Result<()> {
    File::options().append(true).create(true).open(path)?.write_all(text.as_bytes())
}

fn describe(subject: &Subject, headline: &str) -> String {
    let pid = subject.handle.pid();
    let mut text = format!("{headline}\n{}, pid {pid}\n", subject.label);
    for name in ["State", "VmRSS", "Threads", "SigPnd", "ShdPnd", "SigBlk", "SigCgt"] {
        if let Some(value) = status_field(pid, name) {
            let _ = writeln!(text, "  {name}: {value}");
        }
    }
    let mut threads: Vec<i32> = fs::read_dir(format!("/proc/{pid}/task")).map_or_else(
        |_| Vec::new(),
        |tasks| tasks.flatten().filter_map(|task| task.file_name().to_str()?.parse().ok()).collect(),
    );
    threads.sort_unstable();
    for thread in threads.iter().take(MAX_THREADS) {
        let read = |name: &str| read_bounded(&format!("/proc/{pid}/task/{thread}/{name}"));
        let name = read("comm").unwrap_or_default();
        let state = procfs::stat(*thread).map_or('?', |stat| stat.state);
        let channel = read("wchan").filter(|channel| channel != "0").unwrap_or_default();
        let _ = writeln!(text, "  thread {thread} {} {state} {channel}", name.trim_end());
        for line in read("stack").unwrap_or_default().lines() {
            let _ = writeln!(text, "    {line}");
        }
    }
    if threads.len() > MAX_THREADS {
        let _ = writeln!(text, "  and {} more threads", threads.len() - MAX_THREADS);
    }
    text.push('\n');
    text
}

fn read_bounded(path: &str) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(MAX_FILE_BYTES).read_to_string(&mut text).ok()?;
    Some(text)
}

fn status_field(pid: i32, name: &str) -> Option<String> {
    let status = read_bounded(&format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}

/// Whether a process has a handler for a signal.
fn catches(pid: i32, signal: i32) -> bool {
    let caught = status_field(pid, "SigCgt").and_then(|mask| u64::from_str_radix(&mask, 16).ok());
    caught.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
