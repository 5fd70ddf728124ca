//! Cutting bytes into whole lines.

use memchr::memmem::Finder;
use memchr::{memchr, memchr2};

/// A line longer than this is broken up. Bounds the memory of a worker that never ends its line.
pub const MAX_LINE: usize = 1 << 20;

/// How the lines of one stream look on the console.
#[derive(Clone, Debug)]
pub struct LineFormat {
    prefix: Vec<u8>,
    only_with: Vec<Finder<'static>>,
}

/// What is on the console already of the line that a chunk begins with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Opening {
    /// So many bytes of it.
    pub shown: usize,
    /// They are the last on the console: it goes on where they end.
    pub in_place: bool,
}

/// What one call to [`LineFormat::format`] has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Formatted {
    /// Bytes of the chunk that are done with.
    pub consumed: usize,
    /// Lines written.
    pub lines: u64,
    /// Lines that were broken up because they are longer than [`MAX_LINE`].
    pub broken: u64,
}

impl LineFormat {
    /// Every line gets `prefix`. If `only_with` is not empty, lines without any of its strings are left out.
    #[must_use]
    pub fn new(prefix: &[u8], only_with: &[Vec<u8>]) -> Self {
        Self {
            prefix: prefix.to_vec(),
            only_with: only_with.iter().map(|needle| Finder::new(needle).into_owned()).collect(),
        }
    }

    /// Appends the whole lines of `chunk` to `out`. `\n`, `\r\n` and `\r` end a line and come out as `\n`.
    ///
    /// What comes after the last line end is left for the next chunk, unless `last` says that there will be none. `after_return` is the
    /// memory between the chunks of a stream: the former one ended in `\r`, so a `\n` at the start of this one belongs to it. `opening`
    /// says what was shown before its line was whole.
    pub fn format(
        &self,
        chunk: &[u8],
        last: bool,
        after_return: &mut bool,
        opening: Opening,
        out: &mut Vec<u8>,
    ) -> Formatted {
        let (mut done, mut opening) = (Formatted::default(), opening);
        let mut rest = chunk;
        if *after_return && !rest.is_empty() {
            *after_return = false;
            if rest[0] == b'\n' {
                rest = &rest[1..];
            }
        }
        // Most logs hold no carriage return: then one kind of line end is looked for, which is faster.
        let has_returns = memchr(b'\r', rest).is_some();
        loop {
            let end = if has_returns { memchr2(b'\n', b'\r', rest) } else { memchr(b'\n', rest) };
            match end {
                Some(end) => {
                    self.write(&rest[..end], &mut opening, &mut done, out);
                    let returned = rest[end] == b'\r';
                    rest = &rest[end + 1..];
                    if returned {
                        match rest.first() {
                            Some(b'\n') => rest = &rest[1..],
                            Some(_) => {}
                            None => *after_return = true,
                        }
                    }
                }
                None if rest.len() >= MAX_LINE => {
                    self.write(&rest[..MAX_LINE], &mut opening, &mut done, out);
                    done.broken += 1;
                    rest = &rest[MAX_LINE..];
                }
                None => break,
            }
        }
        if last && !rest.is_empty() {
            self.write(rest, &mut opening, &mut done, out);
            rest = &[];
        }
        done.consumed = chunk.len() - rest.len();
        done
    }

    /// Appends what is new of a line that has no end yet.
    pub fn format_piece(&self, piece: &[u8], opening: Opening, out: &mut Vec<u8>) {
        if !opening.in_place {
            out.extend_from_slice(&self.prefix);
        }
        out.extend_from_slice(&piece[opening.shown.min(piece.len())..]);
    }

    /// Whether lines may be shown before they are whole: a filter has to see all of a line.
    #[must_use]
    pub fn shows_pieces(&self) -> bool {
        self.only_with.is_empty()
    }

    fn write(&self, line: &[u8], opening: &mut Opening, done: &mut Formatted, out: &mut Vec<u8>) {
        let Opening { shown, in_place } = std::mem::take(opening);
        if !self.only_with.is_empty() && !self.only_with.iter().any(|needle| needle.find(line).is_some()) {
            return;
        }
        done.lines += 1;
        if shown > 0 && shown >= line.len() && !in_place {
            return; // all of it was shown, and something else after it
        }
        out.reserve(self.prefix.len() + line.len() + 1);
        self.format_piece(line, Opening { shown, in_place }, out);
        out.push(b'\n');
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all_at_once(format: &LineFormat, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        format.format(bytes, true, &mut false, Opening::default(), &mut out);
        out
    }

    #[test]
    fn each_kind_of_line_end_ends_one_line() {
        let format = LineFormat::new(b"[r]:", &[]);
        assert_eq!(all_at_once(&format, b"a\nb\r\nc\rd"), b"[r]:a\n[r]:b\n[r]:c\n[r]:d\n");
        assert_eq!(all_at_once(&format, b"\n\r\n"), b"[r]:\n[r]:\n");
    }

    #[test]
    fn an_unfinished_line_waits() {
        let format = LineFormat::new(b"", &[]);
        let mut out = Vec::new();
        let done = format.format(b"whole\nhal", false, &mut false, Opening::default(), &mut out);
        assert_eq!((out.as_slice(), done.consumed), (b"whole\n".as_slice(), 6));
    }

    #[test]
    fn a_line_without_end_is_broken_up() {
        let format = LineFormat::new(b"", &[]);
        let mut out = Vec::new();
        let done = format.format(&vec![b'x'; MAX_LINE + 3], false, &mut false, Opening::default(), &mut out);
        assert_eq!((done.consumed, done.broken, out.len()), (MAX_LINE, 1, MAX_LINE + 1));
    }

    #[test]
    fn filters_keep_lines_with_any_of_the_strings() {
        let format = LineFormat::new(b">", &[b"apple".to_vec(), b"pear".to_vec()]);
        assert_eq!(all_at_once(&format, b"an apple\nplum\npears\n"), b">an apple\n>pears\n");
    }

    #[test]
    fn a_line_goes_on_where_it_was_shown() {
        let format = LineFormat::new(b"[r]:", &[]);
        let whole = |opening| {
            let mut out = Vec::new();
            format.format(b"(Pdb) n\nnext\n", false, &mut false, opening, &mut out);
            String::from_utf8(out).expect("text")
        };
        assert_eq!(whole(Opening { shown: 6, in_place: true }), "n\n[r]:next\n");
        assert_eq!(whole(Opening { shown: 6, in_place: false }), "[r]:n\n[r]:next\n");
        assert_eq!(whole(Opening { shown: 7, in_place: true }), "\n[r]:next\n");
        assert_eq!(whole(Opening { shown: 7, in_place: false }), "[r]:next\n");
    }

    proptest! {
        /// However the bytes arrive, the console shows the same.
        #[test]
        fn chunking_changes_nothing(bytes in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'\r'), Just(b'a'), any::<u8>()], 0..200), cuts in proptest::collection::vec(0usize..200, 0..8)) {
            let format = LineFormat::new(b"[0]:", &[]);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).chain([bytes.len()]).collect();
            cuts.sort_unstable();
            let (mut start, mut after_return, mut out) = (0, false, Vec::new());
            for cut in cuts {
                start += format.format(&bytes[start..cut], false, &mut after_return, Opening::default(), &mut out).consumed;
            }
            format.format(&bytes[start..], true, &mut after_return, Opening::default(), &mut out);
            prop_assert_eq!(out, all_at_once(&format, &bytes));
        }
    }
}
