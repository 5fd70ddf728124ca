//! One tail: growing files and their console.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::lines::{LineFormat, MAX_LINE, ShownPart};
use super::live::LiveLine;
use super::log_file::{LogFile, RotatedFile, Rotations, Unread};
use crate::error::Error;
use crate::sys::clock::realtime_ns;
use crate::sys::console::Console;

/// The files to follow and their destination.
#[derive(Debug)]
pub struct TailSpec {
    /// Files and the prefix of their lines, with the time of the line for `${time}`. Missing files are created.
    pub files: Vec<(PathBuf, Vec<u8>)>,
    /// Destination of the lines.
    pub console: OwnedFd,
    /// If not empty, only lines that contain one of these strings are copied.
    pub only_lines_with: Vec<Vec<u8>>,
    /// Never show an unfinished line.
    pub whole_lines_only: bool,
    /// Each line is a JSON object: the prefix begins it, and its last string is the content of the line.
    pub is_json: bool,
}

/// Statistics and errors of a finished tail.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TailReport {
    /// Lines written to the console.
    pub lines: u64,
    /// Bytes written to the console, prefixes included.
    pub bytes: u64,
    /// Number of breaks in lines that are longer than [`MAX_LINE`].
    pub broken_lines: u64,
    /// Bytes of the files that were not written to the console.
    pub dropped_bytes: u64,
    /// The error that ended writing to the console, e.g. its reader closed it or the disk is full.
    pub console_error: Option<String>,
    /// Files that could not be opened or read to their end, each with the reason.
    pub unread: Vec<(PathBuf, String)>,
}

/// Outcome of [`FileTail::pump`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pumped {
    /// All available bytes were written.
    Idle,
    /// More bytes are available.
    More,
    /// A write to the console would block.
    ConsoleFull,
}

/// The stream whose unfinished line is the last output on a console: the id of its tail and its index in it.
pub(super) type OpenLine = Option<(u64, usize)>;

#[derive(Debug)]
struct LogStream {
    path: PathBuf,
    rotation: Option<Arc<RotatedFile>>,
    /// `Err` if it could not be opened. Opening is retried.
    file: Result<LogFile, io::Error>,
    format: LineFormat,
    offset: u64,
    after_cr: bool,
    unread: Unread,
    /// There is no inotify watch: the file is polled.
    is_polled: bool,
    /// Number of bytes of the unfinished line at `offset` that are on the console.
    shown_bytes: usize,
    /// When the rest of the unfinished line is shown.
    partial_due: Option<Instant>,
    /// Progress bars are redrawn in place.
    live: Option<LiveLine>,
}

impl LogStream {
    fn open(path: &Path, format: LineFormat, is_live: bool, rotations: &Rotations) -> Self {
        let rotation = rotations.get(path).cloned();
        let file = LogFile::open(path, rotation.as_ref());
        Self {
            live: (is_live && format.shows_partial_lines()).then(LiveLine::default),
            path: path.to_owned(),
            rotation,
            offset: file.as_ref().map_or(0, LogFile::base),
            file,
            format,
            after_cr: false,
            unread: Unread::Yes,
            is_polled: false,
            shown_bytes: 0,
            partial_due: None,
        }
    }
}

/// Time for which an unfinished line is not shown, from its first hidden byte on.
const PARTIAL_LINE_DELAY: Duration = Duration::from_millis(100);

/// The same for a progress bar if other output has followed its last row on the console.
const BAR_ROW_DELAY: Duration = Duration::from_secs(1);

/// Bytes read from one stream before the next is served. Grows up to [`MAX_LINE`] for a line that does not fit.
pub(super) const CHUNK: usize = 256 * 1024;

/// Identifies a console independent of its descriptor: device and inode of its file.
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

/// State of a tail that copies the rest of its files and then ends. It gives up when the console has been blocked for `timeout`.
#[derive(Debug)]
pub(super) struct Finish {
    pub(super) timeout: Duration,
    pub(super) deadline: Option<Instant>,
}

impl FileTail {
    pub(super) fn open(spec: &TailSpec, rotations: &Rotations) -> Result<Self, Error> {
        let console = Console::new(spec.console.as_fd()).map_err(|source| Error::os("open", "the console", source))?;
        let console_key = rustix::fs::fstat(&console).map_or((0, 0), |stat| (stat.st_dev, stat.st_ino));
        let is_live = spec.console.is_terminal() && !spec.whole_lines_only;
        let format_of = |prefix: &[u8]| {
            let format = LineFormat::new(prefix, &spec.only_lines_with);
            if spec.is_json { format.into_json() } else { format }
        };
        let streams = spec
            .files
            .iter()
            .map(|(path, prefix)| LogStream::open(path, format_of(prefix), is_live, rotations))
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

    /// Notes that the file of a stream has grown.
    pub(super) fn mark_unread(&mut self, stream: usize) {
        self.streams[stream].unread = Unread::Yes;
    }

    pub(super) fn mark_all_unread(&mut self) {
        for stream in &mut self.streams {
            stream.unread = Unread::Yes;
        }
    }

    /// Makes a stream polled, because its file has no watch.
    pub(super) fn set_polled(&mut self, stream: usize) {
        self.streams[stream].is_polled = true;
    }

    /// Marks the polled streams, and those whose file could not be opened or read. `false` if there are none.
    pub(super) fn mark_polled_unread(&mut self) -> bool {
        let mut has_polled = false;
        let is_polled =
            |stream: &&mut LogStream| stream.is_polled || stream.unread == Unread::Refused || stream.file.is_err();
        for stream in self.streams.iter_mut().filter(is_polled) {
            stream.unread = Unread::Yes;
            has_polled = true;
        }
        has_polled
    }

    /// Whether bytes are removed from a file, so its rest cannot be read now.
    pub(super) fn is_refused(&self) -> bool {
        self.streams.iter().any(|stream| stream.unread == Unread::Refused)
    }

    /// When the next unfinished line is due to be shown.
    pub(super) fn next_partial(&self) -> Option<Instant> {
        self.streams.iter().filter_map(|stream| stream.partial_due).min()
    }

    /// Copies one chunk of each dirty stream. `open` is the stream whose unfinished line is the last on the console.
    pub(super) fn pump(&mut self, id: u64, now: Instant, open: &mut OpenLine, scratch: &mut Vec<u8>) -> Pumped {
        if !self.flush() {
            return Pumped::ConsoleFull;
        }
        let is_final = self.finishing.is_some();
        for index in 0..self.streams.len() {
            let stream = &self.streams[index];
            if stream.unread == Unread::Yes {
                self.read_chunk((id, index), now, is_final, open, scratch);
            } else if stream.partial_due.is_some_and(|due| now >= due) {
                self.show_partial((id, index), open, scratch);
            } else {
                continue;
            }
            if !self.flush() {
                return Pumped::ConsoleFull;
            }
        }
        if self.streams.iter().any(|stream| stream.unread == Unread::Yes) { Pumped::More } else { Pumped::Idle }
    }

    fn read_chunk(
        &mut self,
        key: (u64, usize),
        now: Instant,
        is_final: bool,
        open: &mut OpenLine,
        scratch: &mut Vec<u8>,
    ) {
        let stream = &mut self.streams[key.1];
        if stream.file.is_err() {
            stream.file = LogFile::open(&stream.path, stream.rotation.as_ref());
            stream.offset = stream.file.as_ref().map_or(0, LogFile::base);
        }
        let Ok(file) = &stream.file else {
            stream.unread = Unread::No;
            return;
        };
        stream.format.set_time(realtime_ns);
        let mut size = CHUNK;
        loop {
            scratch.resize(size, 0);
            let Some(read) = file.read(scratch, stream.offset) else {
                stream.unread = Unread::Refused;
                return;
            };
            let at_end = read < size;
            if read == 0 && file.end().is_some_and(|end| end < stream.offset) {
                // The file was truncated: continue at its beginning, which may have lines already.
                (stream.offset, stream.shown_bytes) = (file.base(), 0);
                continue;
            }
            let is_last = *open == Some(key);
            let before = self.pending.len();
            if open.is_some() && !is_last {
                self.pending.push(b'\n');
            }
            let begin = self.pending.len();
            let shown = ShownPart { bytes: stream.shown_bytes, is_last };
            let (after_cr, is_final) = (&mut stream.after_cr, is_final && at_end);
            let (text, out) = (&scratch[..read], &mut self.pending);
            let done = match &mut stream.live {
                Some(live) => live.format(&stream.format, text, is_final, shown, out),
                None => stream.format.format(text, is_final, after_cr, shown, out),
            };
            if self.pending.len() == begin {
                self.pending.truncate(before);
            } else {
                *open = None;
            }
            if done.consumed > 0 {
                stream.shown_bytes = 0;
            }
            stream.offset += done.consumed as u64;
            file.publish(stream.offset);
            stream.unread = if at_end { Unread::No } else { Unread::Yes };
            self.report.lines += done.lines;
            self.report.broken_lines += done.broken;
            if at_end || done.consumed > 0 || size > MAX_LINE {
                let has_hidden_bar = stream.live.as_ref().is_some_and(LiveLine::is_hidden);
                let has_hidden = has_hidden_bar || read - done.consumed > stream.shown_bytes;
                let may_show = at_end && has_hidden && !self.whole_lines_only && stream.format.shows_partial_lines();
                // A bar that is not the last output begins a new row each time.
                let begins_row = has_hidden_bar && open.is_some() && *open != Some(key);
                let delay = if begins_row { BAR_ROW_DELAY } else { PARTIAL_LINE_DELAY };
                let due = stream.partial_due.or(now.checked_add(delay));
                stream.partial_due = if may_show { due } else { None };
                return;
            }
            size *= 2;
        }
    }

    /// Shows the unfinished line of a stream.
    fn show_partial(&mut self, key: (u64, usize), open: &mut OpenLine, scratch: &mut Vec<u8>) {
        let stream = &mut self.streams[key.1];
        stream.partial_due = None;
        let Ok(file) = &stream.file else { return };
        scratch.resize(MAX_LINE, 0);
        let Some(read) = file.read(scratch, stream.offset) else { return };
        let line_end = memchr::memchr2(b'\n', b'\r', &scratch[..read]);
        let has_hidden_bar = stream.live.as_ref().is_some_and(LiveLine::is_hidden);
        if (read <= stream.shown_bytes && !has_hidden_bar) || line_end.is_some() {
            return; // nothing is hidden, or the line has ended: a notification leads to `read_chunk`
        }
        let is_last = *open == Some(key);
        if open.is_some() && !is_last {
            self.pending.push(b'\n');
        }
        let shown = ShownPart { bytes: stream.shown_bytes, is_last };
        stream.format.set_time(realtime_ns);
        match &mut stream.live {
            Some(live) => live.draw(&stream.format, &scratch[..read], shown, &mut self.pending),
            None => stream.format.format_partial(&scratch[..read], shown, &mut self.pending),
        }
        stream.shown_bytes = read;
        *open = Some(key);
    }

    /// Writes the pending bytes. `false` if the write would block.
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
                        finish.deadline = Instant::now().checked_add(finish.timeout);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The reader has closed the console (EPIPE) or the disk is full. The log files are not affected.
                Err(error) => self.report.console_error = Some(error.to_string()),
            }
        }
        self.pending.clear();
        self.written = 0;
        true
    }

    /// Ends the tail and counts the bytes that were not copied.
    pub(super) fn report(mut self) -> TailReport {
        self.report.dropped_bytes += (self.pending.len() - self.written) as u64;
        for stream in self.streams {
            match stream.file {
                Ok(_) if stream.unread == Unread::Refused => {
                    self.report.unread.push((stream.path, "its disk has not responded".to_owned()));
                }
                Ok(file) => {
                    let size = file.end().unwrap_or_default();
                    let shown = stream.offset + stream.shown_bytes as u64;
                    self.report.dropped_bytes += size.saturating_sub(shown);
                }
                Err(error) => self.report.unread.push((stream.path, error.to_string())),
            }
        }
        self.report
    }
}
