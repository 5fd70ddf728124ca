//! Log files as their readers see them.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};

use rustix::fs::{Mode, OFlags};

/// The files with a size limit, by path.
pub(super) type Rotations = HashMap<PathBuf, Arc<RotatedFile>>;

/// A log file whose beginning is removed from time to time. The positions of its readers include the removed bytes.
#[derive(Debug, Default)]
pub(crate) struct RotatedFile {
    /// Number of bytes removed from the file so far. Locked while it changes.
    removed: Mutex<u64>,
    /// Positions of the readers.
    readers: Mutex<Vec<Weak<AtomicU64>>>,
}

impl RotatedFile {
    /// Locks the number of removed bytes. Readers are refused until the guard is dropped.
    pub(super) fn lock(&self) -> MutexGuard<'_, u64> {
        self.removed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn try_lock(&self) -> Option<MutexGuard<'_, u64>> {
        match self.removed.try_lock() {
            Ok(removed) => Some(removed),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// The smallest position of a reader; `None` without readers.
    pub(super) fn slowest_reader(&self) -> Option<u64> {
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        readers.retain(|reader| reader.strong_count() > 0);
        readers.iter().filter_map(Weak::upgrade).map(|position| position.load(Ordering::Relaxed)).min()
    }
}

/// Bytes of a file that a reader has not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unread {
    No,
    /// The file may have grown.
    Yes,
    /// The last read was refused, because bytes are removed from the file. It is polled.
    Refused,
}

/// A log file open for reading.
#[derive(Debug)]
pub(super) struct LogFile {
    fd: OwnedFd,
    rotation: Option<(Arc<RotatedFile>, Arc<AtomicU64>)>,
}

impl LogFile {
    /// Opens a file, which is created if it is missing.
    pub(super) fn open(path: &Path, rotation: Option<&Arc<RotatedFile>>) -> io::Result<Self> {
        let fd = open_log(path)?;
        let rotation = rotation.map(|rotated| {
            let removed = rotated.try_lock().map_or(0, |removed| *removed);
            let position = Arc::new(AtomicU64::new(removed));
            rotated.readers.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&position));
            (Arc::clone(rotated), position)
        });
        Ok(Self { fd, rotation })
    }

    /// The position of the first byte of the file.
    pub(super) fn base(&self) -> u64 {
        self.rotation.as_ref().and_then(|(rotated, _)| rotated.try_lock()).map_or(0, |removed| *removed)
    }

    /// Reads until `buffer` is full or the file ends. `None` while bytes are removed from the file; the end of the removal notifies
    /// readers.
    pub(super) fn read(&self, buffer: &mut [u8], position: u64) -> Option<usize> {
        let Some((rotated, _)) = &self.rotation else { return Some(read_full(&self.fd, buffer, position)) };
        let removed = rotated.try_lock()?;
        Some(read_full(&self.fd, buffer, position.saturating_sub(*removed)))
    }

    /// Allows the removal of the bytes before `position`.
    pub(super) fn publish(&self, position: u64) {
        if let Some((_, published)) = &self.rotation {
            published.store(position, Ordering::Relaxed);
        }
    }

    /// The position of the end of the file. `None` while bytes are removed from it, or after an error.
    pub(super) fn end(&self) -> Option<u64> {
        let removed = match &self.rotation {
            Some((rotated, _)) => *rotated.try_lock()?,
            None => 0,
        };
        Some(rustix::fs::fstat(&self.fd).ok()?.st_size.cast_unsigned() + removed)
    }
}

fn open_log(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC, Mode::from_raw_mode(0o666))?)
}

/// Reads until `buffer` is full or the file ends. An error is treated as the end of the file.
fn read_full(file: &OwnedFd, buffer: &mut [u8], offset: u64) -> usize {
    let mut read = 0;
    while read < buffer.len() {
        match rustix::io::pread(file, &mut buffer[read..], offset + read as u64) {
            Ok(0) => break,
            Ok(count) => read += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => break,
        }
    }
    read
}
