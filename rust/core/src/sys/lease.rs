//! Until when the workers of an agent may run, in shared memory: the agent writes it, and a process that outlives its suspension reads it.
//!
//! Times are of `CLOCK_BOOTTIME`, which goes on while the machine sleeps.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::time::{ClockId, clock_gettime};

/// Two deadlines in nanoseconds; 0 is none.
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
    /// A page without deadlines.
    pub fn create() -> io::Result<Self> {
        let fd = memfd_create("ferroelastic-lease", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, BYTES as u64)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Self::open(fd)
    }

    /// The page of another process. It must be sealed, so that nobody takes it away from under its readers.
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

    /// Sets when the workers are told to end, and when none of them may be left.
    pub fn set(&self, stop_at: Option<Instant>, kill_at: Option<Instant>) {
        let (here, now_ns) = (Instant::now(), now_ns());
        let on_page = |at: Option<Instant>| {
            let Some(at) = at else { return 0 };
            let ahead = u64::try_from(at.saturating_duration_since(here).as_nanos()).unwrap_or(u64::MAX);
            let behind = u64::try_from(here.saturating_duration_since(at).as_nanos()).unwrap_or(u64::MAX);
            now_ns.saturating_add(ahead).saturating_sub(behind).max(1)
        };
        self.words().stop_ns.store(on_page(stop_at), Ordering::Release);
        self.words().kill_ns.store(on_page(kill_at), Ordering::Release);
    }

    /// Whether the workers are to be told to end.
    #[must_use]
    pub fn is_over(&self) -> bool {
        let at_ns = self.words().stop_ns.load(Ordering::Acquire);
        at_ns != 0 && now_ns() >= at_ns
    }

    /// When none of the workers may be left, in nanoseconds of `CLOCK_BOOTTIME`.
    #[must_use]
    pub fn kill_at_ns(&self) -> Option<u64> {
        Some(self.words().kill_ns.load(Ordering::Acquire)).filter(|at_ns| *at_ns != 0)
    }

    /// How long until then.
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
    fn what_one_writes_the_other_reads() {
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
