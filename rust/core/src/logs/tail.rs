//! One tail: some growing files, one console.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

use super::lines::{LineFormat, MAX_LINE, Opening};
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
    /// Lines are shown only when they are whole, however long that takes.
    pub whole_lines_only: bool,
}

/// What a finished tail has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TailReport {
    /// Lines written to the console.
    pub lines: u64,
    /// Bytes written to the console, prefixes included.
    pub bytes: u64,
    /// Lines broken up because they were too long.
    pub broken_lines: u64,
    /// Bytes of the files that never reached the console.
    pub dropped_bytes: u64,
    /// Why the console takes nothing any more, if it said so: its reader has closed it, the disk is full.
    pub console_error: Option<String>,
    /// Files that could not be read, and why.
    pub unread: Vec<(PathBuf, String)>,
}

/// How far a call to [`FileTail::pump`] came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pumped {
    /// Everything there is was written.
    Idle,
    /// There is more to do.
    More,
    /// The console takes nothing now.
    ConsoleFull,
}

/// The stream whose unfinished line is the last on a console: its tail, and its place there.
pub(super) type OpenLine = Option<(u64, usize)>;

#[derive(Debug)]
struct LogStream {
    path: PathBuf,
    /// `Err` says why there is none: it is tried again.
    file: Result<OwnedFd, io::Error>,
    format: LineFormat,
    offset: u64,
    after_return: bool,
    dirty: bool,
    /// Nothing tells when the file grows: it is looked at from time to time.
    is_polled: bool,
    /// Bytes of the line at `offset`, which has no end yet, that are on the console.
    shown: usize,
    /// When the rest of it is shown.
    piece_due: Option<Instant>,
}

impl LogStream {
    fn open(path: &Path, format: LineFormat) -> Self {
        Self {
            path: path.to_owned(),
            file: open_log(path),
            format,
            offset: 0,
            after_return: false,
            dirty: true,
            is_polled: false,
            shown: 0,
            piece_due: None,
        }
    }
}

fn open_log(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC, Mode::from_raw_mode(0o666))?)
}

/// An unfinished line is shown this long after its first byte that is not.
const PIECE_AGE: Duration = Duration::from_millis(100);

/// Bytes read from one stream before the next has its turn; grows up to [`MAX_LINE`] for a line that does not fit.
const CHUNK: usize = 256 * 1024;

/// What a console is, whoever has opened it: device and number of its file.
pub(super) type ConsoleKey = (u64, u64);

#[derive(Debug)]
pub(super) struct FileTail {
    console: Console,
    console_key: ConsoleKey,
    streams: Vec<LogStream>,
    whole_lines_only: bool,
    pending: Vec<u8>,
    written: usize,
    report: TailReport,
    pub(super) finishing: Option<Finish>,
}

/// A tail on its last way: to the end of the files, or until the console has taken nothing for `patience`.
#[derive(Debug)]
pub(super) struct Finish {
    pub(super) patience: Duration,
    pub(super) give_up: Option<Instant>,
}

impl FileTail {
    pub(super) fn open(spec: &TailSpec) -> Result<Self, Error> {
        let console = Console::new(spec.console.as_fd()).map_err(|source| Error::os("open", "the console", source))?;
        let console_key = rustix::fs::fstat(&console).map_or((0, 0), |stat| (stat.st_dev, stat.st_ino));
        let streams = spec.files.iter();
        let streams = streams
            .map(|(path, prefix)| LogStream::open(path, LineFormat::new(prefix, &spec.only_lines_with)))
            .collect();
        Ok(Self {
            console,
            console_key,
            streams,
            whole_lines_only: spec.whole_lines_only,
            pending: Vec::new(),
            written: 0,
            report: TailReport::default(),
            finishing: None,
        })
    }

    pub(super) fn console_key(&self) -> ConsoleKey {
        self.console_key
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

    /// Nothing will tell when the file of a stream grows.
    pub(super) fn poll(&mut self, stream: usize) {
        self.streams[stream].is_polled = true;
    }

    /// Looks at the files of which nothing tells when they grow; `false` if there are none.
    pub(super) fn mark_polled(&mut self) -> bool {
        let mut has_polled = false;
        for stream in self.streams.iter_mut().filter(|stream| stream.is_polled || stream.file.is_err()) {
            stream.dirty = true;
            has_polled = true;
        }
        has_polled
    }

    /// When the next unfinished line is shown.
    pub(super) fn next_piece(&self) -> Option<Instant> {
        self.streams.iter().filter_map(|stream| stream.piece_due).min()
    }

    /// Copies one chunk of each stream that has something new. `open` is the console's last line, if that has no end.
    pub(super) fn pump(&mut self, id: u64, now: Instant, open: &mut OpenLine, scratch: &mut Vec<u8>) -> Pumped {
        if !self.flush() {
            return Pumped::ConsoleFull;
        }
        let last = self.finishing.is_some();
        for index in 0..self.streams.len() {
            let stream = &self.streams[index];
            if stream.dirty {
                self.read_chunk((id, index), now, last, open, scratch);
            } else if stream.piece_due.is_some_and(|due| now >= due) {
                self.show_piece((id, index), open, scratch);
            } else {
                continue;
            }
            if !self.flush() {
                return Pumped::ConsoleFull;
            }
        }
        if self.streams.iter().any(|stream| stream.dirty) { Pumped::More } else { Pumped::Idle }
    }

    fn read_chunk(&mut self, at: (u64, usize), now: Instant, last: bool, open: &mut OpenLine, scratch: &mut Vec<u8>) {
        let stream = &mut self.streams[at.1];
        if stream.file.is_err() {
            stream.file = open_log(&stream.path);
        }
        let Ok(file) = &stream.file else {
            stream.dirty = false;
            return;
        };
        let mut size = CHUNK;
        loop {
            scratch.resize(size, 0);
            let read = read_full(file, scratch, stream.offset);
            let at_end = read < size;
            if read == 0 && rustix::fs::fstat(file).is_ok_and(|stat| stat.st_size.cast_unsigned() < stream.offset) {
                // Truncated under us: what is written from now on starts at the beginning.
                (stream.offset, stream.shown) = (0, 0);
            }
            let in_place = *open == Some(at);
            let before = self.pending.len();
            if open.is_some() && !in_place {
                self.pending.push(b'\n');
            }
            let begin = self.pending.len();
            let opening = Opening { shown: stream.shown, in_place };
            let (after_return, is_last) = (&mut stream.after_return, last && at_end);
            let done = stream.format.format(&scratch[..read], is_last, after_return, opening, &mut self.pending);
            if self.pending.len() == begin {
                self.pending.truncate(before);
            } else {
                *open = None;
            }
            if done.consumed > 0 {
                stream.shown = 0;
            }
            stream.offset += done.consumed as u64;
            stream.dirty = !at_end;
            self.report.lines += done.lines;
            self.report.broken_lines += done.broken;
            if at_end || done.consumed > 0 || size > MAX_LINE {
                let is_hidden = read - done.consumed > stream.shown;
                let may_show = at_end && is_hidden && !self.whole_lines_only && stream.format.shows_pieces();
                stream.piece_due = if may_show { stream.piece_due.or(now.checked_add(PIECE_AGE)) } else { None };
                return;
            }
            size *= 2;
        }
    }

    /// Shows what there is of a line that has no end yet.
    fn show_piece(&mut self, at: (u64, usize), open: &mut OpenLine, scratch: &mut Vec<u8>) {
        let stream = &mut self.streams[at.1];
        stream.piece_due = None;
        let Ok(file) = &stream.file else { return };
        scratch.resize(MAX_LINE, 0);
        let read = read_full(file, scratch, stream.offset);
        let whole = memchr::memchr2(b'\n', b'\r', &scratch[..read]);
        if read <= stream.shown || whole.is_some() {
            return; // its end has come meanwhile: that is reported, too
        }
        let in_place = *open == Some(at);
        if open.is_some() && !in_place {
            self.pending.push(b'\n');
        }
        let opening = Opening { shown: stream.shown, in_place };
        stream.format.format_piece(&scratch[..read], opening, &mut self.pending);
        stream.shown = read;
        *open = Some(at);
    }

    /// Writes what is pending. `false` if the console takes nothing now.
    fn flush(&mut self) -> bool {
        while self.written < self.pending.len() {
            if self.report.console_error.is_some() {
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
                Err(error) => self.report.console_error = Some(error.to_string()),
            }
        }
        self.pending.clear();
        self.written = 0;
        true
    }

    /// Ends the tail; what was not copied is counted.
    pub(super) fn report(mut self) -> TailReport {
        self.report.dropped_bytes += (self.pending.len() - self.written) as u64;
        for stream in self.streams {
            match stream.file {
                Ok(file) => {
                    let size = rustix::fs::fstat(&file).map_or(0, |stat| stat.st_size.cast_unsigned());
                    let shown = stream.offset + stream.shown as u64;
                    self.report.dropped_bytes += size.saturating_sub(shown);
                }
                Err(error) => self.report.unread.push((stream.path, error.to_string())),
            }
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
