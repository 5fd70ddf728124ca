//! Signal masks of threads.

use std::mem::MaybeUninit;

/// Keeps all signals of the calling thread blocked until it is dropped.
#[derive(Debug)]
pub struct BlockedSignals {
    former: libc::sigset_t,
}

/// Blocks all signals in the calling thread (`pthread_sigmask(3)`).
#[must_use = "the signals are unblocked when the guard is dropped"]
pub fn block_all() -> BlockedSignals {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    let mut former = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: both sets are valid for writes; sigfillset initialises the first, pthread_sigmask the second.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), former.as_mut_ptr());
        BlockedSignals { former: former.assume_init() }
    }
}

impl BlockedSignals {
    /// Keeps the signals blocked until the thread ends.
    pub fn forever(self) {
        std::mem::forget(self);
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: `former` was filled in by the kernel when the guard was made.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.former, std::ptr::null_mut());
        }
    }
}
