//! Cuts the stream of a pipe into lines of bounded length.

/// The longest line, without its newline: what torch's client lets through, `PIPE_BUF`.
pub const LONGEST: usize = 4096;

/// The part of a line that has arrived.
#[derive(Debug, Default)]
pub struct Lines {
    partial: Vec<u8>,
    /// The line is too long already: the rest of it is skipped.
    skipping: bool,
}

impl Lines {
    /// Takes the next bytes of the stream. Calls `line` for each line that is complete, without its newline, and with `None` for one that
    /// was too long. Empty lines are passed over.
    pub fn feed(&mut self, mut bytes: &[u8], mut line: impl FnMut(Option<&[u8]>)) {
        while let Some(end) = memchr::memchr(b'\n', bytes) {
            let (head, tail) = (&bytes[..end], &bytes[end + 1..]);
            bytes = tail;
            if self.skipping || self.partial.len() + head.len() > LONGEST {
                line(None);
            } else if self.partial.is_empty() {
                if !head.is_empty() {
                    line(Some(head));
                }
            } else {
                self.partial.extend_from_slice(head);
                line(Some(&self.partial));
            }
            self.partial.clear();
            self.skipping = false;
        }
        if self.skipping || self.partial.len() + bytes.len() > LONGEST {
            self.partial.clear();
            self.skipping = true;
        } else {
            self.partial.extend_from_slice(bytes);
        }
    }

    /// Bytes held for a line that is not complete yet.
    #[must_use]
    pub fn held(&self) -> usize {
        self.partial.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lines(chunks: &[&[u8]]) -> Vec<Option<Vec<u8>>> {
        let (mut cutter, mut seen) = (Lines::default(), Vec::new());
        for chunk in chunks {
            cutter.feed(chunk, |line| seen.push(line.map(<[u8]>::to_vec)));
        }
        seen
    }

    #[test]
    fn a_line_too_long_costs_itself_alone() {
        let long = [b'x'; LONGEST + 1];
        let fits = [b'y'; LONGEST];
        let seen = lines(&[&long[..10], &long[10..], b"\na\n", &fits, b"\n"]);
        assert_eq!(seen, [None, Some(b"a".to_vec()), Some(fits.to_vec())]);
    }

    proptest! {
        #[test]
        fn how_the_stream_is_cut_makes_no_difference(
            stream in proptest::collection::vec(prop_oneof![8 => any::<u8>(), 1 => Just(b'\n')], 0..9000),
            cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
            cuts.extend([0, stream.len()]);
            cuts.sort_unstable();
            let chunks: Vec<&[u8]> = cuts.windows(2).map(|pair| &stream[pair[0]..pair[1]]).collect();
            prop_assert_eq!(lines(&chunks), lines(&[&stream]));
        }
    }
}
