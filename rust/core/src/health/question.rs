//! The question "when did the agent last make progress?", from the engine thread to the answering thread.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::sys::poller::wait_readable;
use crate::sys::wake::WakeFd;

/// Shared by the engine thread, which asks without blocking, and one answering thread.
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

    /// Blocks until a question is asked; `false` once the question is closed.
    pub(crate) fn wait(&self) -> io::Result<bool> {
        loop {
            if self.closed.load(Ordering::Acquire) {
                // Wakes the next waiter, if there is one.
                self.wake.wake();
                return Ok(false);
            }
            if self.asked.swap(false, Ordering::AcqRel) {
                return Ok(true);
            }
            wait_readable([Some(&self.wake)], None)?;
            // Drains before the flags are read again, so a later question makes the descriptor readable again.
            self.wake.drain();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_question_is_received_once_and_closing_wakes_all_waiters() {
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
