//! Where the engine thread leaves its question, and the thread that answers waits for it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::sys::poller::wait_readable;
use crate::sys::wake::WakeFd;

/// Shared by the engine thread, which asks and never waits here, and one thread that answers.
#[derive(Debug)]
pub(crate) struct Desk {
    asked: AtomicBool,
    closed: AtomicBool,
    wake: WakeFd,
}

impl Desk {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { asked: AtomicBool::new(false), closed: AtomicBool::new(false), wake: WakeFd::new()? })
    }

    pub(crate) fn ask(&self) {
        self.asked.store(true, Ordering::Release);
        self.wake.wake();
    }

    /// Nobody will ask any more.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.wake.wake();
    }

    /// Blocks until there is a question; `false` when there will be none.
    pub(crate) fn wait(&self) -> io::Result<bool> {
        loop {
            if self.closed.load(Ordering::Acquire) {
                // For whoever else waits.
                self.wake.wake();
                return Ok(false);
            }
            if self.asked.swap(false, Ordering::AcqRel) {
                return Ok(true);
            }
            wait_readable([Some(&self.wake)], None)?;
            // Before the next look: what comes after it makes the descriptor readable again.
            self.wake.drain();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_question_is_taken_once_and_a_closed_desk_has_none() {
        let desk = Arc::new(Desk::new().expect("eventfd"));
        desk.ask();
        assert!(desk.wait().expect("poll"));
        let waiting = [(), ()].map(|()| {
            let desk = Arc::clone(&desk);
            std::thread::spawn(move || desk.wait().expect("poll"))
        });
        desk.close();
        for thread in waiting {
            assert!(!thread.join().expect("no panic"));
        }
        desk.ask();
        assert!(!desk.wait().expect("poll"));
    }
}
