//! All tails of an engine, and when each has something to do.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::tail::{ConsoleKey, Finish, OpenLine, Pumped, Tail, TailReport, TailSpec};
use crate::error::Error;
use crate::sys::notify::Notifier;
use crate::sys::poller::{Interest, Poller};

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
    by_id: BTreeMap<u64, Tail>,
    runnable: BTreeSet<u64>,
    full: BTreeSet<u64>,
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
            watches: HashMap::new(),
            poll_at: None,
            open_lines: HashMap::new(),
            scratch: Vec::new(),
        }
    }

    /// Starts to follow the files of `spec`.
    pub(crate) fn add(&mut self, id: u64, spec: &TailSpec, poller: &Poller) -> Result<(), Error> {
        let mut tail = Tail::open(spec)?;
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
    pub(crate) fn finish(&mut self, id: u64, patience: Duration, now: Instant) {
        if let Some(tail) = self.by_id.get_mut(&id) {
            tail.mark_all();
            tail.finishing = Some(Finish { patience, give_up: now.checked_add(patience) });
            self.runnable.insert(id);
        }
    }

    /// Ends a tail that nobody waits for.
    pub(crate) fn drop_tail(&mut self, id: u64, poller: &Poller) {
        self.end(id, poller);
    }

    /// Copies what there is to copy, one chunk of each stream. Returns the tails that ended.
    pub(crate) fn pump(
        &mut self,
        now: Instant,
        poller: &Poller,
        console_token: impl Fn(u64) -> u64,
    ) -> Vec<(u64, TailReport)> {
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
                    if poller.add(tail.console_fd(), console_token(*id), Interest::Writable).is_ok() {
                        self.full.insert(*id);
                    }
                }
            }
        }
        let given_up = |tail: &Tail| {
            let finish = tail.finishing.as_ref();
            finish.and_then(|finish| finish.give_up).is_some_and(|at| at <= now)
        };
        ended.extend(self.full.iter().filter(|id| self.by_id.get(id).is_some_and(given_up)));
        if !turn.is_empty() && !self.by_id.is_empty() {
            self.listen(poller, false);
            self.resume_at = now.checked_add(GATHER);
        }
        ended.into_iter().filter_map(|id| Some((id, self.end(id, poller)?))).collect()
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
        if self.full.remove(&id) {
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
