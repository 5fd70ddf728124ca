//! Size limits of log files: the beginning of a file moves to a numbered file, while its writer and its readers go on.
//!
//! The writer holds the file open and appends to it. The complete lines at the beginning are copied to `stdout.log.1`. Then the file system
//! removes them from `stdout.log` without a copy (`FALLOC_FL_COLLAPSE_RANGE`), or frees their space (`FALLOC_FL_PUNCH_HOLE`). Both are
//! atomic for writers that append. The removed range must end at the end of a block of the file system. Spaces replace the copied bytes
//! after it.

use std::ffi::OsString;
use std::fs::{File, OpenOptions, rename};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::lines::MAX_LINE;
use super::log_file::RotatedFile;

/// Limits of each log file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RotationLimits {
    /// Size in bytes from which the beginning of the file moves.
    pub max_size: u64,
    /// Number of numbered files that are kept, at least 1. Older ones are deleted.
    pub max_files: usize,
}

/// Moves the beginning of one log file.
#[derive(Debug)]
pub(crate) struct FileRotation {
    path: PathBuf,
    rotated: Arc<RotatedFile>,
    limits: RotationLimits,
    file: Option<File>,
    /// Offset of the first byte in the file that was not copied.
    start: u64,
    /// The file system can neither remove bytes nor free them.
    is_impossible: bool,
}

impl FileRotation {
    pub(crate) fn new(path: PathBuf, rotated: Arc<RotatedFile>, limits: RotationLimits) -> Self {
        Self { path, rotated, limits, file: None, start: 0, is_impossible: false }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Moves the beginning of the file if the file has reached its limit.
    ///
    /// # Errors
    ///
    /// The failed step, for people, and its error. The file is complete. A later call tries again, unless the file system can neither
    /// remove bytes nor free them.
    pub(crate) fn rotate(&mut self) -> Result<(), (&'static str, io::Error)> {
        if self.is_impossible {
            return Ok(());
        }
        if self.file.is_none() {
            self.file = OpenOptions::new().read(true).write(true).open(&self.path).ok();
        }
        let Some(file) = &self.file else { return Ok(()) }; // the worker has not created it yet
        let size = file.metadata().map_err(|error| ("read the size of", error))?.len();
        if size < self.start {
            self.start = 0; // a program has truncated the file
        }
        let removed = *self.rotated.lock();
        // Bytes that a reader has not read stay.
        let readable =
            self.rotated.slowest_reader().map_or(size, |position| position.saturating_sub(removed).min(size));
        let begin = self.start;
        let moved = self.move_parts(readable);
        if self.start > begin {
            self.remove(self.start).map_err(|error| ("remove the beginning of", error))?;
        }
        moved.map_err(|error| ("copy the beginning of", error))
    }

    /// Copies the lines before `readable` to numbered files, as long as the lines fill a file.
    fn move_parts(&mut self, readable: u64) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let max_size = self.limits.max_size;
        loop {
            let left = readable.saturating_sub(self.start);
            if left < max_size {
                return Ok(());
            }
            let end = last_line_end(file, self.start + max_size)?;
            let end = if end > self.start { end } else { self.start + max_size };
            // Lines that would be deleted in the same turn are not copied.
            if left / max_size <= self.limits.max_files as u64 {
                let newest = numbered(&self.path, "new");
                copy(file, self.start..end, &newest)
                    .and_then(|()| self.shift(&newest))
                    .inspect_err(|_| drop(std::fs::remove_file(&newest)))?;
            }
            self.start = end;
        }
    }

    /// Renames the numbered files, deletes the oldest one, and makes `newest` number 1.
    fn shift(&self, newest: &Path) -> io::Result<()> {
        for number in (1..self.limits.max_files).rev() {
            match rename(numbered(&self.path, number), numbered(&self.path, number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        rename(newest, numbered(&self.path, 1))
    }

    /// Removes the whole blocks before `end`. Spaces replace the bytes between them and `end`.
    fn remove(&mut self, end: u64) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let block = file.metadata()?.blksize().max(1);
        // At least one byte remains: the write to it notifies readers that were refused during the removal.
        let whole = (end - 1) / block * block;
        // The removal waits for the disk and blocks the writer. Most bytes are written to the disk before.
        file.sync_data()?;
        let mut removed = self.rotated.lock();
        let mut filler = vec![b' '; usize::try_from(end - whole).unwrap_or_default()];
        if let Some(last) = filler.last_mut() {
            *last = b'\n';
        }
        let at = match rustix::fs::fallocate(file, FallocateFlags::COLLAPSE_RANGE, 0, whole) {
            Ok(()) => {
                *removed += whole;
                self.start = end - whole;
                0
            }
            Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS | Errno::PERM) => {
                let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(file, hole, 0, whole).inspect_err(|_| self.is_impossible = true)?;
                whole
            }
            Err(error) => return Err(error.into()),
        };
        drop(removed);
        file.write_all_at(&filler, at)?;
        Ok(())
    }
}

/// The end of the last line that ends at or before `limit`; `limit` if the last [`MAX_LINE`] bytes have none.
fn last_line_end(file: &File, limit: u64) -> io::Result<u64> {
    let mut text = vec![0; MAX_LINE.min(usize::try_from(limit).unwrap_or(MAX_LINE))];
    let begin = limit - text.len() as u64;
    file.read_exact_at(&mut text, begin)?;
    Ok(memchr::memrchr(b'\n', &text).map_or(limit, |end| begin + end as u64 + 1))
}

fn copy(file: &File, range: std::ops::Range<u64>, to: &Path) -> io::Result<()> {
    let mut target = OpenOptions::new().write(true).create(true).truncate(true).open(to)?;
    let mut chunk = vec![0; 1 << 20];
    let mut offset = range.start;
    while offset < range.end {
        let size = usize::try_from(range.end - offset).unwrap_or(usize::MAX).min(chunk.len());
        file.read_exact_at(&mut chunk[..size], offset)?;
        target.write_all(&chunk[..size])?;
        offset += size as u64;
    }
    Ok(())
}

fn numbered(path: &Path, number: impl std::fmt::Display) -> PathBuf {
    let mut name: OsString = path.into();
    name.push(format!(".{number}"));
    name.into()
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::logs::log_file::LogFile;

    const LIMITS: RotationLimits = RotationLimits { max_size: 64 * 1024, max_files: 3 };

    struct Place {
        folder: PathBuf,
        writer: File,
        rotation: FileRotation,
        rotated: Arc<RotatedFile>,
    }

    impl Place {
        fn new(name: &str) -> Self {
            let folder = std::env::temp_dir().join(format!("ferro-rotation-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&folder).expect("a folder");
            let path = folder.join("stdout.log");
            let writer = OpenOptions::new().append(true).create(true).open(&path).expect("a file");
            let rotated = Arc::<RotatedFile>::default();
            let rotation = FileRotation::new(path, Arc::clone(&rotated), LIMITS);
            Self { folder, writer, rotation, rotated }
        }

        fn read(&self, name: &str) -> String {
            let mut text = String::new();
            let file = File::open(self.folder.join(name));
            file.and_then(|mut file| file.read_to_string(&mut text)).map_or(String::new(), |_| text)
        }

        /// The content of all files, oldest first, without the bytes that replace moved lines.
        fn all(&self) -> String {
            let parts = ["stdout.log.3", "stdout.log.2", "stdout.log.1", "stdout.log"].map(|name| self.read(name));
            parts
                .concat()
                .replace('\0', "")
                .lines()
                .filter(|line| !line.trim().is_empty())
                .fold(String::new(), |text, line| text + line.trim_start_matches(' ') + "\n")
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }

    #[test]
    fn lines_move_to_numbered_files_while_the_writer_appends() {
        let mut place = Place::new("writer");
        let reader = LogFile::open(&place.rotation.path, Some(&place.rotated)).expect("open");
        let (mut written, mut seen, mut position) = (String::new(), Vec::new(), reader.base());
        let mut buffer = vec![0; 1 << 20];
        for number in 0..10_000 {
            let line = format!("line {number} of a worker\n");
            place.writer.write_all(line.as_bytes()).expect("written");
            written += &line;
            if number % 100 == 0 {
                let read = reader.read(&mut buffer, position).expect("not locked");
                seen.extend_from_slice(&buffer[..read]);
                position += read as u64;
                reader.publish(position);
                place.rotation.rotate().expect("rotated");
            }
        }
        let read = reader.read(&mut buffer, position).expect("not locked");
        seen.extend_from_slice(&buffer[..read]);
        assert!(String::from_utf8(seen).expect("text") == written, "a reader sees all lines once");
        assert!(place.read("stdout.log.3").ends_with('\n') && place.read("stdout.log.1").ends_with('\n'));
        assert_eq!(reader.end(), Some(written.len() as u64));
        let all = place.all();
        assert!(written.ends_with(&all), "the newest lines, whole and in order");
        assert!(all.len() > 3 * 60 * 1024, "{}", all.len());
        for number in 1..=3 {
            assert!(place.read(&format!("stdout.log.{number}")).len() <= 64 * 1024);
        }
        assert!(!place.folder.join("stdout.log.4").exists());
    }

    #[test]
    fn a_line_that_a_reader_has_not_read_does_not_move() {
        let mut place = Place::new("reader");
        let reader = LogFile::open(&place.rotation.path, Some(&place.rotated)).expect("open");
        place.writer.write_all(&b"a line\n".repeat(20_000)).expect("written");
        place.rotation.rotate().expect("nothing to do");
        assert_eq!(place.read("stdout.log").len(), 140_000);
        drop(reader);
        place.rotation.rotate().expect("rotated");
        assert!(place.all() == "a line\n".repeat(20_000), "nothing is lost");
    }

    #[test]
    fn lines_that_would_be_deleted_at_once_are_not_copied() {
        let mut place = Place::new("burst");
        let text = (0..100_000).fold(String::new(), |text, number| text + "line " + &number.to_string() + "\n");
        place.writer.write_all(text.as_bytes()).expect("written");
        place.rotation.rotate().expect("rotated");
        let all = place.all();
        assert!(text.ends_with(&all) && all.len() > 3 * 60 * 1024, "{}", all.len());
    }

    #[test]
    fn a_full_or_deleted_folder_is_an_error_and_loses_nothing() {
        let mut place = Place::new("deleted");
        place.writer.write_all(&b"a line\n".repeat(20_000)).expect("written");
        place.rotation.rotate().expect("rotated");
        place.writer.write_all(&b"a line\n".repeat(20_000)).expect("written");
        std::fs::remove_dir_all(&place.folder).expect("removed");
        let (step, error) = place.rotation.rotate().expect_err("no folder");
        assert_eq!((step, error.kind()), ("copy the beginning of", io::ErrorKind::NotFound));
        let file = place.rotation.file.as_ref().expect("open");
        assert!(file.metadata().expect("a size").len() >= 140_000);
    }
}
