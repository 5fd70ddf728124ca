//! Errors. Each names the operation and its object.

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
        /// The operation, e.g. `open pidfd for`.
        operation: &'static str,
        /// Its object, e.g. `worker 3 (pid 4711)`.
        object: String,
        /// The error of the system call.
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
    /// Another thread of this crate than the engine's panicked; its descriptors are closed.
    #[error("the thread {thread} panicked: {text}")]
    Panicked {
        /// The thread's name.
        thread: &'static str,
        /// The panic message.
        text: String,
    },
    /// An object was used in a forked child of the process that owns it.
    #[error("this object belongs to process {owner}; it cannot be used in its forked child {caller}")]
    Forked {
        /// The process that owns the object.
        owner: u32,
        /// The process that tried to use it.
        caller: u32,
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

/// The message of a panic.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("unknown panic").to_owned()
}

/// A process could not be started: the command, the failed step and the reason.
#[derive(Debug, thiserror::Error)]
#[error("failed to start worker {index}: {stage} {object}: {}", reason(source))]
pub struct SpawnError {
    /// Position of the command in its group.
    pub index: usize,
    /// The step, named after the system call: `execve`, `open stdout`, `chdir` …
    pub stage: &'static str,
    /// The path or value that the step used.
    pub object: String,
    /// The error of the system call.
    pub source: io::Error,
}

/// An error as a fragment of a sentence, without its number: "no such file or directory".
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
