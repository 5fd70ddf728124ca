//! What hung workers were doing: gathered from a thread of its own, since `/proc` and a debugger may take their time.
//!
//! Each worker is looked at by a thread. What it has found is in files beside the worker's logs:
//!
//! - `evidence.txt`: state, threads, wait channels and, where readable, kernel stacks.
//! - `stacks.PID.txt`: the stack of every Python thread, by the dump that the worker has armed itself ([`STACKS_SIGNAL_OFFSET`]), or
//!   else by py-spy.

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

/// A worker that has armed a dump of its stacks writes them when it gets the signal `SIGRTMIN` plus this.
pub(crate) const STACKS_SIGNAL_OFFSET: i32 = 13;

/// A dump that has written nothing for this long is complete: there is no mark at its end.
const SETTLED: Duration = Duration::from_millis(20);

const MOST_THREADS: usize = 256;
const MOST_STACK_BYTES: u64 = 1 << 20;

/// A process to look at.
#[derive(Debug)]
pub(crate) struct Subject {
    /// Held, so that the signal for the dump hits it or nobody.
    pub(crate) hold: ProcessHandle,
    /// What the reader of the evidence knows it by.
    pub(crate) label: String,
    /// Where its evidence goes.
    pub(crate) folder: PathBuf,
}

/// Looks at all subjects at once, until `deadline` at the latest. The files that were written, in the order of the subjects.
pub(crate) fn gather(
    subjects: &[Subject],
    headline: &str,
    deadline: Instant,
    py_spy: Option<&Path>,
) -> Vec<(i32, Vec<PathBuf>)> {
    std::thread::scope(|scope| {
        let look = |subject| move || look(subject, headline, deadline, py_spy);
        let lookers = subjects.iter().map(|subject| (subject.hold.pid(), scope.spawn(look(subject))));
        let lookers: Vec<_> = lookers.collect();
        lookers.into_iter().map(|(pid, looker)| (pid, looker.join().unwrap_or_default())).collect()
    })
}

fn look(subject: &Subject, headline: &str, deadline: Instant, py_spy: Option<&Path>) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let path = subject.folder.join("evidence.txt");
    if append(&path, &describe(subject, headline)).is_ok() {
        files.push(path);
    }
    let pid = subject.hold.pid();
    let stacks = subject.folder.join(format!("stacks.{pid}.txt"));
    let armed = stacks.is_file() && catches(pid, libc::SIGRTMIN() + STACKS_SIGNAL_OFFSET);
    let dumped = if armed {
        own_dump(subject, &stacks, deadline)
    } else {
        py_spy.map_or(Ok(false), |py_spy| foreign_dump(py_spy, pid, &stacks, deadline))
    };
    if matches!(dumped, Ok(true)) {
        files.push(stacks);
    }
    files
}

/// Has the worker dump its own stacks. `false` if nothing came in time.
fn own_dump(subject: &Subject, file: &Path, deadline: Instant) -> io::Result<bool> {
    if subject.hold.is_stopped() {
        return Ok(false);
    }
    let notifier = Notifier::new()?;
    notifier.watch(file)?;
    let mut heard = false;
    if !subject.hold.signal(libc::SIGRTMIN() + STACKS_SIGNAL_OFFSET)? {
        return Ok(false);
    }
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let patience = if heard { left.min(SETTLED) } else { left };
        match wait_readable([Some(&notifier)], Some(patience))? {
            [true] => {
                notifier.drain(|_| heard = true);
            }
            [false] if heard || Instant::now() >= deadline => return Ok(heard),
            [false] => {}
        }
    }
}

/// Has py-spy look into the worker. `false` if it could not, or not in time.
fn foreign_dump(py_spy: &Path, pid: i32, file: &Path, deadline: Instant) -> io::Result<bool> {
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
    let pid = subject.hold.pid();
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
    for thread in threads.iter().take(MOST_THREADS) {
        let read = |name: &str| read_bounded(&format!("/proc/{pid}/task/{thread}/{name}"));
        let name = read("comm").unwrap_or_default();
        let state = procfs::stat(*thread).map_or('?', |stat| stat.state);
        let channel = read("wchan").filter(|channel| channel != "0").unwrap_or_default();
        let _ = writeln!(text, "  thread {thread} {} {state} {channel}", name.trim_end());
        for line in read("stack").unwrap_or_default().lines() {
            let _ = writeln!(text, "    {line}");
        }
    }
    if threads.len() > MOST_THREADS {
        let _ = writeln!(text, "  and {} threads more", threads.len() - MOST_THREADS);
    }
    text.push('\n');
    text
}

fn read_bounded(path: &str) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(MOST_STACK_BYTES).read_to_string(&mut text).ok()?;
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
