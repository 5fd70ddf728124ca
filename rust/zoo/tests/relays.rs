//! Streams of workers that use the console: each byte is copied, and the last ones are kept.

mod support;

use std::ffi::CString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use ferroelastic_core::Engine;
use ferroelastic_core::engine::Group;
use ferroelastic_core::logs::{KEPT, Relay};
use ferroelastic_core::sys::pty::Pty;
use ferroelastic_core::sys::spawn::{Command, Stdio};
use ferroelastic_core::sys::wait::ExitStatus;
use rustix::termios::{tcgetwinsize, tcsetwinsize};
use support::{PATIENCE, all_exits, best_engine, eventually};

/// A shell whose standard error is a stream of the relay. `$ZOO` is the zoo.
fn shell(relay: &Relay, index: usize, script: &str) -> Command {
    let end = relay.worker_end(index).expect("own process").expect("open");
    let word = |text: &str| CString::new(text).expect("no NUL");
    Command {
        argv: ["/bin/sh", "-c", script].map(word).to_vec(),
        env: vec![word(concat!("ZOO=", env!("CARGO_BIN_EXE_zoo"))), word("PATH=/usr/bin:/bin")],
        stderr: Stdio::Fd(end),
        ..Command::default()
    }
}

fn relay(engine: &Engine, streams: usize) -> (Relay, OwnedFd) {
    let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
    (engine.relay(writer.as_fd(), streams, None).expect("a relay"), reader)
}

fn run(engine: &Engine, relay: &Relay, scripts: &[&str]) -> Group {
    let commands = scripts.iter().enumerate().map(|(index, script)| shell(relay, index, script)).collect();
    engine.spawn(commands).expect("started")
}

fn read_all(reader: OwnedFd) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        File::from(reader).read_to_end(&mut bytes).expect("read");
        bytes
    })
}

#[test]
fn the_bytes_of_one_write_stay_together() {
    const LINES: usize = 1000;
    let engine = best_engine();
    let (relay, reader) = relay(&engine, 3);
    let script = |letter: &str, width: usize| {
        format!(
            "line=$(printf %{width}s | tr ' ' {letter}); i=0; while [ $i -lt {LINES} ]; do echo $line >&2; i=$((i + 1)); done"
        )
    };
    let widths = [("a", 10), ("b", 1000), ("c", 4095)];
    let scripts = widths.map(|(letter, width)| script(letter, width));
    let group = run(&engine, &relay, &scripts.each_ref().map(String::as_str));
    let console = std::thread::spawn(move || {
        let mut counts = [0; 3];
        for line in BufReader::new(File::from(reader)).lines() {
            let line = line.expect("text");
            let index = widths.iter().position(|(letter, _)| line.starts_with(letter)).expect("a letter");
            assert_eq!(line, widths[index].0.repeat(widths[index].1));
            counts[index] += 1;
        }
        counts
    });
    all_exits(&group);
    relay.finish(PATIENCE).expect("finished");
    drop((relay, group, engine));
    assert_eq!(console.join().expect("no panic"), [LINES; 3]);
}

#[test]
fn a_stream_of_many_bytes_without_lines_is_copied_and_its_end_is_kept() {
    let engine = best_engine();
    let (relay, reader) = relay(&engine, 1);
    let group = run(&engine, &relay, &["head -c 50000000 /dev/zero | tr '\\0' '\\377' >&2; printf '%0100000d' 7 >&2"]);
    let console = read_all(reader);
    all_exits(&group);
    let report = relay.finish(PATIENCE).expect("finished");
    assert_eq!((report.bytes, report.dropped_bytes), (50_100_000, 0));
    let last = relay.last(0).expect("own process");
    assert_eq!((last.len(), last.last()), (KEPT, Some(&b'7')));
    assert!(last.iter().all(u8::is_ascii_digit));
    drop((relay, group, engine));
    let bytes = console.join().expect("no panic");
    assert_eq!(bytes.len(), 50_100_000);
    assert!(bytes[..50_000_000].iter().all(|byte| *byte == 0xff));
}

#[test]
fn an_unfinished_line_is_copied_at_once() {
    let engine = best_engine();
    let (relay, reader) = relay(&engine, 1);
    let group = run(&engine, &relay, &["printf 'name? ' >&2; exec sleep 60"]);
    let mut bytes = [0; 6];
    File::from(reader).read_exact(&mut bytes).expect("read");
    assert_eq!(&bytes, b"name? ");
    group.signal(0, libc::SIGKILL, false).expect("signalled");
    all_exits(&group);
}

#[test]
fn a_full_console_blocks_the_worker_and_loses_nothing() {
    const LINES: usize = 60_000;
    let engine = best_engine();
    let (relay, reader) = relay(&engine, 1);
    let group = run(&engine, &relay, &[&format!("exec $ZOO flood {LINES} 99 >&2")]);
    // The worker is blocked when its pipe is full.
    let state = || ferroelastic_core::sys::procfs::stat(group.pids()[0]).map(|stat| stat.state);
    eventually(|| state() == Some('S') && relay.last(0).is_ok_and(|last| last.len() == KEPT));
    assert_eq!(group.exits(0).expect("own process").len(), 0);
    let console = std::thread::spawn(move || BufReader::new(File::from(reader)).lines().map_while(Result::ok).count());
    all_exits(&group);
    assert_eq!(relay.finish(PATIENCE).expect("finished").dropped_bytes, 0);
    drop((relay, group, engine));
    assert_eq!(console.join().expect("no panic"), LINES);
}

#[test]
fn a_console_that_is_never_read_is_given_up_and_the_last_bytes_are_kept() {
    let engine = best_engine();
    let (relay, reader) = relay(&engine, 2);
    let group = run(&engine, &relay, &["exec $ZOO flood 1000000 99 >&2", "sleep 0.2; echo the cause >&2"]);
    eventually(|| group.exits(0).is_ok_and(|exits| exits.len() == 1));
    group.signal(0, libc::SIGKILL, false).expect("signalled");
    all_exits(&group);
    let report = relay.finish(Duration::from_millis(50)).expect("finished");
    assert!(report.dropped_bytes > 0);
    assert_eq!(relay.last(1).expect("own process"), b"the cause\n");
    drop(reader);
}

#[test]
fn a_console_without_a_reader_costs_no_worker_its_life() {
    let engine = best_engine();
    let (relay, reader) = relay(&engine, 1);
    drop(reader);
    let group = run(&engine, &relay, &["for i in 1 2 3; do echo $i >&2; sleep 0.05; done; exit 5"]);
    let exits = all_exits(&group);
    assert_eq!(exits[0].status, ExitStatus::Exited(5));
    let report = relay.finish(PATIENCE).expect("finished");
    assert_eq!((report.console_error.as_deref(), report.dropped_bytes), (Some("Broken pipe (os error 32)"), 6));
    assert_eq!(relay.last(0).expect("own process"), b"1\n2\n3\n");
}

#[test]
fn a_worker_that_closes_its_stream_disturbs_no_other() {
    let engine = best_engine();
    let (relay, reader) = relay(&engine, 2);
    let group = run(&engine, &relay, &["echo first >&2; exec 2>&-; sleep 0.1", "sleep 0.05; echo second >&2"]);
    all_exits(&group);
    relay.finish(PATIENCE).expect("finished");
    drop((relay, group, engine));
    assert_eq!(read_all(reader).join().expect("no panic"), b"first\nsecond\n");
}

#[test]
fn a_helper_that_outlives_its_worker_delays_nothing_and_is_copied() {
    let engine = best_engine();
    let (relay, reader) = relay(&engine, 1);
    let folder = tempfile::tempdir().expect("a folder");
    let gate = folder.path().join("gate");
    let script = format!("(while ! [ -e {} ]; do sleep 0.01; done; echo late >&2) & echo early >&2", gate.display());
    let group = run(&engine, &relay, &[&script]);
    all_exits(&group);
    assert_eq!(relay.finish(PATIENCE).expect("finished").bytes, 6);
    drop(relay);
    File::create(&gate).expect("opened");
    let mut console = File::from(reader);
    let mut bytes = [0; 11];
    console.read_exact(&mut bytes).expect("read");
    assert_eq!(&bytes, b"early\nlate\n");
    // The relay ends with the helper.
    assert_eq!(console.read(&mut bytes).expect("read"), 0);
}

#[test]
fn a_helper_that_never_stops_writing_does_not_delay_the_end() {
    let engine = best_engine();
    let (relay, reader) = relay(&engine, 1);
    let console = read_all(reader);
    let group = run(&engine, &relay, &["yes >&2 & echo $! >&2; sleep 0.1"]);
    all_exits(&group);
    relay.finish(PATIENCE).expect("finished");
    group.signal(0, libc::SIGKILL, false).expect("signalled");
    drop((relay, group, engine));
    console.join().expect("no panic");
}

/// The relay of one stream to a terminal, whose other end is returned.
fn terminal_relay(engine: &Engine) -> (Relay, Pty) {
    let console = Pty::open().expect("a terminal");
    rustix::io::ioctl_fionbio(&console.agent_end, false).expect("blocking");
    (engine.relay(console.worker_end.as_fd(), 1, None).expect("a relay"), console)
}

fn line_of(console: &mut BufReader<File>) -> String {
    let mut line = String::new();
    console.read_line(&mut line).expect("a line");
    line.trim_end_matches('\n').to_owned()
}

#[test]
fn on_a_terminal_the_worker_has_a_terminal_of_the_same_size_that_controls_no_session() {
    let engine = best_engine();
    let (relay, console) = terminal_relay(&engine);
    assert!(relay.is_terminal());
    let set_size = |rows, columns| {
        let mut size = tcgetwinsize(&console.worker_end).expect("a size");
        (size.ws_row, size.ws_col) = (rows, columns);
        tcsetwinsize(&console.worker_end, size).expect("set");
    };
    set_size(11, 22);
    let script = "test -t 2 && echo terminal >&2; awk '{print $7}' /proc/self/stat >&2; printf 'a\\r\\033[Kb\\n' >&2; \
                  until [ \"$(stty size <&2)\" = '11 22' ]; do sleep 0.01; done; echo 1 >&2; \
                  until [ \"$(stty size <&2)\" = '33 44' ]; do sleep 0.01; done; echo 2 >&2";
    let group = run(&engine, &relay, &[script]);
    let reader = console.agent_end.try_clone().expect("duplicated");
    let mut lines = BufReader::new(File::from(reader));
    for expected in ["terminal", "0", "a\r\u{1b}[Kb", "1"] {
        assert_eq!(line_of(&mut lines), expected);
    }
    set_size(33, 44);
    assert_eq!(line_of(&mut lines), "2");
    all_exits(&group);
    assert_eq!(relay.finish(PATIENCE).expect("finished").dropped_bytes, 0);
    assert_eq!(relay.last(0).expect("own process"), b"terminal\n0\na\r\x1b[Kb\n1\n2\n");
}

#[test]
fn the_bytes_before_the_end_of_a_worker_are_complete_on_a_terminal() {
    let engine = best_engine();
    for _ in 0..20 {
        let (relay, console) = terminal_relay(&engine);
        let group = run(&engine, &relay, &["$ZOO flood 100 99 >&2; kill -KILL $$"]);
        let reader = console.agent_end.try_clone().expect("duplicated");
        let reading = std::thread::spawn(move || {
            let mut lines = BufReader::new(File::from(reader));
            (0..100).map(|_| line_of(&mut lines).len()).sum::<usize>()
        });
        all_exits(&group);
        let report = relay.finish(PATIENCE).expect("finished");
        assert_eq!((report.bytes, report.dropped_bytes), (10_000, 0));
        assert_eq!(reading.join().expect("no panic"), 9_900);
    }
}

#[test]
fn a_file_gets_the_bytes_of_all_workers_and_of_other_writers() {
    let engine = best_engine();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("log");
    let mut file = File::create(&path).expect("created");
    file.write_all(b"before\n").expect("written");
    let relay = engine.relay(file.as_fd(), 2, None).expect("a relay");
    let group = run(&engine, &relay, &["echo one >&2", "sleep 0.1; echo two >&2"]);
    all_exits(&group);
    relay.finish(PATIENCE).expect("finished");
    file.write_all(b"after\n").expect("written");
    assert_eq!(std::fs::read_to_string(&path).expect("read"), "before\none\ntwo\nafter\n");
}

#[test]
fn a_relay_leaves_no_descriptor_open() {
    let engine = best_engine();
    let count = || std::fs::read_dir(Path::new("/proc/self/fd")).expect("listed").count();
    let once = |is_finished: bool| {
        let (relay, _reader) = relay(&engine, 2);
        let group = run(&engine, &relay, &["echo one >&2", "exit 1"]);
        all_exits(&group);
        if is_finished {
            relay.finish(PATIENCE).expect("finished");
        }
    };
    once(true);
    let before = count();
    for is_finished in [true, false] {
        once(is_finished);
        eventually(|| count() <= before);
    }
}

#[test]
fn a_relay_without_a_handle_copies_until_the_worker_has_ended() {
    let engine = best_engine();
    let (relay, reader) = relay(&engine, 1);
    let script = "trap 'echo late >&2; exit' TERM; echo ready >&2; while :; do sleep 0.01; done";
    let group = run(&engine, &relay, &[script]);
    let mut console = BufReader::new(File::from(reader));
    assert_eq!(line_of(&mut console), "ready");
    drop(relay);
    // The shell alone: it would report the end of a killed `sleep`.
    group.signal(0, libc::SIGTERM, true).expect("signalled");
    all_exits(&group);
    let mut bytes = Vec::new();
    console.read_to_end(&mut bytes).expect("read");
    assert_eq!(bytes, b"late\n");
}
