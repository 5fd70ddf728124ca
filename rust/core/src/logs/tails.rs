//! The tails of an engine, and the schedule of their work.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use super::log_file::Rotations;
use super::scans::{ScanSpec, Scans};
use super::tail::{ConsoleKey, FileTail, Finish, OpenLine, Pumped, TailReport, TailSpec};
use crate::error::Error;
use crate::sys::notify::Notifier;
use crate::sys::poller::{Interest, Poller};
use crate::thread::Reply;

/// Interval for polling files without a watch (the user's inotify limits are reached, or the file could not be opened) and consoles that
/// the poller refuses.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// After copying, notifications are ignored for this long. Otherwise a worker that writes single lines would wake the engine for each.
const BATCH_DELAY: Duration = Duration::from_millis(2);

/// The tails of an engine.
pub(super) struct Tails {
    notifier: Option<Notifier>,
    notifier_token: u64,
    listening: bool,
    resume_at: Option<Instant>,
    by_id: BTreeMap<u64, FileTail>,
    runnable: BTreeSet<u64>,
    /// Tails whose console is full.
    full: BTreeSet<u64>,
    /// Tails in `full` whose console could not be added to the poller. They are polled.
    polled_consoles: BTreeSet<u64>,
    /// Replies that are due at the end of a tail.
    waiting: HashMap<u64, Vec<Reply<TailReport>>>,
    /// Reports of tails that have ended, until their handles are dropped.
    finished: HashMap<u64, TailReport>,
    watches: HashMap<i32, Vec<(u64, usize)>>,
    /// When polled files and consoles are checked next.
    poll_at: Option<Instant>,
    /// For each console, the stream whose unfinished line is its last output. Several tails may share a console.
    open_lines: HashMap<ConsoleKey, OpenLine>,
    pub(super) scans: Scans,
    /// The files with a size limit, for readers that are added later.
    pub(super) rotations: Rotations,
    scratch: Vec<u8>,
}

impl Tails {
    pub(super) fn new(notifier_token: u64) -> Self {
        Self {
            notifier: Notifier::new().ok(),
            notifier_token,
            listening: false,
            resume_at: None,
            by_id: BTreeMap::new(),
            runnable: BTreeSet::new(),
            full: BTreeSet::new(),
            polled_consoles: BTreeSet::new(),
            waiting: HashMap::new(),
            finished: HashMap::new(),
            watches: HashMap::new(),
            poll_at: None,
            open_lines: HashMap::new(),
            scans: Scans::default(),
            rotations: Rotations::new(),
            scratch: Vec::new(),
        }
    }

    /// Adds a tail for the files of `spec`.
    pub(super) fn add(&mut self, id: u64, spec: &TailSpec, poller: &Poller) -> Result<(), Error> {
        let mut tail = FileTail::open(spec, &self.rotations)?;
        for (index, (path, _)) in spec.files.iter().enumerate() {
            if !self.watch(path, (id, index)) {
                tail.set_polled(index);
            }
        }
        if tail.mark_polled_unread() {
            self.poll_at.get_or_insert_with(Instant::now);
        }
        self.open_lines.entry(tail.console_key()).or_default();
        self.by_id.insert(id, tail);
        self.runnable.insert(id);
        self.listen(poller, true);
        Ok(())
    }

    /// Adds a scan of the files of `spec`.
    pub(super) fn add_scan(&mut self, id: u64, spec: &ScanSpec, poller: &Poller) {
        let files = spec.files.iter().enumerate();
        let is_watched: Vec<bool> = files.map(|(index, file)| self.watch(&file.path, (id, index))).collect();
        self.scans.add(id, spec, &is_watched, &self.rotations);
        if self.scans.mark_polled_unread() {
            self.poll_at.get_or_insert_with(Instant::now);
        }
        self.listen(poller, true);
    }

    /// Searches the rest of the files of a scan, and then sends to `reply`.
    pub(super) fn finish_scan(&mut self, id: u64, reply: Reply<()>) {
        self.scans.finish(id, reply);
    }

    /// Ends a scan.
    pub(super) fn drop_scan(&mut self, id: u64, poller: &Poller) {
        if self.scans.remove(id) {
            self.unwatch(id);
            self.rest(poller);
        }
    }

    /// Watches a file for a reader; `false` if it must be polled.
    fn watch(&mut self, path: &Path, reader: (u64, usize)) -> bool {
        let watch = self.notifier.as_ref().and_then(|notifier| notifier.watch(path).ok());
        if let Some(watch) = watch {
            self.watches.entry(watch).or_default().push(reader);
        }
        watch.is_some()
    }

    /// Handles a readable notifier.
    pub(super) fn notified(&mut self) {
        let Some(notifier) = &self.notifier else { return };
        let (watches, tails, scans) = (&self.watches, &mut self.by_id, &mut self.scans);
        let (runnable, full) = (&mut self.runnable, &self.full);
        let complete = notifier.drain(|watch| {
            for (id, stream) in watches.get(&watch).into_iter().flatten() {
                if let Some(tail) = tails.get_mut(id) {
                    tail.mark_unread(*stream);
                    if !full.contains(id) {
                        runnable.insert(*id);
                    }
                } else {
                    scans.mark_unread(*id, *stream);
                }
            }
        });
        if !complete {
            self.mark_all_unread();
        }
    }

    /// Handles a console that has room again.
    pub(super) fn console_ready(&mut self, id: u64, poller: &Poller) {
        if self.full.remove(&id) {
            if let Some(tail) = self.by_id.get(&id) {
                let _ = poller.remove(tail.console_fd());
            }
            self.runnable.insert(id);
        }
    }

    /// Copies the rest of the files and then ends the tail. Gives up when the console has been blocked for `timeout`.
    ///
    /// Sends the report to `reply`. A further call gets the same report and does not change the timeout.
    pub(super) fn finish(&mut self, id: u64, timeout: Duration, now: Instant, reply: Reply<TailReport>) {
        if let Some(report) = self.finished.get(&id) {
            let _ = reply.send(report.clone());
        } else if let Some(tail) = self.by_id.get_mut(&id) {
            if tail.finishing.is_none() {
                tail.mark_all_unread();
                tail.finishing = Some(Finish { timeout, deadline: now.checked_add(timeout) });
                if !self.full.contains(&id) {
                    self.runnable.insert(id);
                }
            }
            self.waiting.entry(id).or_default().push(reply);
        }
    }

    /// Ends a tail whose handle was dropped.
    pub(super) fn drop_tail(&mut self, id: u64, poller: &Poller) {
        self.end(id, poller);
        self.waiting.remove(&id);
        self.finished.remove(&id);
    }

    /// Copies one chunk of each stream that has grown. Adds a full console to the poller, with the id of its tail as token. Ends the
    /// finishing tails that have reached the end of their files or their deadline.
    pub(super) fn pump(&mut self, now: Instant, poller: &Poller) {
        if self.resume_at.is_some_and(|at| at <= now) {
            self.resume_at = None;
            self.listen(poller, true);
        }
        self.handle_deadlines(now);
        let has_scanned = self.scans.is_busy();
        self.scans.pump(&mut self.scratch);
        let mut ended = Vec::new();
        let turn: Vec<u64> = self.runnable.iter().copied().collect();
        for id in &turn {
            let Some(tail) = self.by_id.get_mut(id) else { continue };
            let open = self.open_lines.entry(tail.console_key()).or_default();
            match tail.pump(*id, now, open, &mut self.scratch) {
                Pumped::More => {}
                Pumped::Idle if tail.finishing.is_some() && !tail.is_refused() => ended.push(*id),
                Pumped::Idle => {
                    self.runnable.remove(id);
                }
                Pumped::ConsoleFull => {
                    self.runnable.remove(id);
                    if self.full.insert(*id) && poller.add(tail.console_fd(), *id, Interest::Writable).is_err() {
                        // The poller cannot report when the console has room. Retry after a pause.
                        self.polled_consoles.insert(*id);
                        self.poll_at = self.poll_at.or(now.checked_add(POLL_INTERVAL));
                    }
                }
            }
        }
        let is_timed_out = |tail: &FileTail| {
            let finish = tail.finishing.as_ref();
            finish.and_then(|finish| finish.deadline).is_some_and(|deadline| deadline <= now)
        };
        for (id, tail) in &self.by_id {
            if tail.is_refused() {
                self.poll_at = self.poll_at.or(now.checked_add(POLL_INTERVAL));
            }
            if (tail.is_refused() || self.full.contains(id)) && is_timed_out(tail) {
                ended.push(*id);
            }
        }
        if self.scans.is_refused() {
            self.poll_at = self.poll_at.or(now.checked_add(POLL_INTERVAL));
        }
        if (!turn.is_empty() || has_scanned) && !self.is_empty() {
            self.listen(poller, false);
            self.resume_at = now.checked_add(BATCH_DELAY);
        }
        for id in ended {
            let Some(report) = self.end(id, poller) else { continue };
            for reply in self.waiting.remove(&id).unwrap_or_default() {
                let _ = reply.send(report.clone());
            }
            self.finished.insert(id, report);
        }
    }

    /// Whether [`Tails::pump`] has something to do now.
    pub(super) fn is_busy(&self) -> bool {
        !self.runnable.is_empty() || self.scans.is_busy()
    }

    /// The next deadline of [`Tails::pump`].
    pub(super) fn next_tick(&self) -> Option<Instant> {
        let finish_deadline = |id| self.by_id.get(id)?.finishing.as_ref()?.deadline;
        // Unfinished lines cannot be shown on a full console.
        let not_full = self.by_id.iter().filter(|(id, _)| !self.full.contains(id));
        let partial = not_full.filter_map(|(_, tail)| tail.next_partial());
        self.full.iter().filter_map(finish_deadline).chain(partial).chain(self.resume_at).chain(self.poll_at).min()
    }

    /// Makes the tails runnable whose polled files, polled consoles or unfinished lines are due.
    fn handle_deadlines(&mut self, now: Instant) {
        let is_poll = self.poll_at.take_if(|at| *at <= now).is_some();
        if is_poll {
            for id in std::mem::take(&mut self.polled_consoles) {
                self.full.remove(&id);
                self.runnable.insert(id);
            }
        }
        if is_poll && self.scans.mark_polled_unread() {
            self.poll_at = now.checked_add(POLL_INTERVAL);
        }
        for (id, tail) in &mut self.by_id {
            let has_polled = is_poll && tail.mark_polled_unread();
            if has_polled {
                self.poll_at = now.checked_add(POLL_INTERVAL);
            }
            let has_partial = tail.next_partial().is_some_and(|due| due <= now);
            if (has_polled || has_partial) && !self.full.contains(id) {
                self.runnable.insert(*id);
            }
        }
    }

    fn mark_all_unread(&mut self) {
        self.scans.mark_all_unread();
        for (id, tail) in &mut self.by_id {
            tail.mark_all_unread();
            if !self.full.contains(id) {
                self.runnable.insert(*id);
            }
        }
    }

    fn end(&mut self, id: u64, poller: &Poller) -> Option<TailReport> {
        let tail = self.by_id.remove(&id)?;
        self.runnable.remove(&id);
        let is_in_poller = !self.polled_consoles.remove(&id);
        if self.full.remove(&id) && is_in_poller {
            let _ = poller.remove(tail.console_fd());
        }
        self.unwatch(id);
        let key = tail.console_key();
        if !self.by_id.values().any(|other| other.console_key() == key) {
            self.open_lines.remove(&key);
        }
        self.rest(poller);
        Some(tail.report())
    }

    fn is_empty(&self) -> bool {
        self.by_id.is_empty() && self.scans.is_empty()
    }

    /// Ignores notifications if there is no file to follow.
    fn rest(&mut self, poller: &Poller) {
        if self.is_empty() {
            (self.resume_at, self.poll_at) = (None, None);
            self.listen(poller, false);
        }
    }

    fn unwatch(&mut self, id: u64) {
        let notifier = &self.notifier;
        self.watches.retain(|watch, readers| {
            readers.retain(|(reader, _)| *reader != id);
            if readers.is_empty()
                && let Some(notifier) = notifier
            {
                notifier.unwatch(*watch);
            }
            !readers.is_empty()
        });
    }

    /// Adds the notifier to the poller, or removes it.
    fn listen(&mut self, poller: &Poller, listen: bool) {
        if let Some(notifier) = &self.notifier
            && self.listening != listen
        {
            let fd: BorrowedFd<'_> = notifier.as_fd();
            let changed =
                if listen { poller.add(fd, self.notifier_token, Interest::Readable) } else { poller.remove(fd) };
            if changed.is_ok() {
                self.listening = listen;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::path::PathBuf;
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, sync_channel};

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;
    use crate::logs::log_file::RotatedFile;

    const TOKEN: u64 = 7;
    const TIMEOUT: Duration = Duration::from_secs(600);

    /// A tail of a file with one line, whose console is a full pipe. Returns the pipe's reading end and the file, too.
    fn full_console() -> (Tails, Poller, OwnedFd, OwnedFd) {
        let file = memfd_create("log", MemfdFlags::CLOEXEC).expect("a file");
        rustix::io::write(&file, b"a line\n").expect("written");
        let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
        // The same size as a console requests.
        rustix::pipe::fcntl_setpipe_size(&writer, 1 << 20).expect("resized");
        rustix::io::ioctl_fionbio(&writer, true).expect("non-blocking");
        while rustix::io::write(&writer, &[b'x'; 4096]).is_ok() {}
        rustix::io::ioctl_fionbio(&writer, false).expect("blocking");
        let (mut tails, poller) = (Tails::new(1), Poller::new().expect("a poller"));
        let files = vec![(path, b"[0]:".to_vec())];
        let spec =
            TailSpec { files, console: writer, only_lines_with: Vec::new(), whole_lines_only: false, is_json: false };
        tails.add(TOKEN, &spec, &poller).expect("a tail");
        (tails, poller, reader, file)
    }

    fn finish(tails: &mut Tails) -> Receiver<TailReport> {
        let (reply, report) = sync_channel(1);
        tails.finish(TOKEN, TIMEOUT, Instant::now(), reply);
        report
    }

    #[test]
    fn a_full_console_that_the_poller_refuses_is_polled() {
        let (mut tails, poller, reader, _file) = full_console();
        // The poller refuses to add the same descriptor twice.
        poller.add(tails.by_id[&TOKEN].console_fd(), 99, Interest::Writable).expect("added");
        let report = finish(&mut tails);
        let now = Instant::now();
        tails.pump(now, &poller);
        assert!(!tails.is_busy(), "the console is full");
        assert_eq!(report.try_recv().ok(), None);
        let mut room = vec![0; 1 << 20];
        rustix::io::read(&reader, &mut room).expect("read");
        while let Some(next) = tails.next_tick() {
            assert!(next <= now + 2 * POLL_INTERVAL, "the console is not polled before the timeout of the finish");
            tails.pump(next, &poller);
        }
        assert_eq!(report.try_recv().expect("finished").lines, 1);
    }

    #[test]
    fn a_full_console_is_in_the_poller_once() {
        let (mut tails, poller, _reader, _file) = full_console();
        tails.pump(Instant::now(), &poller);
        let _report = finish(&mut tails);
        assert!(!tails.is_busy(), "the tail waits for the console");
        tails.pump(Instant::now(), &poller);
        assert!(tails.polled_consoles.is_empty());
    }

    /// A tail of a file with one line. Returns the file, its limit and the console, too.
    fn rotated_file() -> (Tails, Poller, OwnedFd, Arc<RotatedFile>, OwnedFd) {
        let file = memfd_create("log", MemfdFlags::CLOEXEC).expect("a file");
        rustix::io::write(&file, b"a longer first line\n").expect("written");
        let path: PathBuf = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        let console = memfd_create("console", MemfdFlags::CLOEXEC).expect("a file");
        let (mut tails, poller) = (Tails::new(1), Poller::new().expect("a poller"));
        let rotated = Arc::<RotatedFile>::default();
        tails.rotations.insert(path.clone(), Arc::clone(&rotated));
        let spec = TailSpec {
            files: vec![(path, b"[0]:".to_vec())],
            console: console.try_clone().expect("duplicated"),
            only_lines_with: Vec::new(),
            whole_lines_only: false,
            is_json: false,
        };
        tails.add(TOKEN, &spec, &poller).expect("a tail");
        (tails, poller, file, rotated, console)
    }

    #[test]
    fn a_finish_waits_for_a_rotation_only_until_its_timeout() {
        let (mut tails, poller, _file, rotated, _console) = rotated_file();
        let removal = rotated.lock();
        let report = finish(&mut tails);
        tails.pump(Instant::now(), &poller);
        assert!(!tails.is_busy(), "the tail does not spin");
        let next = tails.next_tick().expect("the file is polled");
        assert!(next <= Instant::now() + POLL_INTERVAL);
        tails.pump(next, &poller);
        assert_eq!(report.try_recv().ok(), None);
        tails.pump(Instant::now() + TIMEOUT, &poller);
        let report = report.try_recv().expect("finished");
        assert_eq!((report.lines, report.unread.len()), (0, 1));
        drop(removal);
    }

    #[test]
    fn a_finish_copies_the_rest_after_a_rotation() {
        let (mut tails, poller, _file, rotated, _console) = rotated_file();
        let removal = rotated.lock();
        let report = finish(&mut tails);
        tails.pump(Instant::now(), &poller);
        drop(removal);
        while let Some(next) = tails.next_tick() {
            tails.pump(next, &poller);
        }
        let report = report.try_recv().expect("finished");
        assert_eq!((report.lines, report.unread.len()), (1, 0));
    }

    #[test]
    fn the_lines_after_a_truncation_are_copied_in_the_same_turn() {
        let (mut tails, poller, file, _rotated, console) = rotated_file();
        while tails.is_busy() {
            tails.pump(Instant::now(), &poller);
        }
        rustix::fs::ftruncate(&file, 0).expect("truncated");
        rustix::io::pwrite(&file, b"second\n", 0).expect("written");
        tails.by_id.get_mut(&TOKEN).expect("a tail").mark_unread(0);
        tails.runnable.insert(TOKEN);
        while tails.is_busy() {
            tails.pump(Instant::now(), &poller);
        }
        let mut shown = [0; 100];
        let length = rustix::io::pread(&console, &mut shown, 0).expect("read");
        assert_eq!(&shown[..length], b"[0]:a longer first line\n[0]:second\n");
    }

    #[test]
    fn every_finish_call_gets_the_same_report() {
        let (mut tails, poller, reader, _file) = full_console();
        rustix::io::read(&reader, &mut vec![0; 1 << 20]).expect("read");
        let reports = [finish(&mut tails), finish(&mut tails)];
        for _ in 0..2 {
            tails.pump(Instant::now(), &poller);
        }
        let late = finish(&mut tails);
        for report in reports.into_iter().chain([late]) {
            assert_eq!(report.try_recv().expect("a report").lines, 1);
        }
        tails.drop_tail(TOKEN, &poller);
        assert!(tails.finished.is_empty());
    }
}
