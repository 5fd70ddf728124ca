//! Warnings of the engine thread for the program's log.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
struct Texts {
    texts: Vec<String>,
    is_announced: bool,
}

/// Warnings that the program has not taken yet.
#[derive(Clone, Debug, Default)]
pub(super) struct Warnings(Arc<Mutex<Texts>>);

impl Warnings {
    fn lock(&self) -> MutexGuard<'_, Texts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(&self, text: String) {
        let mut inner = self.lock();
        inner.texts.push(text);
        inner.is_announced = false;
    }

    /// Whether a warning was added since the last call. The program must be woken then.
    pub(super) fn announce(&self) -> bool {
        let mut inner = self.lock();
        let is_new = !inner.texts.is_empty() && !inner.is_announced;
        inner.is_announced = true;
        is_new
    }

    pub(super) fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.lock().texts)
    }
}
