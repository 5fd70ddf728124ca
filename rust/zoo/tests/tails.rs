//! No line is lost and none is torn.

mod support;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::time::Duration;

use ferroelastic_core::Engine;
use ferroelastic_core::logs::TailSpec;
use ferroelastic_core::sys::spawn::Stdio;
use support::{PATIENCE, all_exits, on_each_backend, zoo};

on_each_backend!(every_line_of_four_floods_comes_out_whole_and_in_order);
fn every_line_of_four_floods_comes_out_whole_and_in_order(engine: &Engine) {
    const LINES: usize = 20_000;
    let folder = tempfile::tempdir().expect("tempdir");
    let files: Vec<PathBuf> = (0..4).map(|rank| folder.path().join(format!("{rank}.log"))).collect();
    let (reader, writer) = rustix::pipe::pipe().expect("pipe");
    let tail = engine
        .tail(TailSpec {
            files: files
                .iter()
                .enumerate()
                .map(|(rank, path)| (path.clone(), format!("[{rank}]:").into_bytes()))
                .collect(),
            console: writer,
            only_lines_with: Vec::new(),
            whole_lines_only: false,
            is_json: false,
        })
        .expect("tail");
    let console = std::thread::spawn(move || {
        let mut next = [0usize; 4];
        for line in BufReader::new(File::from(reader)).lines() {
            let line = line.expect("text");
            let (rank, number) = line.split_once("]:").expect("a prefix");
            let rank: usize = rank.trim_start_matches('[').parse().expect("a rank");
            assert_eq!(number, format!("{:060}", next[rank]));
            next[rank] += 1;
        }
        next
    });
    let commands = files
        .iter()
        .map(|path| {
            let mut command = zoo(&["flood", &LINES.to_string(), "60"]);
            command.stdout = Stdio::File(path.clone());
            command
        })
        .collect();
    let group = engine.spawn(commands).expect("spawn");
    all_exits(&group);
    let report = tail.finish(PATIENCE).expect("finish");
    assert_eq!((report.lines, report.dropped_bytes, report.broken_lines), (4 * LINES as u64, 0, 0));
    assert_eq!(console.join().expect("no panic"), [LINES; 4]);
}

on_each_backend!(an_unread_console_costs_no_line_and_delays_no_exit);
fn an_unread_console_costs_no_line_and_delays_no_exit(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let path = folder.path().join("log");
    let (reader, writer) = rustix::pipe::pipe().expect("pipe");
    let spec = TailSpec {
        files: vec![(path.clone(), b">".to_vec())],
        console: writer,
        only_lines_with: Vec::new(),
        whole_lines_only: false,
        is_json: false,
    };
    let tail = engine.tail(spec).expect("tail");
    let mut command = zoo(&["flood", "100000", "60"]);
    command.stdout = Stdio::File(path);
    let group = engine.spawn(vec![command]).expect("spawn");
    // Far more than the pipe holds, and nobody reads it: the worker ends all the same.
    all_exits(&group);
    let reading = std::thread::spawn(move || BufReader::new(File::from(reader)).lines().count());
    let report = tail.finish(PATIENCE).expect("finish");
    assert_eq!((report.lines, report.dropped_bytes), (100_000, 0));
    assert_eq!(reading.join().expect("no panic"), 100_000);
}

on_each_backend!(a_console_that_never_reads_is_given_up_and_the_rest_is_counted);
fn a_console_that_never_reads_is_given_up_and_the_rest_is_counted(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let path = folder.path().join("log");
    std::fs::write(&path, "x".repeat(99).as_str().to_owned() + "\n").expect("write");
    let mut file = File::options().append(true).open(&path).expect("open");
    for _ in 0..20_000 {
        file.write_all(&[b'y'; 99]).and_then(|()| file.write_all(b"\n")).expect("write");
    }
    let (reader, writer) = rustix::pipe::pipe().expect("pipe");
    let spec = TailSpec {
        files: vec![(path, Vec::new())],
        console: writer,
        only_lines_with: Vec::new(),
        whole_lines_only: false,
        is_json: false,
    };
    let tail = engine.tail(spec).expect("tail");
    let report = tail.finish(Duration::from_millis(50)).expect("finish");
    assert_eq!(report.bytes + report.dropped_bytes, 20_001 * 100);
    let mut taken = Vec::new();
    File::from(reader).read_to_end(&mut taken).expect("read");
    assert_eq!(taken.len() as u64, report.bytes);
}

on_each_backend!(a_line_without_end_comes_out_when_the_tail_finishes_and_filters_hold);
fn a_line_without_end_comes_out_when_the_tail_finishes_and_filters_hold(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let (path, out) = (folder.path().join("log"), folder.path().join("out"));
    let console = File::create(&out).expect("create");
    let spec = TailSpec {
        files: vec![(path.clone(), b"[a]:".to_vec())],
        console: console.into(),
        only_lines_with: vec![b"keep".to_vec()],
        whole_lines_only: false,
        is_json: false,
    };
    let tail = engine.tail(spec).expect("tail");
    std::fs::write(&path, "keep 1\nthrow away\nkeep 2").expect("write");
    tail.finish(PATIENCE).expect("finish");
    assert_eq!(std::fs::read_to_string(out).expect("read"), "[a]:keep 1\n[a]:keep 2\n");
}

/// What has come to a console, which is read without waiting for its end.
struct Reader(File);

impl Reader {
    /// Waits until these bytes come next.
    fn expect(&mut self, text: &str) {
        let mut bytes = vec![0; text.len()];
        self.0.read_exact(&mut bytes).expect("bytes");
        assert_eq!(String::from_utf8_lossy(&bytes), text);
    }
}

on_each_backend!(an_unfinished_line_is_shown_and_goes_on_in_place);
fn an_unfinished_line_is_shown_and_goes_on_in_place(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let paths = ["a", "b"].map(|name| folder.path().join(name));
    let mut logs = paths.each_ref().map(|path| File::create(path).expect("create"));
    let (reader, writer) = rustix::pipe::pipe().expect("pipe");
    let other_writer = rustix::io::fcntl_dupfd_cloexec(&writer, 3).expect("dup");
    let spec = |path: &PathBuf, prefix: &str, console| TailSpec {
        files: vec![(path.clone(), prefix.as_bytes().to_vec())],
        console,
        only_lines_with: Vec::new(),
        whole_lines_only: false,
        is_json: false,
    };
    // Two tails that share a console, as those of standard output and standard error do.
    let first = engine.tail(spec(&paths[0], "[a]:", writer)).expect("tail");
    let second = engine.tail(spec(&paths[1], "[b]:", other_writer)).expect("tail");
    let mut reader = Reader(File::from(reader));
    let mut say = |log: usize, text: &str| logs[log].write_all(text.as_bytes()).expect("write");
    say(0, "(Pdb) ");
    reader.expect("[a]:(Pdb) ");
    say(0, "n\n> next");
    reader.expect("n\n[a]:> next");
    say(0, "..");
    reader.expect("..");
    // Something else comes between: it begins a line of its own, and so does what is left.
    say(1, "loss 1\n");
    reader.expect("\n[b]:loss 1\n");
    say(0, ".");
    reader.expect("[a]:.");
    say(1, "loss");
    reader.expect("\n[b]:loss");
    say(0, "\nend");
    say(0, "\n");
    reader.expect("\n[a]:end\n");
    first.finish(PATIENCE).expect("finish");
    let report = second.finish(PATIENCE).expect("finish");
    assert_eq!(report.dropped_bytes, 0);
    assert!(engine.close(PATIENCE).expect("own process"));
    let mut rest = String::new();
    reader.0.read_to_string(&mut rest).expect("text");
    assert_eq!(rest, "");
}

on_each_backend!(a_file_that_cannot_be_opened_hides_no_other);
fn a_file_that_cannot_be_opened_hides_no_other(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let (good, late, never) =
        (folder.path().join("good"), folder.path().join("to-be/late"), folder.path().join("missing/never"));
    let out = folder.path().join("out");
    let spec = TailSpec {
        files: [&good, &late, &never].map(|path| (path.clone(), b">".to_vec())).into(),
        console: File::create(&out).expect("create").into(),
        only_lines_with: Vec::new(),
        whole_lines_only: false,
        is_json: false,
    };
    let tail = engine.tail(spec).expect("tail");
    std::fs::write(&good, "good\n").expect("write");
    std::fs::create_dir(folder.path().join("to-be")).expect("folder");
    std::fs::write(&late, "late\n").expect("write");
    let report = tail.finish(PATIENCE).expect("finish");
    let shown = std::fs::read_to_string(out).expect("read");
    assert!(shown == ">good\n>late\n" || shown == ">late\n>good\n", "{shown}");
    assert_eq!(report.unread, [(never, "No such file or directory (os error 2)".to_owned())]);
}

on_each_backend!(a_console_whose_reader_is_gone_says_so);
fn a_console_whose_reader_is_gone_says_so(engine: &Engine) {
    let folder = tempfile::tempdir().expect("tempdir");
    let path = folder.path().join("log");
    std::fs::write(&path, "line\n").expect("write");
    let (reader, writer) = rustix::pipe::pipe().expect("pipe");
    drop(reader);
    let files = vec![(path, Vec::new())];
    let spec =
        TailSpec { files, console: writer, only_lines_with: Vec::new(), whole_lines_only: false, is_json: false };
    let report = engine.tail(spec).expect("tail").finish(PATIENCE).expect("finish");
    assert_eq!((report.console_error.as_deref(), report.dropped_bytes), (Some("Broken pipe (os error 32)"), 5));
}
