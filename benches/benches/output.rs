//! Cost of the relay for standard error, and of reading the last bytes of teed files. `cargo bench --bench output`
//!
//! The sides alternate. Each sample checks its bytes.

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferroelastic_benches::print_percentiles;
use ferroelastic_core::Engine;
use ferroelastic_core::engine::Group;
use ferroelastic_core::logs::{KEPT, TailSpec};
use ferroelastic_core::supervise::StopPlan;
use ferroelastic_core::sys::console::Console;
use ferroelastic_core::sys::spawn::{Command, Stdio};

const TIMEOUT: Duration = Duration::from_secs(60);
const WORKERS: usize = 4;
const LINES: usize = 200_000;
const WIDTH: usize = 100;

fn command(words: &[&str]) -> Command {
    Command { argv: words.iter().map(|word| CString::new(*word).expect("no NUL")).collect(), ..Command::default() }
}

fn wait(group: &Group) {
    loop {
        let generation = group.generation().expect("own process");
        if group.exits(0).expect("own process").len() == group.pids().len() {
            return;
        }
        group.wait(generation, Some(TIMEOUT), [None; 2]).expect("engine");
    }
}

/// A script that writes numbered lines in chunks of 64 KiB.
fn flood() -> Command {
    command(&["/usr/bin/seq", "-f", &format!("%0{}.0f", WIDTH - 1), "1", &LINES.to_string()])
}

fn read_all(reader: OwnedFd) -> std::thread::JoinHandle<usize> {
    std::thread::spawn(move || {
        let (mut file, mut buffer, mut total) = (File::from(reader), vec![0; 1 << 20], 0);
        loop {
            match file.read(&mut buffer).expect("read") {
                0 => return total,
                count => total += count,
            }
        }
    })
}

/// A pipe of the size that consoles get, and the thread that reads it and returns the number of bytes.
fn console() -> (std::thread::JoinHandle<usize>, OwnedFd) {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let writer = OwnedFd::from(writer);
    Console::new(writer.as_fd()).expect("resized");
    (read_all(reader.into()), writer)
}

/// Time from the start of the workers until the reader of the console has all bytes.
fn copy(engine: &Engine, with_relay: bool) -> Duration {
    let (reading, writer) = console();
    let relay = with_relay.then(|| engine.relay(writer.as_fd(), WORKERS, None).expect("a relay"));
    let writer = Arc::new(writer);
    let start = Instant::now();
    let commands = (0..WORKERS).map(|index| {
        let relayed = relay.as_ref().and_then(|relay| relay.worker_end(index).expect("own process"));
        Command { stdout: Stdio::Fd(relayed.unwrap_or_else(|| Arc::clone(&writer))), ..flood() }
    });
    let group = engine.spawn(commands.collect()).expect("started");
    wait(&group);
    if let Some(relay) = relay {
        assert_eq!(relay.finish(TIMEOUT).expect("finished").dropped_bytes, 0);
        assert!((0..WORKERS).all(|index| relay.last(index).is_ok_and(|last| last.len() == KEPT)));
    }
    drop(writer);
    assert_eq!(reading.join().expect("no panic"), WORKERS * LINES * WIDTH);
    start.elapsed()
}

/// Time of a tee of all workers, and of reading the last bytes of each file.
fn tee(engine: &Engine, folder: &Path, with_tails: bool) -> Duration {
    let files: Vec<PathBuf> = (0..WORKERS).map(|rank| folder.join(rank.to_string())).collect();
    let (reading, console) = console();
    let start = Instant::now();
    let commands = files.iter().map(|path| Command { stdout: Stdio::File(path.clone()), ..flood() });
    let group = engine.spawn(commands.collect()).expect("started");
    let files_with_prefixes = files.iter().map(|path| (path.clone(), Vec::new())).collect();
    let spec = TailSpec {
        files: files_with_prefixes,
        console,
        only_lines_with: Vec::new(),
        whole_lines_only: false,
        is_json: false,
    };
    let tail = engine.tail(spec).expect("a tail");
    wait(&group);
    assert_eq!(tail.finish(TIMEOUT).expect("finished").dropped_bytes, 0);
    if with_tails {
        for path in &files {
            let file = File::open(path).expect("opened");
            let size = file.metadata().expect("a size").len();
            let mut last = vec![0; KEPT];
            file.read_exact_at(&mut last, size - KEPT as u64).expect("read");
            assert!(last.ends_with(b"\n"));
        }
    }
    let elapsed = start.elapsed();
    drop(tail);
    let read = reading.join().expect("no panic");
    assert_eq!(read, WORKERS * LINES * WIDTH);
    elapsed
}

fn spawn(engine: &Engine, console: &OwnedFd, with_relay: bool) -> Duration {
    let sleeper = || command(&["/bin/sleep", "1000"]);
    let start = Instant::now();
    let relay = with_relay.then(|| engine.relay(console.as_fd(), WORKERS, None).expect("a relay"));
    let commands = (0..WORKERS).map(|index| match &relay {
        Some(relay) => {
            let end = relay.worker_end(index).expect("own process").expect("open");
            Command { stderr: Stdio::Fd(end), ..sleeper() }
        }
        None => sleeper(),
    });
    let group = engine.spawn(commands.collect()).expect("started");
    let elapsed = start.elapsed();
    group.stop(StopPlan::kill(TIMEOUT)).expect("stopped");
    wait(&group);
    elapsed
}

#[allow(clippy::cast_precision_loss, reason = "a number of megabytes")]
fn throughput(samples: &mut [Duration]) -> f64 {
    samples.sort_unstable();
    (WORKERS * LINES * WIDTH) as f64 / 1e6 / samples[samples.len() / 2].as_secs_f64()
}

fn main() {
    let rounds = std::env::args().skip(1).find_map(|word| word.parse().ok()).unwrap_or(15);
    let engine = Engine::start().expect("an engine");
    let folder = std::env::temp_dir().join(format!("ferro-output-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let console = OwnedFd::from(File::options().write(true).open("/dev/null").expect("opened"));
    for (label, measure) in [
        ("stderr in a pipe, directly and by the relay", &(|relay| copy(&engine, relay)) as &dyn Fn(bool) -> Duration),
        ("tee, without and with the last bytes", &|tails| tee(&engine, &folder, tails)),
    ] {
        let mut sides = [Vec::new(), Vec::new()];
        for round in 0..2 * rounds {
            let side = (round + round / 2) % 2;
            sides[side].push(measure(side == 1));
        }
        let [first, second] = sides.each_mut().map(|samples| throughput(samples));
        println!("{label}, {WORKERS} workers x {LINES} lines: {first:.0} and {second:.0} MB/s");
    }
    let mut sides = [Vec::new(), Vec::new()];
    for round in 0..40 * rounds {
        let side = (round + round / 2) % 2;
        sides[side].push(spawn(&engine, &console, side == 1));
    }
    let [without, with] = sides;
    print_percentiles(&format!("start of {WORKERS} workers, inherited standard error"), without);
    print_percentiles(&format!("start of {WORKERS} workers, relay"), with);
    std::fs::remove_dir_all(&folder).expect("removed");
}
