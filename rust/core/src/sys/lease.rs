//! The lease of an agent's workers, in shared memory. The agent writes its deadlines; the guard process reads them, even while the agent is
//! suspended.
//!
//! Times are those of `CLOCK_BOOTTIME`, which also runs while the machine is suspended.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::time::{ClockId, clock_gettime};

/// Two deadlines in nanoseconds. 0 means no deadline.
#[repr(C)]
#[derive(Debug)]
struct Words {
    stop_ns: AtomicU64,
    kill_ns: AtomicU64,
}

const BYTES: usize = size_of::<Words>();

/// The shared page.
#[derive(Debug)]
pub struct LeasePage {
    words: NonNull<Words>,
    fd: OwnedFd,
}

// SAFETY: the page holds atomics, and is mapped as long as the value lives.
unsafe impl Send for LeasePage {}
// SAFETY: the page holds atomics.
unsafe impl Sync for LeasePage {}

impl LeasePage {
    /// Creates a page without deadlines.
    pub fn create() -> io::Result<Self> {
        let fd = memfd_create("ferroelastic-lease", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, BYTES as u64)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Self::open(fd)
    }

    /// Maps the page of another process. It must be sealed, because reading beyond the end of a shrunk file raises SIGBUS.
    pub fn open(fd: OwnedFd) -> io::Result<Self> {
        let is_large_enough = u64::try_from(rustix::fs::fstat(&fd)?.st_size).is_ok_and(|size| size >= BYTES as u64);
        if !is_large_enough || !fcntl_get_seals(&fd)?.contains(SealFlags::SHRINK) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: a new mapping of a file that has this size and is sealed against shrinking.
        let start =
            unsafe { mmap(std::ptr::null_mut(), BYTES, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &fd, 0)? };
        let words = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { words, fd })
    }

    fn words(&self) -> &Words {
        // SAFETY: mapped with this size as long as `self` lives; whatever others write is a valid atomic.
        unsafe { self.words.as_ref() }
    }

    /// Sets the deadlines for signalling the workers and for killing them.
    pub fn set(&self, stop_at: Option<Instant>, kill_at: Option<Instant>) {
        let (now, now_ns) = (Instant::now(), now_ns());
        let to_boottime_ns = |at: Option<Instant>| {
            let Some(at) = at else { return 0 };
            let ahead = u64::try_from(at.saturating_duration_since(now).as_nanos()).unwrap_or(u64::MAX);
            let behind = u64::try_from(now.saturating_duration_since(at).as_nanos()).unwrap_or(u64::MAX);
            now_ns.saturating_add(ahead).saturating_sub(behind).max(1)
        };
        self.words().stop_ns.store(to_boottime_ns(stop_at), Ordering::Release);
        self.words().kill_ns.store(to_boottime_ns(kill_at), Ordering::Release);
    }

    /// Whether the deadline for signalling the workers has passed.
    #[must_use]
    pub fn is_over(&self) -> bool {
        let at_ns = self.words().stop_ns.load(Ordering::Acquire);
        at_ns != 0 && now_ns() >= at_ns
    }

    /// The deadline for killing the workers, in nanoseconds of `CLOCK_BOOTTIME`.
    #[must_use]
    pub fn kill_at_ns(&self) -> Option<u64> {
        Some(self.words().kill_ns.load(Ordering::Acquire)).filter(|at_ns| *at_ns != 0)
    }

    /// The time until the deadline for killing the workers.
    #[must_use]
    pub fn left(&self) -> Option<Duration> {
        self.kill_at_ns().map(|at_ns| Duration::from_nanos(at_ns.saturating_sub(now_ns())))
    }
}

impl AsFd for LeasePage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for LeasePage {
    fn drop(&mut self) {
        // SAFETY: mapped by `open` with this size; nothing borrows from it any more.
        let _ = unsafe { munmap(self.words.as_ptr().cast(), BYTES) };
    }
}

/// `CLOCK_BOOTTIME` in nanoseconds.
#[must_use]
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_are_visible_through_another_mapping() {
        let page = LeasePage::create().expect("a page");
        let other = LeasePage::open(page.as_fd().try_clone_to_owned().expect("dup")).expect("the same page");
        assert!((other.kill_at_ns(), other.is_over()) == (None, false));
        let now = Instant::now();
        page.set(Some(now), Some(now + Duration::from_secs(100)));
        assert!(other.is_over());
        let left = other.left().expect("a deadline");
        assert!(left > Duration::from_secs(90) && left <= Duration::from_secs(100), "{left:?}");
        page.set(None, None);
        assert!((other.kill_at_ns(), other.is_over()) == (None, false));
    }

    #[test]
    fn a_file_that_can_shrink_is_refused() {
        let fd = memfd_create("other", MemfdFlags::CLOEXEC).expect("memfd");
        ftruncate(&fd, 4096).expect("size");
        assert!(LeasePage::open(fd).is_err());
    }
}
