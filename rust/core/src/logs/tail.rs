//! One tail: some growing files, one console.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

use super::lines::{LineFormat, MAX_LINE};
use crate::error::Error;
use crate::sys::console::Console;

/// What to follow and where to copy it.
#[derive(Debug)]
pub struct TailSpec {
    /// Files and the prefix of their lines. A file that does not exist is created.
    pub files: Vec<(PathBuf, Vec<u8>)>,
    /// Where the lines go.
    pub console: OwnedFd,
    /// If not empty, only lines with one of these strings.
    pub only_lines_with: Vec<Vec<u8>>,
}

/// What a finished tail has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TailReport {
    /// Lines written to the console.
    pub lines: u64,
    /// Bytes written to the console, prefixes included.
    pub bytes: u64,
    /// Lines broken up because they were too long.
    pub broken_lines: u64,
    /// Bytes of the files that never reached the console.
    pub dropped_bytes: u64,
}

/// How far a call to [`Tail::pump`] came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pumped {
    /// Everything there is was written.
    Idle,
    /// There is more to do.
    More,
    /// The console takes nothing now.
    ConsoleFull,
}

#[derive(Debug)]
struct Stream {
    file: OwnedFd,
    format: LineFormat,
    offset: u64,
    after_return: bool,
    dirty: bool,
}

/// Bytes read from one stream before the next has its turn; grows up to [`MAX_LINE`] for a line that does not fit.
const CHUNK: usize = 256 * 1024;

#[derive(Debug)]
pub(super) struct Tail {
    console: Console,
    streams: Vec<Stream>,
    pending: Vec<u8>,
    written: usize,
    report: TailReport,
    console_gone: bool,
    pub(super) finishing: Option<Finish>,
}

/// A tail on its last way: to the end of the files, or until the console has taken nothing for `patience`.
#[derive(Debug)]
pub(super) struct Finish {
    pub(super) patience: Duration,
    pub(super) give_up: Option<Instant>,
}

impl Tail {
    pub(super) fn open(spec: &TailSpec) -> Result<Self, Error> {
        let console = Console::new(spec.console.as_fd()).map_err(|source| Error::os("open", "the console", source))?;
        let open = |path: &PathBuf| {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
            rustix::fs::open(path, flags, Mode::from_raw_mode(0o666))
                .map_err(|source| Error::os("open log file", path.display().to_string(), source))
        };
        let streams = spec
            .files
            .iter()
            .map(|(path, prefix)| {
                Ok(Stream {
                    file: open(path)?,
                    format: LineFormat::new(prefix, &spec.only_lines_with),
                    offset: 0,
                    after_return: false,
                    dirty: true,
                })
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self {
            console,
            streams,
            pending: Vec::new(),
            written: 0,
            report: TailReport::default(),
            console_gone: false,
            finishing: None,
        })
    }

    pub(super) fn console_fd(&self) -> BorrowedFd<'_> {
        self.console.as_fd()
    }

    /// The file of a stream has grown.
    pub(super) fn mark(&mut self, stream: usize) {
        self.streams[stream].dirty = true;
    }

    pub(super) fn mark_all(&mut self) {
        for stream in &mut self.streams {
            stream.dirty = true;
        }
    }

    /// Copies one chunk of each stream that has something new.
    pub(super) fn pump(&mut self, scratch: &mut Vec<u8>) -> Pumped {
        if !self.flush() {
            return Pumped::ConsoleFull;
        }
        let last = self.finishing.is_some();
        for index in 0..self.streams.len() {
            if !self.streams[index].dirty {
                continue;
            }
            self.read_chunk(index, last, scratch);
            if !self.flush() {
                return Pumped::ConsoleFull;
            }
        }
        if self.streams.iter().any(|stream| stream.dirty) { Pumped::More } else { Pumped::Idle }
    }

    fn read_chunk(&mut self, index: usize, last: bool, scratch: &mut Vec<u8>) {
        let stream = &mut self.streams[index];
        let mut size = CHUNK;
        loop {
            scratch.resize(size, 0);
            let read = read_full(&stream.file, scratch, stream.offset);
            let at_end = read < size;
            if read == 0
                && rustix::fs::fstat(&stream.file).is_ok_and(|stat| stat.st_size.cast_unsigned() < stream.offset)
            {
                // Truncated under us: what is written from now on starts at the beginning.
                stream.offset = 0;
            }
            let done =
                stream.format.format(&scratch[..read], last && at_end, &mut stream.after_return, &mut self.pending);
            stream.offset += done.consumed as u64;
            stream.dirty = !at_end;
            self.report.lines += done.lines;
            self.report.broken_lines += done.broken;
            if at_end || done.consumed > 0 || size > MAX_LINE {
                return;
            }
            size *= 2;
        }
    }

    /// Writes what is pending. `false` if the console takes nothing now.
    fn flush(&mut self) -> bool {
        while self.written < self.pending.len() {
            if self.console_gone {
                self.report.dropped_bytes += (self.pending.len() - self.written) as u64;
                break;
            }
            match self.console.write(&self.pending[self.written..]) {
                Ok(count) => {
                    self.written += count;
                    self.report.bytes += count as u64;
                    if let Some(finish) = &mut self.finishing {
                        finish.give_up = Instant::now().checked_add(finish.patience);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The reader has gone (EPIPE), the disk is full: the files go on.
                Err(_) => self.console_gone = true,
            }
        }
        self.pending.clear();
        self.written = 0;
        true
    }

    /// Ends the tail; what was not copied is counted.
    pub(super) fn report(mut self) -> TailReport {
        self.report.dropped_bytes += (self.pending.len() - self.written) as u64;
        for stream in &self.streams {
            let size = rustix::fs::fstat(&stream.file).map_or(0, |stat| stat.st_size.cast_unsigned());
            self.report.dropped_bytes += size.saturating_sub(stream.offset);
        }
        self.report
    }
}

/// Reads until `buffer` is full or the file ends. An error reads as the end: there is nothing to copy.
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
