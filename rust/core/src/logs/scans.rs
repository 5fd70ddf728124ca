//! Searches growing log files for lines that match rules.
//!
//! A scan reads its files independently of the tails, so a blocked console delays no match.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use memchr::{memchr2, memrchr2};

use super::lines::MAX_LINE;
use super::log_file::{LogFile, RotatedFile, Rotations, Unread};
use super::patterns::{LogRule, LogRules};
use super::tail::CHUNK;
use crate::thread::Reply;

/// The files of a group of workers and the rules for their lines.
#[derive(Debug)]
pub(crate) struct ScanSpec {
    /// The id of the group.
    pub(crate) group: u64,
    /// The files. Missing ones are created.
    pub(crate) files: Vec<ScanFile>,
    /// The rules.
    pub(crate) rules: Arc<LogRules>,
}

/// A file that is searched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScanFile {
    /// Its path.
    pub path: PathBuf,
    /// Index of the worker in its group.
    pub worker: usize,
    /// Description of the stream, for people: `stderr of rank 3`.
    pub label: String,
}

/// Lines of one file that match a rule.
#[derive(Debug)]
pub(crate) struct LogMatch {
    /// The id of the group.
    pub(crate) group: u64,
    /// Its file.
    pub(crate) file: ScanFile,
    /// The rule.
    pub(crate) rule: LogRule,
    /// Number of lines.
    pub(crate) lines: u64,
    /// The beginning of the first one.
    pub(crate) first: Vec<u8>,
}

/// Lines of one chunk that match one rule.
struct MatchedLines {
    rule: usize,
    lines: u64,
    first: Vec<u8>,
}

/// Bytes of a matching line that are kept.
const KEPT_LINE: usize = 512;

#[derive(Debug)]
struct ScanStream {
    file: Option<LogFile>,
    rotation: Option<Arc<RotatedFile>>,
    spec: ScanFile,
    offset: u64,
    unread: Unread,
    is_polled: bool,
}

#[derive(Debug)]
struct Scan {
    group: u64,
    streams: Vec<ScanStream>,
    rules: Arc<LogRules>,
    /// Waiters for the end of the files.
    finishing: Vec<Reply<()>>,
}

/// The scans of an engine.
#[derive(Debug, Default)]
pub(super) struct Scans {
    by_id: BTreeMap<u64, Scan>,
    matches: Vec<LogMatch>,
    /// Waiters for scans that have reached the end of their files.
    finished: Vec<Reply<()>>,
}

impl Scans {
    pub(super) fn add(&mut self, id: u64, spec: &ScanSpec, is_watched: &[bool], rotations: &Rotations) {
        let streams = spec.files.iter().zip(is_watched);
        let streams = streams
            .map(|(spec, is_watched)| {
                let rotation = rotations.get(&spec.path).cloned();
                let file = LogFile::open(&spec.path, rotation.as_ref()).ok();
                let offset = file.as_ref().map_or(0, LogFile::base);
                ScanStream { file, rotation, spec: spec.clone(), offset, unread: Unread::Yes, is_polled: !is_watched }
            })
            .collect();
        self.by_id
            .insert(id, Scan { group: spec.group, streams, rules: Arc::clone(&spec.rules), finishing: Vec::new() });
    }

    pub(super) fn remove(&mut self, id: u64) -> bool {
        self.by_id.remove(&id).is_some()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    pub(super) fn mark_unread(&mut self, id: u64, stream: usize) {
        if let Some(scan) = self.by_id.get_mut(&id) {
            scan.streams[stream].unread = Unread::Yes;
        }
    }

    pub(super) fn mark_all_unread(&mut self) {
        self.streams().for_each(|stream| stream.unread = Unread::Yes);
    }

    /// Marks the files without a watch, and those that could not be opened or read. `false` if there are none.
    pub(super) fn mark_polled_unread(&mut self) -> bool {
        let mut has_polled = false;
        let is_polled =
            |stream: &&mut ScanStream| stream.is_polled || stream.unread == Unread::Refused || stream.file.is_none();
        for stream in self.streams().filter(is_polled) {
            stream.unread = Unread::Yes;
            has_polled = true;
        }
        has_polled
    }

    /// Whether bytes are removed from a file, so its rest cannot be read now.
    pub(super) fn is_refused(&self) -> bool {
        self.by_id.values().any(Scan::is_refused)
    }

    fn streams(&mut self) -> impl Iterator<Item = &mut ScanStream> {
        self.by_id.values_mut().flat_map(|scan| scan.streams.iter_mut())
    }

    /// Sends to `reply` when the scan has searched all that its files contain now, unfinished lines included.
    pub(super) fn finish(&mut self, id: u64, reply: Reply<()>) {
        match self.by_id.get_mut(&id) {
            Some(scan) => {
                scan.streams.iter_mut().for_each(|stream| stream.unread = Unread::Yes);
                scan.finishing.push(reply);
            }
            None => {
                let _ = reply.send(());
            }
        }
    }

    pub(super) fn is_busy(&self) -> bool {
        self.by_id.values().any(Scan::is_busy)
    }

    /// Searches one chunk of each file that has grown.
    pub(super) fn pump(&mut self, scratch: &mut Vec<u8>) {
        for scan in self.by_id.values_mut() {
            if !scan.is_busy() && scan.finishing.is_empty() {
                continue;
            }
            let (is_final, rules) = (!scan.finishing.is_empty(), &scan.rules);
            for stream in scan.streams.iter_mut().filter(|stream| stream.unread == Unread::Yes) {
                for MatchedLines { rule, lines, first } in stream.search_chunk(rules, is_final, scratch) {
                    let (file, rule) = (stream.spec.clone(), rules.rules()[rule].clone());
                    self.matches.push(LogMatch { group: scan.group, file, rule, lines, first });
                }
            }
            if !scan.is_busy() && !scan.is_refused() {
                self.finished.append(&mut scan.finishing);
            }
        }
    }

    /// The matches since the last call, and the waiters for scans that have reached the end of their files. The caller wakes the waiters
    /// when it has handled the matches.
    pub(super) fn take_found(&mut self) -> (Vec<LogMatch>, Vec<Reply<()>>) {
        (std::mem::take(&mut self.matches), std::mem::take(&mut self.finished))
    }
}

impl Scan {
    fn is_refused(&self) -> bool {
        self.streams.iter().any(|stream| stream.unread == Unread::Refused)
    }

    fn is_busy(&self) -> bool {
        self.streams.iter().any(|stream| stream.unread == Unread::Yes)
    }
}

impl ScanStream {
    fn search_chunk(&mut self, rules: &LogRules, is_final: bool, scratch: &mut Vec<u8>) -> Vec<MatchedLines> {
        if self.file.is_none() {
            self.file = LogFile::open(&self.spec.path, self.rotation.as_ref()).ok();
            self.offset = self.file.as_ref().map_or(0, LogFile::base);
        }
        let Some(file) = &self.file else {
            self.unread = Unread::No;
            return Vec::new();
        };
        let mut size = CHUNK;
        loop {
            scratch.resize(size, 0);
            let Some(read) = file.read(scratch, self.offset) else {
                self.unread = Unread::Refused;
                return Vec::new();
            };
            let at_end = read < size;
            if read == 0 && file.end().is_some_and(|end| end < self.offset) {
                self.offset = file.base(); // the file was truncated, and may have lines already
                continue;
            }
            let text = &scratch[..read];
            let whole = match memrchr2(b'\n', b'\r', text) {
                Some(end) => end + 1,
                None if read >= MAX_LINE => MAX_LINE,
                None => 0,
            };
            let whole = if is_final && at_end { read } else { whole };
            if whole == 0 && !at_end {
                size *= 2;
                continue;
            }
            self.offset += whole as u64;
            file.publish(self.offset);
            self.unread = if at_end { Unread::No } else { Unread::Yes };
            return search(rules, &text[..whole]);
        }
    }
}

/// Searches the lines of `text`.
fn search(rules: &LogRules, text: &[u8]) -> Vec<MatchedLines> {
    let mut found: Vec<MatchedLines> = Vec::new();
    if text.is_empty() || !rules.may_match(text) {
        return found;
    }
    let mut rest = text;
    while !rest.is_empty() {
        let end = memchr2(b'\n', b'\r', rest).unwrap_or(rest.len());
        let line = &rest[..end];
        if rules.may_match(line) {
            for rule in rules.matches(line) {
                match found.iter_mut().find(|found| found.rule == rule) {
                    Some(found) => found.lines += 1,
                    None => found.push(MatchedLines { rule, lines: 1, first: line[..end.min(KEPT_LINE)].to_vec() }),
                }
            }
        }
        let is_crlf = rest[end..].starts_with(b"\r\n");
        rest = rest.get(end + 1 + usize::from(is_crlf)..).unwrap_or_default();
    }
    found
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::sync::mpsc::sync_channel;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;
    use crate::logs::patterns::LogRule;
    use crate::vocabulary::LogEffect;

    fn rules(patterns: &[&str]) -> Arc<LogRules> {
        let rule = |pattern: &&str| LogRule {
            effect: LogEffect::Warn,
            pattern: (*pattern).to_owned(),
            reason: "why".to_owned(),
        };
        Arc::new(LogRules::compile(patterns.iter().map(rule).collect()).expect("valid patterns"))
    }

    #[test]
    fn lines_are_counted_for_each_rule_and_the_first_is_kept() {
        let long = [b"nan ".as_slice(), &[b'x'; 2 * KEPT_LINE]].concat();
        let text = [b"ok\r\nnan 1\rnan 2\n\nlast of all\n", long.as_slice()].concat();
        let found = search(&rules(&["nan", "all$", "absent", "^$"]), &text);
        let summary: Vec<_> = found.iter().map(|found| (found.rule, found.lines, found.first.as_slice())).collect();
        assert_eq!(summary, [(0, 3, b"nan 1".as_slice()), (3, 1, b""), (1, 1, b"last of all")]);
        assert_eq!(search(&rules(&["nan x"]), &long)[0].first.len(), KEPT_LINE);
    }

    #[test]
    fn a_growing_file_is_searched_once_and_its_last_line_at_the_end() {
        let file = memfd_create("log", MemfdFlags::CLOEXEC).expect("a file");
        let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        let mut file = std::fs::File::from(file);
        let spec = ScanSpec {
            group: 1,
            files: vec![ScanFile { path, worker: 2, label: "stderr of rank 5".to_owned() }],
            rules: rules(&["nan"]),
        };
        let (mut scans, mut scratch) = (Scans::default(), Vec::new());
        scans.add(7, &spec, &[true], &Rotations::new());
        let mut lines = |scans: &mut Scans, text: &[u8]| {
            file.write_all(text).expect("written");
            scans.mark_unread(7, 0);
            while scans.is_busy() {
                scans.pump(&mut scratch);
            }
            let (found, waiters) = scans.take_found();
            (found.iter().map(|found| found.lines).sum::<u64>(), waiters.len())
        };
        assert_eq!(lines(&mut scans, b"ok\nnan"), (0, 0));
        assert_eq!(lines(&mut scans, b" 1\n"), (1, 0));
        let many = [b"nan\n".repeat(CHUNK).as_slice(), b"the last nan"].concat();
        assert_eq!(lines(&mut scans, &many), (CHUNK as u64, 0));
        let endless = vec![b'x'; 3 * MAX_LINE];
        assert_eq!(lines(&mut scans, &endless), (1, 0), "a line without end is searched in parts");
        let (reply, _end) = sync_channel(1);
        scans.finish(7, reply);
        assert_eq!(lines(&mut scans, b" nan"), (1, 1), "the waiter comes with the last matches");
    }

    #[test]
    fn the_lines_after_a_truncation_are_searched_in_the_same_turn_and_a_refused_file_is_polled() {
        let file = memfd_create("log", MemfdFlags::CLOEXEC).expect("a file");
        rustix::io::write(&file, b"a longer first line\n").expect("written");
        let path: PathBuf = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        let rotated = Arc::<RotatedFile>::default();
        let rotations = Rotations::from([(path.clone(), Arc::clone(&rotated))]);
        let spec = ScanSpec {
            group: 1,
            files: vec![ScanFile { path, worker: 0, label: "stdout of rank 0".to_owned() }],
            rules: rules(&["nan"]),
        };
        let (mut scans, mut scratch) = (Scans::default(), Vec::new());
        scans.add(7, &spec, &[true], &rotations);
        scans.pump(&mut scratch);
        rustix::fs::ftruncate(&file, 0).expect("truncated");
        rustix::io::pwrite(&file, b"nan\n", 0).expect("written");
        let (reply, _end) = sync_channel(1);
        scans.finish(7, reply);
        let removal = rotated.lock();
        scans.pump(&mut scratch);
        assert!(!scans.is_busy() && scans.is_refused());
        assert_eq!(scans.take_found().1.len(), 0, "the rest is not searched");
        drop(removal);
        assert!(scans.mark_polled_unread());
        scans.pump(&mut scratch);
        let (found, waiters) = scans.take_found();
        assert_eq!((found.len(), waiters.len()), (1, 1));
    }

    #[test]
    fn a_file_that_is_opened_late_is_not_removed_before_it_is_searched() {
        let folder = std::env::temp_dir().join(format!("ferro-late-{}", std::process::id()));
        let path = folder.join("log");
        let rotated = Arc::<RotatedFile>::default();
        let rotations = Rotations::from([(path.clone(), Arc::clone(&rotated))]);
        let file = ScanFile { path: path.clone(), worker: 0, label: "stdout of rank 0".to_owned() };
        let spec = ScanSpec { group: 1, files: vec![file], rules: rules(&["nan"]) };
        let (mut scans, mut scratch) = (Scans::default(), Vec::new());
        scans.add(7, &spec, &[false], &rotations);
        assert_eq!(rotated.slowest_reader(), None, "the folder is missing");
        std::fs::create_dir(&folder).expect("created");
        std::fs::write(&path, "nan\n").expect("written");
        assert!(scans.mark_polled_unread());
        scans.pump(&mut scratch);
        std::fs::remove_dir_all(&folder).expect("removed");
        assert_eq!((scans.take_found().0.len(), rotated.slowest_reader()), (1, Some(4)));
    }
}
