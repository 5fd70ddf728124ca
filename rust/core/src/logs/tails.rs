//! All tails of an engine, and when each has something to do.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::tail::{Finish, Pumped, Tail, TailReport, TailSpec};
use crate::error::Error;
use crate::sys::notify::Notifier;
use crate::sys::poller::{Interest, Poller};

/// How often files are looked at where no inotify instance is to be had.
const WITHOUT_NOTIFIER: Duration = Duration::from_millis(20);

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
            scratch: Vec::new(),
        }
    }

    /// Starts to follow the files of `spec`.
    pub(crate) fn add(&mut self, id: u64, spec: &TailSpec, poller: &Poller) -> Result<(), Error> {
        let tail = Tail::open(spec)?;
        if let Some(notifier) = &self.notifier {
            for (index, (path, _)) in spec.files.iter().enumerate() {
                let watch = notifier.watch(path);
                let watch = watch.map_err(|source| Error::os("watch", path.display().to_string(), source));
                match watch {
                    Ok(watch) => self.watches.entry(watch).or_default().push((id, index)),
                    Err(error) => {
                        self.unwatch(id);
                        return Err(error);
                    }
                }
            }
        }
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
            if self.notifier.is_none() {
                self.look_everywhere();
            }
        }
        let mut ended = Vec::new();
        let turn: Vec<u64> = self.runnable.iter().copied().collect();
        for id in &turn {
            let Some(tail) = self.by_id.get_mut(id) else { continue };
            match tail.pump(&mut self.scratch) {
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
            let pause = if self.notifier.is_some() { GATHER } else { WITHOUT_NOTIFIER };
            self.resume_at = now.checked_add(pause);
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
        self.full.iter().filter_map(give_up).chain(self.resume_at).min()
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
        if self.by_id.is_empty() {
            self.resume_at = None;
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
