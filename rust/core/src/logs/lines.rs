//! Splitting bytes into whole lines.

use memchr::memmem::Finder;
use memchr::{memchr, memchr2};

use super::format::{Prefix, escape_json};

/// Maximum length of a line in bytes. Longer lines are broken up, which bounds the memory use for output without line ends.
pub const MAX_LINE: usize = 1 << 20;

/// Format of the lines of one stream on the console.
#[derive(Clone, Debug)]
pub struct LineFormat {
    prefix: Prefix,
    /// The text after a line that is the content of a JSON string; `None` for plain text.
    json_end: Option<&'static [u8]>,
    filters: Vec<Finder<'static>>,
}

/// The part of a chunk's first line that is already on the console.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShownPart {
    /// Length in bytes.
    pub bytes: usize,
    /// Nothing was written to the console after it: the rest of the line can follow directly.
    pub is_last: bool,
}

/// Outcome of [`LineFormat::format`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Formatted {
    /// Number of processed bytes of the chunk.
    pub consumed: usize,
    /// Number of lines written.
    pub lines: u64,
    /// Number of breaks in lines that are longer than [`MAX_LINE`].
    pub broken: u64,
}

impl LineFormat {
    /// Every line gets `prefix`, with the time of the line for `${time}`. If `filters` is not empty, only lines that contain one of its
    /// strings are kept.
    #[must_use]
    pub fn new(prefix: &[u8], filters: &[Vec<u8>]) -> Self {
        Self {
            prefix: Prefix::new(prefix),
            json_end: None,
            filters: filters.iter().map(|needle| Finder::new(needle).into_owned()).collect(),
        }
    }

    /// Every line is the last string of a JSON object that begins with the prefix.
    #[must_use]
    pub fn into_json(self) -> Self {
        Self { json_end: Some(b"\"}"), ..self }
    }

    /// Sets the time of the next lines.
    pub fn set_time(&mut self, realtime_ns: impl FnOnce() -> u64) {
        if self.prefix.has_time() {
            self.prefix.set_time(realtime_ns());
        }
    }

    /// Appends the whole lines of `chunk` to `out`. Lines end in `\n`, `\r\n` or `\r`; the output has `\n`.
    ///
    /// The bytes after the last line end are not consumed, unless `is_final` says that no chunk follows. `after_cr` is state between the
    /// chunks of a stream: whether the previous chunk ended in `\r`, so that a `\n` at the start of this one belongs to the same line end.
    /// `shown` is the part of the first line that is already on the console.
    pub fn format(
        &self,
        chunk: &[u8],
        is_final: bool,
        after_cr: &mut bool,
        shown: ShownPart,
        out: &mut Vec<u8>,
    ) -> Formatted {
        let (mut done, mut shown) = (Formatted::default(), shown);
        let mut rest = chunk;
        if *after_cr && !rest.is_empty() {
            *after_cr = false;
            if rest[0] == b'\n' {
                rest = &rest[1..];
            }
        }
        // Most logs contain no carriage return. Searching for one kind of line end is faster.
        let has_cr = memchr(b'\r', rest).is_some();
        loop {
            let end = if has_cr { memchr2(b'\n', b'\r', rest) } else { memchr(b'\n', rest) };
            match end {
                Some(end) => {
                    self.write(&rest[..end], &mut shown, &mut done, out);
                    let is_cr = rest[end] == b'\r';
                    rest = &rest[end + 1..];
                    if is_cr {
                        match rest.first() {
                            Some(b'\n') => rest = &rest[1..],
                            Some(_) => {}
                            None => *after_cr = true,
                        }
                    }
                }
                None if rest.len() >= MAX_LINE => {
                    self.write(&rest[..MAX_LINE], &mut shown, &mut done, out);
                    done.broken += 1;
                    rest = &rest[MAX_LINE..];
                }
                None => break,
            }
        }
        if is_final && !rest.is_empty() {
            self.write(rest, &mut shown, &mut done, out);
            rest = &[];
        }
        done.consumed = chunk.len() - rest.len();
        done
    }

    /// Appends the new bytes of a line that has no end yet.
    pub fn format_partial(&self, line: &[u8], shown: ShownPart, out: &mut Vec<u8>) {
        if !shown.is_last {
            out.extend_from_slice(self.prefix.text());
        }
        out.extend_from_slice(&line[shown.bytes.min(line.len())..]);
    }

    /// Whether unfinished lines may be shown. A filter and a JSON object need the whole line.
    #[must_use]
    pub fn shows_partial_lines(&self) -> bool {
        self.filters.is_empty() && self.json_end.is_none()
    }

    pub(super) fn write(&self, line: &[u8], shown: &mut ShownPart, done: &mut Formatted, out: &mut Vec<u8>) {
        let shown = std::mem::take(shown);
        if !self.filters.is_empty() && !self.filters.iter().any(|needle| needle.find(line).is_some()) {
            return;
        }
        done.lines += 1;
        if shown.bytes > 0 && shown.bytes >= line.len() && !shown.is_last {
            return; // the whole line was shown, and other output followed it
        }
        out.reserve(self.prefix.text().len() + line.len() + 3);
        if let Some(end) = self.json_end {
            out.extend_from_slice(self.prefix.text());
            escape_json(line, out);
            out.extend_from_slice(end);
        } else {
            self.format_partial(line, shown, out);
        }
        out.push(b'\n');
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all_at_once(format: &LineFormat, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        format.format(bytes, true, &mut false, ShownPart::default(), &mut out);
        out
    }

    #[test]
    fn each_kind_of_line_end_ends_one_line() {
        let format = LineFormat::new(b"[r]:", &[]);
        assert_eq!(all_at_once(&format, b"a\nb\r\nc\rd"), b"[r]:a\n[r]:b\n[r]:c\n[r]:d\n");
        assert_eq!(all_at_once(&format, b"\n\r\n"), b"[r]:\n[r]:\n");
    }

    #[test]
    fn an_unfinished_line_is_not_consumed() {
        let format = LineFormat::new(b"", &[]);
        let mut out = Vec::new();
        let done = format.format(b"whole\nhal", false, &mut false, ShownPart::default(), &mut out);
        assert_eq!((out.as_slice(), done.consumed), (b"whole\n".as_slice(), 6));
    }

    #[test]
    fn a_line_without_end_is_broken_up() {
        let format = LineFormat::new(b"", &[]);
        let mut out = Vec::new();
        let done = format.format(&vec![b'x'; MAX_LINE + 3], false, &mut false, ShownPart::default(), &mut out);
        assert_eq!((done.consumed, done.broken, out.len()), (MAX_LINE, 1, MAX_LINE + 1));
    }

    #[test]
    fn filters_keep_lines_with_any_of_the_strings() {
        let format = LineFormat::new(b">", &[b"apple".to_vec(), b"pear".to_vec()]);
        assert_eq!(all_at_once(&format, b"an apple\nplum\npears\n"), b">an apple\n>pears\n");
    }

    #[test]
    fn the_shown_part_of_a_line_is_not_repeated() {
        let format = LineFormat::new(b"[r]:", &[]);
        let whole = |shown| {
            let mut out = Vec::new();
            format.format(b"(Pdb) n\nnext\n", false, &mut false, shown, &mut out);
            String::from_utf8(out).expect("text")
        };
        assert_eq!(whole(ShownPart { bytes: 6, is_last: true }), "n\n[r]:next\n");
        assert_eq!(whole(ShownPart { bytes: 6, is_last: false }), "[r]:n\n[r]:next\n");
        assert_eq!(whole(ShownPart { bytes: 7, is_last: true }), "\n[r]:next\n");
        assert_eq!(whole(ShownPart { bytes: 7, is_last: false }), "[r]:next\n");
    }

    #[test]
    fn a_json_line_is_one_object() {
        let mut format = LineFormat::new(br#"{"rank":0,"time":"${time}","message":""#, &[]).into_json();
        format.set_time(|| 1_000_000);
        let lines = all_at_once(&format, b"loss: \"1\"\r\n\n\xff\xfe\tpart");
        let lines: Vec<serde_json::Value> = lines
            .split_inclusive(|byte| *byte == b'\n')
            .map(|line| serde_json::from_slice(line).expect("JSON"))
            .collect();
        let messages: Vec<&str> = lines.iter().filter_map(|line| line["message"].as_str()).collect();
        assert_eq!(messages, ["loss: \"1\"", "", "\u{fffd}\u{fffd}\tpart"]);
        assert_eq!(lines[0]["time"], "1970-01-01T00:00:00.001Z");
    }

    proptest! {
        /// The output does not depend on the boundaries of the chunks.
        #[test]
        fn chunking_does_not_change_the_output(bytes in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'\r'), Just(b'a'), any::<u8>()], 0..200), cuts in proptest::collection::vec(0usize..200, 0..8), is_json: bool) {
            let format = LineFormat::new(b"[0]:\"", &[]);
            let format = if is_json { format.into_json() } else { format };
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).chain([bytes.len()]).collect();
            cuts.sort_unstable();
            let (mut start, mut after_cr, mut out) = (0, false, Vec::new());
            for cut in cuts {
                start += format.format(&bytes[start..cut], false, &mut after_cr, ShownPart::default(), &mut out).consumed;
            }
            format.format(&bytes[start..], true, &mut after_cr, ShownPart::default(), &mut out);
            prop_assert_eq!(out, all_at_once(&format, &bytes));
        }
    }
}
