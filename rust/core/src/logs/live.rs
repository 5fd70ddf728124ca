//! Lines of a stream on a terminal, where progress bars are redrawn in place.
//!
//! A program that redraws a line writes a carriage return and the new text. On a terminal the new text replaces the text before the
//! carriage return, and only the newest text is written. On other consoles a carriage return ends a line.

use memchr::memchr2;

use super::lines::{Formatted, LineFormat, MAX_LINE, ShownPart};

/// Upper bound of the text of a progress bar in bytes.
const MAX_BAR: usize = 4096;

/// Erases the line of the cursor and moves the cursor to its start.
const ERASE_LINE: &[u8] = b"\r\x1b[K";
/// Text that is longer than the width of the terminal is cut off. A terminal cannot erase a line that continues in the next row.
const WRAP_OFF: &[u8] = b"\x1b[?7l";
const WRAP_ON: &[u8] = b"\x1b[?7h";

/// The line that a stream redraws.
#[derive(Debug, Default)]
pub(super) struct LiveLine {
    /// The text before the last carriage return. Empty if the line has none.
    bar: Vec<u8>,
    /// The console does not show the newest text.
    is_hidden: bool,
    /// The unfinished line of this stream on the console was replaced.
    is_stale: bool,
}

impl LiveLine {
    /// Appends the complete lines of `chunk` to `out`, as [`LineFormat::format`] does. Consumes all bytes up to the last line end or
    /// carriage return.
    pub(super) fn format(
        &mut self,
        format: &LineFormat,
        chunk: &[u8],
        is_final: bool,
        shown: ShownPart,
        out: &mut Vec<u8>,
    ) -> Formatted {
        let (mut done, mut shown, mut rest) = (Formatted::default(), shown, chunk);
        loop {
            match memchr2(b'\n', b'\r', rest) {
                Some(end) => {
                    let (text, is_bar) = (&rest[..end], rest[end] == b'\r' && rest.get(end + 1) != Some(&b'\n'));
                    let end_length = if rest[end] == b'\r' && !is_bar { 2 } else { 1 };
                    if is_bar {
                        self.replace(text, &mut shown);
                    } else {
                        self.write(format, text, &mut shown, &mut done, out);
                    }
                    rest = &rest[end + end_length..];
                }
                None if rest.len() >= MAX_LINE => {
                    self.write(format, &rest[..MAX_LINE], &mut shown, &mut done, out);
                    done.broken += 1;
                    rest = &rest[MAX_LINE..];
                }
                None => break,
            }
        }
        if is_final && (!rest.is_empty() || !self.bar.is_empty()) {
            self.write(format, rest, &mut shown, &mut done, out);
            rest = &[];
        }
        done.consumed = chunk.len() - rest.len();
        done
    }

    /// A carriage return follows `text`.
    fn replace(&mut self, text: &[u8], shown: &mut ShownPart) {
        self.is_stale |= std::mem::take(&mut shown.bytes) > 0;
        if !text.is_empty() {
            self.is_stale |= !self.bar.is_empty() && !self.is_hidden;
            self.bar.clear();
            self.bar.extend_from_slice(&text[..text.len().min(MAX_BAR)]);
            self.is_hidden = true;
        }
    }

    /// Writes a complete line. If `text` is empty, the line is the bar.
    fn write(
        &mut self,
        format: &LineFormat,
        text: &[u8],
        shown: &mut ShownPart,
        done: &mut Formatted,
        out: &mut Vec<u8>,
    ) {
        let bar = std::mem::take(&mut self.bar);
        let (is_stale, is_hidden) = (std::mem::take(&mut self.is_stale), std::mem::take(&mut self.is_hidden));
        if (bar.is_empty() && !is_stale) || (shown.bytes > 0 && shown.is_last) {
            return format.write(text, shown, done, out); // continues the unfinished line
        }
        let is_bar = text.is_empty() && !bar.is_empty();
        let is_last = std::mem::take(shown).is_last;
        done.lines += 1;
        if is_bar && !is_hidden && !is_stale {
            if is_last {
                out.push(b'\n');
            }
            return;
        }
        if is_last {
            out.extend_from_slice(ERASE_LINE);
        }
        format.format_partial(if is_bar { &bar } else { text }, ShownPart::default(), out);
        out.push(b'\n');
    }

    /// Whether the console does not show the newest text of a bar.
    pub(super) fn is_hidden(&self) -> bool {
        self.is_hidden
    }

    /// Appends the newest text of the unfinished line: `rest`, or the bar.
    pub(super) fn draw(&mut self, format: &LineFormat, rest: &[u8], shown: ShownPart, out: &mut Vec<u8>) {
        let is_bar = !self.bar.is_empty() || self.is_stale;
        if !is_bar || (shown.bytes > 0 && shown.is_last) {
            return format.format_partial(rest, shown, out);
        }
        if shown.is_last {
            out.extend_from_slice(ERASE_LINE);
        }
        out.extend_from_slice(WRAP_OFF);
        format.format_partial(if rest.is_empty() { &self.bar } else { rest }, ShownPart::default(), out);
        out.extend_from_slice(WRAP_ON);
        (self.is_hidden, self.is_stale) = (false, false);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A stream and its console. The console shows the newest text after each chunk, as after the delay of unfinished lines.
    #[derive(Default)]
    struct Stream {
        live: LiveLine,
        rest: Vec<u8>,
        shown_bytes: usize,
        is_last: bool,
        console: Vec<u8>,
    }

    impl Stream {
        fn chunk(&mut self, text: &[u8], is_final: bool, draws: bool) {
            let format = LineFormat::new(b"[0]:", &[]);
            self.rest.extend_from_slice(text);
            let shown = ShownPart { bytes: self.shown_bytes, is_last: self.is_last };
            let before = self.console.len();
            let done = self.live.format(&format, &self.rest, is_final, shown, &mut self.console);
            self.rest.drain(..done.consumed);
            if self.console.len() > before {
                self.is_last = false;
            }
            if done.consumed > 0 {
                self.shown_bytes = 0;
            }
            if draws && (self.rest.len() > self.shown_bytes || self.live.is_hidden()) {
                let shown = ShownPart { bytes: self.shown_bytes, is_last: self.is_last };
                self.live.draw(&format, &self.rest, shown, &mut self.console);
                self.shown_bytes = self.rest.len();
                self.is_last = true;
            }
        }

        /// The rows of a terminal that shows the console.
        fn screen(&self) -> Vec<String> {
            let text = String::from_utf8_lossy(&self.console).replace("\x1b[?7l", "").replace("\x1b[?7h", "");
            let rows = text.split('\n');
            rows.map(|row| row.rsplit("\r\x1b[K").next().unwrap_or_default().to_owned()).collect()
        }
    }

    fn screen_of(chunks: &[&str]) -> Vec<String> {
        let mut stream = Stream::default();
        for chunk in chunks {
            stream.chunk(chunk.as_bytes(), false, true);
        }
        stream.chunk(b"", true, false);
        stream.screen()
    }

    #[test]
    fn a_bar_is_redrawn_in_its_row() {
        let carriage_first = ["start\n", "\r10%", "\r20%\r30%", "\r100%\n", "end\n"];
        assert_eq!(screen_of(&carriage_first), ["[0]:start", "[0]:100%", "[0]:end", ""]);
        let carriage_last = ["10%\r", "20%\r30%\r", "100%\r", "\n", "end\n"];
        assert_eq!(screen_of(&carriage_last), ["[0]:100%", "[0]:end", ""]);
        assert_eq!(screen_of(&["\r10%", "\r20%"]), ["[0]:20%", ""], "the last state stays");
        assert_eq!(screen_of(&["10%\r", "20%\r"]), ["[0]:20%", ""]);
    }

    #[test]
    fn a_prompt_is_continued_and_may_become_a_bar() {
        assert_eq!(screen_of(&["(Pdb) ", "n\n"]), ["[0]:(Pdb) n", ""]);
        assert_eq!(screen_of(&["train: ", "\r10%", "\r20%\n"]), ["[0]:20%", ""]);
        assert_eq!(screen_of(&["a\r\nb\r", "\nc\n"]), ["[0]:a", "[0]:b", "[0]:c", ""]);
    }

    #[test]
    fn a_bar_begins_a_new_row_after_other_output() {
        let mut stream = Stream::default();
        stream.chunk(b"\r10%", false, true);
        stream.console.extend_from_slice(b"\n[1]:other\n");
        stream.is_last = false;
        stream.chunk(b"\r20%", false, true);
        stream.chunk(b"\r30%\n", false, true);
        assert_eq!(stream.screen(), ["[0]:10%", "[1]:other", "[0]:30%", ""]);
    }

    proptest! {
        /// Whatever the boundaries of the chunks, the rows are the lines, each with the text after its last carriage return.
        #[test]
        fn rows_are_lines(text in "[ab\r\n]{0,60}", cuts in proptest::collection::vec((0usize..60, any::<bool>()), 0..8)) {
            let mut cuts: Vec<(usize, bool)> = cuts.into_iter().map(|(cut, draws)| (cut.min(text.len()), draws)).collect();
            cuts.sort_unstable();
            let (mut stream, mut start) = (Stream::default(), 0);
            for (cut, draws) in cuts {
                stream.chunk(&text.as_bytes()[start..cut], false, draws);
                start = cut;
            }
            stream.chunk(&text.as_bytes()[start..], true, false);
            let newest = |line: &str| line.split('\r').rfind(|part| !part.is_empty()).unwrap_or_default().to_owned();
            let mut expected: Vec<String> = text.split('\n').map(|line| format!("[0]:{}", newest(line))).collect();
            if expected.last().is_some_and(|line| line == "[0]:") {
                expected.pop();
            }
            expected.push(String::new());
            prop_assert_eq!(stream.screen(), expected);
        }
    }
}
