//! Starting threads that never reuse the stack of an ended thread.
//!
//! A forked child inherits the memory of its parent but none of its other threads. A destructor in the child may join a thread that exists
//! only in the parent. glibc identifies threads by their stack address and treats such a thread as ended, so the join returns. But glibc
//! also reuses the stacks of ended threads for new ones: the join would then wait for one of our threads, which does not end. A stack that
//! is larger than all others is always new memory.

use std::sync::OnceLock;
use std::thread::Builder;

/// Default stack size of a thread.
const DEFAULT_BYTES: u64 = 8 << 20;

/// Whether this process has one thread. A forked child would inherit the locks of other threads.
pub fn is_single() -> std::io::Result<bool> {
    Ok(std::fs::read_dir("/proc/self/task")?.count() == 1)
}

/// A builder for a thread with this name and a larger stack than that of other threads.
pub fn builder(name: &str) -> Builder {
    Builder::new().name(name.into()).stack_size(stack_bytes())
}

/// Twice the stack size of other threads. The memory is reserved but not used.
pub fn stack_bytes() -> usize {
    static BYTES: OnceLock<usize> = OnceLock::new();
    *BYTES.get_or_init(|| {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Stack).current.unwrap_or(0);
        usize::try_from(2 * limit.clamp(DEFAULT_BYTES, 64 * DEFAULT_BYTES)).unwrap_or(16 << 20)
    })
}
