//! Heartbeats in shared memory: each process writes its own slot, and the engine reads it.
//!
//! The page is a sealed `memfd_create(2)`, so no process can shrink it while others map it. A symbolic link beside the watchdog's pipe
//! points to its entry in `/proc/PID/fd`: clients find the page by path, and the entry disappears when its owner ends.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create, open};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use rustix::process::{Pid, test_kill_process};

use super::clock::monotonic_ns;

/// Number of slots in a page.
pub const SLOTS: usize = 4096;

/// Fills one cache line to avoid false sharing between processes.
#[repr(C, align(64))]
#[derive(Debug)]
struct Slot {
    /// Process id of the owner; 0 if the slot is free.
    owner: AtomicU64,
    /// `CLOCK_MONOTONIC` of the last beat in nanoseconds.
    beat_ns: AtomicU64,
}

const BYTES: usize = SLOTS * size_of::<Slot>();

/// The mapped page.
#[derive(Debug)]
struct Map(NonNull<Slot>);

// SAFETY: the slots are atomics.
unsafe impl Send for Map {}
// SAFETY: the slots are atomics.
unsafe impl Sync for Map {}

impl Map {
    fn new(fd: &OwnedFd) -> io::Result<Self> {
        // SAFETY: a new mapping of a file that has this size and is sealed against shrinking.
        let start =
            unsafe { mmap(std::ptr::null_mut(), BYTES, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, fd, 0)? };
        NonNull::new(start.cast()).map(Self).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    fn slots(&self) -> &[Slot] {
        // SAFETY: the mapping has this many slots and lives as long as `self`; zeros and whatever others write are valid atomics.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr(), SLOTS) }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this size; nothing borrows from it any more.
        let _ = unsafe { munmap(self.0.as_ptr().cast(), BYTES) };
    }
}

/// A byte that the kernel clears in a forked child (`MADV_WIPEONFORK`). It detects a fork without a system call.
#[derive(Debug)]
struct ForkMark(NonNull<AtomicU8>);

// SAFETY: points to an atomic.
unsafe impl Send for ForkMark {}
// SAFETY: points to an atomic.
unsafe impl Sync for ForkMark {}

impl ForkMark {
    /// One byte is needed; the kernel rounds up to a page.
    const BYTES: usize = 1;

    fn new() -> io::Result<Self> {
        // SAFETY: a new anonymous mapping.
        let start = unsafe {
            mmap_anonymous(std::ptr::null_mut(), Self::BYTES, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)?
        };
        let mark = NonNull::new(start.cast()).map(Self).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: the mapping was just made, and nothing is in it yet.
        unsafe { madvise(start, Self::BYTES, Advice::LinuxWipeOnFork)? };
        mark.byte().store(1, Ordering::Relaxed);
        Ok(mark)
    }

    fn byte(&self) -> &AtomicU8 {
        // SAFETY: mapped as long as `self` lives; any byte is a valid atomic.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for ForkMark {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this size; nothing borrows from it any more.
        let _ = unsafe { munmap(self.0.as_ptr().cast(), Self::BYTES) };
    }
}

/// The page in the process that creates it: the watchdog's side.
#[derive(Debug)]
pub struct BeatPage {
    map: Map,
    link: PathBuf,
    target: PathBuf,
    _fd: OwnedFd,
}

impl BeatPage {
    /// Creates a page and the link to it. Replaces an existing link.
    pub fn create(link: &Path) -> io::Result<Self> {
        let fd = memfd_create("ferroelastic-beats", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, BYTES as u64)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let map = Map::new(&fd)?;
        let target = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd()));
        let page = Self { map, link: link.to_owned(), target, _fd: fd };
        page.link()?;
        Ok(page)
    }

    /// Creates the link again if it is missing or points to another page.
    pub fn link(&self) -> io::Result<()> {
        match fs::read_link(&self.link) {
            Ok(target) if target == self.target => return Ok(()),
            Ok(_) => fs::remove_file(&self.link)?,
            Err(_) => {}
        }
        std::os::unix::fs::symlink(&self.target, &self.link)
    }

    /// The last heartbeat of a slot, or `None` if the slot does not belong to process `pid`.
    #[must_use]
    pub fn last_beat_ns(&self, slot: u32, pid: i32) -> Option<u64> {
        let slot = self.map.slots().get(usize::try_from(slot).ok()?)?;
        let is_owner = slot.owner.load(Ordering::Acquire) == u64::try_from(pid).ok()?;
        is_owner.then(|| slot.beat_ns.load(Ordering::Acquire))
    }

    /// Frees the slots of a process that has ended.
    pub fn free(&self, pid: i32) {
        let Ok(pid) = u64::try_from(pid) else { return };
        for slot in self.map.slots() {
            if slot.owner.load(Ordering::Relaxed) == pid {
                let _ = slot.owner.compare_exchange(pid, 0, Ordering::AcqRel, Ordering::Relaxed);
            }
        }
    }
}

impl Drop for BeatPage {
    fn drop(&mut self) {
        if fs::read_link(&self.link).is_ok_and(|target| target == self.target) {
            let _ = fs::remove_file(&self.link);
        }
    }
}

/// A slot in the process that sends heartbeats: the worker's side.
#[derive(Debug)]
pub struct BeatSlot {
    map: Map,
    index: u32,
    owner: u32,
    fork_mark: ForkMark,
}

impl BeatSlot {
    /// Claims a free slot of the page at `link`, or one whose owner is dead. Fails with `ENOSPC` if there is none.
    pub fn claim(link: &Path) -> io::Result<Self> {
        let fd = open(link, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        if rustix::fs::fstat(&fd)?.st_size != BYTES.try_into().unwrap_or(i64::MAX) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let (map, fork_mark) = (Map::new(&fd)?, ForkMark::new()?);
        let owner = std::process::id();
        for (index, slot) in (0..).zip(map.slots()) {
            let former = slot.owner.load(Ordering::Relaxed);
            let free = former == 0 || is_dead(former);
            if free && slot.owner.compare_exchange(former, owner.into(), Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                slot.beat_ns.store(monotonic_ns(), Ordering::Release);
                return Ok(Self { map, index, owner, fork_mark });
            }
        }
        Err(io::Error::from_raw_os_error(libc::ENOSPC))
    }

    /// Index of the slot in the page.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The process that claimed the slot.
    #[must_use]
    pub fn owner(&self) -> u32 {
        self.owner
    }

    /// Whether the calling process claimed the slot. `false` in a forked child.
    #[must_use]
    pub fn is_own(&self) -> bool {
        self.fork_mark.byte().load(Ordering::Relaxed) != 0
    }

    fn slot(&self) -> &Slot {
        &self.map.slots()[self.index as usize]
    }

    /// Records a heartbeat.
    pub fn beat(&self) {
        self.slot().beat_ns.store(monotonic_ns(), Ordering::Release);
    }

    /// Frees the slot for other processes.
    pub fn release(&self) {
        let _ = self.slot().owner.compare_exchange(self.owner.into(), 0, Ordering::AcqRel, Ordering::Relaxed);
    }
}

fn is_dead(pid: u64) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.is_none_or(|pid| matches!(test_kill_process(pid), Err(rustix::io::Errno::SRCH)))
}
