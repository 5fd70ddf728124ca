//! What can go wrong, always with the operation and the object.

use std::any::Any;
use std::io;

/// Result of this crate's operations.
pub type Result<T> = std::result::Result<T, Error>;

/// An operation of the engine that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed. Reads as "failed to open pidfd for worker 3 (pid 4711): no such process".
    #[error("failed to {operation} {object}: {}", reason(source))]
    Os {
        /// What was tried, e.g. `open pidfd for`.
        operation: &'static str,
        /// On what, e.g. `worker 3 (pid 4711)`.
        object: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A process could not be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// The engine was closed.
    #[error("the supervision engine is closed")]
    Closed,
    /// The engine thread panicked; its workers were killed.
    #[error("the supervision engine failed: {0}")]
    Failed(String),
    /// A thread of this crate that is not the engine's panicked; what it owned is closed.
    #[error("the thread {thread} panicked: {text}")]
    Panicked {
        /// Its name.
        thread: &'static str,
        /// What it said.
        text: String,
    },
    /// A handle was used in a process forked from the one that owns the engine.
    #[error("this object belongs to process {owner}; it cannot be used in its forked child {here}")]
    Forked {
        /// The process that owns the engine.
        owner: u32,
        /// The process that tried to use it.
        here: u32,
    },
}

impl Error {
    pub(crate) fn os(operation: &'static str, object: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Os { operation, object: object.into(), source: source.into() }
    }

    pub(crate) fn panicked(thread: &'static str, panic: &(dyn Any + Send)) -> Self {
        Self::Panicked { thread, text: panic_text(panic) }
    }
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("unknown panic").to_owned()
}

/// Which step of starting a process failed, for which command, and why.
#[derive(Debug, thiserror::Error)]
#[error("failed to start worker {index}: {stage} {object}: {}", reason(source))]
pub struct SpawnError {
    /// Position of the command in its group.
    pub index: usize,
    /// The step, named after the system call: `execve`, `open stdout`, `chdir` …
    pub stage: &'static str,
    /// The path or value the step was about.
    pub object: String,
    /// The kernel's answer.
    pub source: io::Error,
}

/// The kernel's answer as a fragment of a sentence: "no such file or directory", without the number.
fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_operation_object_and_reason() {
        let error = Error::os("open pidfd for", "worker 3 (pid 4711)", io::Error::from_raw_os_error(libc::ESRCH));
        assert_eq!(error.to_string(), "failed to open pidfd for worker 3 (pid 4711): no such process");
    }
}
