//! The question "when was the last progress?", from the engine thread to the thread that answers it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::sys::poller::wait_readable;
use crate::sys::wake::WakeFd;

/// Shared by the engine thread, which asks and never blocks, and one thread that answers.
#[derive(Debug)]
pub(crate) struct ProgressQuestion {
    asked: AtomicBool,
    closed: AtomicBool,
    wake: WakeFd,
}

impl ProgressQuestion {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { asked: AtomicBool::new(false), closed: AtomicBool::new(false), wake: WakeFd::new()? })
    }

    pub(crate) fn ask(&self) {
        self.asked.store(true, Ordering::Release);
        self.wake.wake();
    }

    /// Ends the wait of the answering thread.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.wake.wake();
    }

    /// Blocks until there is a question; `false` once this is closed.
    pub(crate) fn wait(&self) -> io::Result<bool> {
        loop {
            if self.closed.load(Ordering::Acquire) {
                // Wakes the next waiter.
                self.wake.wake();
                return Ok(false);
            }
            if self.asked.swap(false, Ordering::AcqRel) {
                return Ok(true);
            }
            wait_readable([Some(&self.wake)], None)?;
            // Drains before the next look, so that a later question makes the descriptor readable again.
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
        let question = Arc::new(ProgressQuestion::new().expect("eventfd"));
        question.ask();
        assert!(question.wait().expect("poll"));
        let waiting = [(), ()].map(|()| {
            let question = Arc::clone(&question);
            std::thread::spawn(move || question.wait().expect("poll"))
        });
        question.close();
        for thread in waiting {
            assert!(!thread.join().expect("no panic"));
        }
        question.ask();
        assert!(!question.wait().expect("poll"));
    }
}
