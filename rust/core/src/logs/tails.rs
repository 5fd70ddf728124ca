//! All tails of an engine, and when each has something to do.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::tail::{ConsoleKey, FileTail, Finish, OpenLine, Pumped, TailReport, TailSpec};
use crate::error::Error;
use crate::sys::notify::Notifier;
use crate::sys::poller::{Interest, Poller};
use crate::thread::Reply;

/// How often files are looked at of which nothing tells when they grow: there is no inotify instance or watch to be had, or the file
/// could not be opened.
const POLL_PAUSE: Duration = Duration::from_millis(20);

/// After copying, reports are left to gather for this long: a worker that writes line by line must not wake the engine for each.
const GATHER: Duration = Duration::from_millis(2);

/// The tails of an engine.
pub(crate) struct Tails {
    notifier: Option<Notifier>,
    notifier_token: u64,
    listening: bool,
    resume_at: Option<Instant>,
    by_id: BTreeMap<u64, FileTail>,
    runnable: BTreeSet<u64>,
    /// Tails whose console takes nothing now.
    full: BTreeSet<u64>,
    /// Those of them whose console could not be added to the poller.
    unreported: BTreeSet<u64>,
    /// Callers that wait for the end of a tail.
    waiting: HashMap<u64, Vec<Reply<TailReport>>>,
    /// Reports of tails that have ended, until their handles are dropped.
    finished: HashMap<u64, TailReport>,
    watches: HashMap<i32, Vec<(u64, usize)>>,
    /// When files are looked at that are not watched.
    poll_at: Option<Instant>,
    /// The last line of each console, where that has no end. Several tails may share a console.
    open_lines: HashMap<ConsoleKey, OpenLine>,
    scratch: Vec<u8>,
}

impl Tails {
    pub(crate) fn new(notifier_token: u64) -> Self {
        Self {
            notifier: Notifier::new().ok(),
            notifier_token,
            listening: false,
            resume_at: None,
            by_id: BTreeMap::new(),
            runnable: BTreeSet::new(),
            full: BTreeSet::new(),
            unreported: BTreeSet::new(),
            waiting: HashMap::new(),
            finished: HashMap::new(),
            watches: HashMap::new(),
            poll_at: None,
            open_lines: HashMap::new(),
            scratch: Vec::new(),
        }
    }

    /// Starts to follow the files of `spec`.
    pub(crate) fn add(&mut self, id: u64, spec: &TailSpec, poller: &Poller) -> Result<(), Error> {
        let mut tail = FileTail::open(spec)?;
        for (index, (path, _)) in spec.files.iter().enumerate() {
            match self.notifier.as_ref().map(|notifier| notifier.watch(path)) {
                Some(Ok(watch)) => self.watches.entry(watch).or_default().push((id, index)),
                Some(Err(_)) | None => tail.poll(index),
            }
        }
        if tail.mark_polled() {
            self.poll_at.get_or_insert_with(Instant::now);
        }
        self.open_lines.entry(tail.console_key()).or_default();
        self.by_id.insert(id, tail);
        self.runnable.insert(id);
        self.listen(poller, true);
        Ok(())
    }

    /// The notifier is readable.
    pub(crate) fn notified(&mut self) {
        let Some(notifier) = &self.notifier else { return };
        let (watches, tails, runnable) = (&self.watches, &mut self.by_id, &mut self.runnable);
        let complete = notifier.drain(|watch| {
            for (id, stream) in watches.get(&watch).into_iter().flatten() {
                if let Some(tail) = tails.get_mut(id) {
                    tail.mark(*stream);
                    runnable.insert(*id);
                }
            }
        });
        if !complete {
            self.look_everywhere();
        }
    }

    /// The console of a tail has room.
    pub(crate) fn console_ready(&mut self, id: u64, poller: &Poller) {
        if self.full.remove(&id) {
            if let Some(tail) = self.by_id.get(&id) {
                let _ = poller.remove(tail.console_fd());
            }
            self.runnable.insert(id);
        }
    }

    /// Follows the files to their end and then ends the tail; it gives up when the console has taken nothing for `patience`.
    ///
    /// The report goes to `reply`. A further call gets the same report and does not extend the patience of the first.
    pub(crate) fn finish(&mut self, id: u64, patience: Duration, now: Instant, reply: Reply<TailReport>) {
        if let Some(report) = self.finished.get(&id) {
            let _ = reply.send(report.clone());
        } else if let Some(tail) = self.by_id.get_mut(&id) {
            if tail.finishing.is_none() {
                tail.mark_all();
                tail.finishing = Some(Finish { patience, give_up: now.checked_add(patience) });
                self.runnable.insert(id);
            }
            self.waiting.entry(id).or_default().push(reply);
        }
    }

    /// Ends a tail whose handle was dropped.
    pub(crate) fn drop_tail(&mut self, id: u64, poller: &Poller) {
        self.end(id, poller);
        self.waiting.remove(&id);
        self.finished.remove(&id);
    }

    /// Copies one chunk of each stream that has grown, and ends the finishing tails that have reached the end of their files.
    pub(crate) fn pump(&mut self, now: Instant, poller: &Poller, console_token: impl Fn(u64) -> u64) {
        if self.resume_at.is_some_and(|at| at <= now) {
            self.resume_at = None;
            self.listen(poller, true);
        }
        self.look_at_clock(now);
        let mut ended = Vec::new();
        let turn: Vec<u64> = self.runnable.iter().copied().collect();
        for id in &turn {
            let Some(tail) = self.by_id.get_mut(id) else { continue };
            let open = self.open_lines.entry(tail.console_key()).or_default();
            match tail.pump(*id, now, open, &mut self.scratch) {
                Pumped::More => {}
                Pumped::Idle if tail.finishing.is_some() => ended.push(*id),
                Pumped::Idle => {
                    self.runnable.remove(id);
                }
                Pumped::ConsoleFull => {
                    self.runnable.remove(id);
                    self.full.insert(*id);
                    if poller.add(tail.console_fd(), console_token(*id), Interest::Writable).is_err() {
                        // The poller cannot report when the console has room: try to write again after a pause.
                        self.unreported.insert(*id);
                        self.poll_at = self.poll_at.or(now.checked_add(POLL_PAUSE));
                    }
                }
            }
        }
        let given_up = |tail: &FileTail| {
            let finish = tail.finishing.as_ref();
            finish.and_then(|finish| finish.give_up).is_some_and(|at| at <= now)
        };
        ended.extend(self.full.iter().filter(|id| self.by_id.get(id).is_some_and(given_up)));
        if !turn.is_empty() && !self.by_id.is_empty() {
            self.listen(poller, false);
            self.resume_at = now.checked_add(GATHER);
        }
        for id in ended {
            let Some(report) = self.end(id, poller) else { continue };
            for reply in self.waiting.remove(&id).unwrap_or_default() {
                let _ = reply.send(report.clone());
            }
            self.finished.insert(id, report);
        }
    }

    /// Whether [`Tails::pump`] has something to do at once.
    pub(crate) fn is_busy(&self) -> bool {
        !self.runnable.is_empty()
    }

    /// When [`Tails::pump`] has something to do at the latest.
    pub(crate) fn next_tick(&self) -> Option<Instant> {
        let give_up = |id| self.by_id.get(id)?.finishing.as_ref()?.give_up;
        // A console that is full shows no piece of a line.
        let pieces = self.by_id.iter().filter(|(id, _)| !self.full.contains(id));
        let pieces = pieces.filter_map(|(_, tail)| tail.next_piece());
        self.full.iter().filter_map(give_up).chain(pieces).chain(self.resume_at).chain(self.poll_at).min()
    }

    /// Files that are not watched are looked at, and unfinished lines shown, when that is due.
    fn look_at_clock(&mut self, now: Instant) {
        let is_poll = self.poll_at.take_if(|at| *at <= now).is_some();
        if is_poll {
            for id in std::mem::take(&mut self.unreported) {
                self.full.remove(&id);
                self.runnable.insert(id);
            }
        }
        for (id, tail) in &mut self.by_id {
            let has_polled = is_poll && tail.mark_polled();
            if has_polled {
                self.poll_at = now.checked_add(POLL_PAUSE);
            }
            let has_piece = tail.next_piece().is_some_and(|due| due <= now);
            if (has_polled || has_piece) && !self.full.contains(id) {
                self.runnable.insert(*id);
            }
        }
    }

    fn look_everywhere(&mut self) {
        for (id, tail) in &mut self.by_id {
            tail.mark_all();
            if !self.full.contains(id) {
                self.runnable.insert(*id);
            }
        }
    }

    fn end(&mut self, id: u64, poller: &Poller) -> Option<TailReport> {
        let tail = self.by_id.remove(&id)?;
        self.runnable.remove(&id);
        let is_reported = !self.unreported.remove(&id);
        if self.full.remove(&id) && is_reported {
            let _ = poller.remove(tail.console_fd());
        }
        self.unwatch(id);
        let key = tail.console_key();
        if !self.by_id.values().any(|other| other.console_key() == key) {
            self.open_lines.remove(&key);
        }
        if self.by_id.is_empty() {
            (self.resume_at, self.poll_at) = (None, None);
            self.listen(poller, false);
        }
        Some(tail.report())
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
    use std::sync::mpsc::{Receiver, sync_channel};

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    const TOKEN: u64 = 7;
    const TIMEOUT: Duration = Duration::from_secs(600);

    /// A file of one line, a tail of it, and a console pipe with no room: its ends.
    fn full_console() -> (Tails, Poller, OwnedFd, OwnedFd) {
        let file = memfd_create("log", MemfdFlags::CLOEXEC).expect("a file");
        rustix::io::write(&file, b"a line\n").expect("written");
        let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
        // The size that a console asks for.
        rustix::pipe::fcntl_setpipe_size(&writer, 1 << 20).expect("resized");
        rustix::io::ioctl_fionbio(&writer, true).expect("non-blocking");
        while rustix::io::write(&writer, &[b'x'; 4096]).is_ok() {}
        rustix::io::ioctl_fionbio(&writer, false).expect("blocking");
        let (mut tails, poller) = (Tails::new(1), Poller::new().expect("a poller"));
        let files = vec![(path, b"[0]:".to_vec())];
        let spec = TailSpec { files, console: writer, only_lines_with: Vec::new(), whole_lines_only: false };
        tails.add(TOKEN, &spec, &poller).expect("a tail");
        (tails, poller, reader, file)
    }

    fn finish(tails: &mut Tails) -> Receiver<TailReport> {
        let (reply, report) = sync_channel(1);
        tails.finish(TOKEN, TIMEOUT, Instant::now(), reply);
        report
    }

    #[test]
    fn a_full_console_that_the_poller_refuses_is_tried_again() {
        let (mut tails, poller, reader, _file) = full_console();
        // The poller has the console already and refuses to add it a second time.
        poller.add(tails.by_id[&TOKEN].console_fd(), 99, Interest::Writable).expect("added");
        let report = finish(&mut tails);
        let now = Instant::now();
        tails.pump(now, &poller, |id| id);
        assert!(!tails.is_busy(), "the console is full");
        assert_eq!(report.try_recv().ok(), None);
        let mut room = vec![0; 1 << 20];
        rustix::io::read(&reader, &mut room).expect("read");
        while let Some(next) = tails.next_tick() {
            assert!(next <= now + 2 * POLL_PAUSE, "it waits for the patience of the finish alone");
            tails.pump(next, &poller, |id| id);
        }
        assert_eq!(report.try_recv().expect("finished").lines, 1);
    }

    #[test]
    fn each_finish_of_a_tail_gets_its_report() {
        let (mut tails, poller, reader, _file) = full_console();
        rustix::io::read(&reader, &mut vec![0; 1 << 20]).expect("read");
        let reports = [finish(&mut tails), finish(&mut tails)];
        for _ in 0..2 {
            tails.pump(Instant::now(), &poller, |id| id);
        }
        let late = finish(&mut tails);
        for report in reports.into_iter().chain([late]) {
            assert_eq!(report.try_recv().expect("a report").lines, 1);
        }
        tails.drop_tail(TOKEN, &poller);
        assert!(tails.finished.is_empty());
    }
}
