//! Starting threads whose stacks are of no thread that has ended.
//!
//! A forked child has the memory of all threads of its parent, and none of them. Whatever it destroys may wait for such a thread, which
//! glibc knows by the address of its stack, and takes for ended. glibc gives the stacks of ended threads to new ones: a wait for a thread
//! that never was here would become one for ours, which does not end. A larger stack than any of those is new memory.

use std::sync::OnceLock;
use std::thread::Builder;

/// Stacks of the usual size, if there is no limit.
const USUAL_BYTES: u64 = 8 << 20;

/// A builder of a thread.
pub fn builder(name: &str) -> Builder {
    Builder::new().name(name.into()).stack_size(stack_bytes())
}

/// Twice what other threads have: memory that is reserved, not used.
pub fn stack_bytes() -> usize {
    static BYTES: OnceLock<usize> = OnceLock::new();
    *BYTES.get_or_init(|| {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Stack).current.unwrap_or(0);
        usize::try_from(2 * limit.clamp(USUAL_BYTES, 64 * USUAL_BYTES)).unwrap_or(16 << 20)
    })
}
