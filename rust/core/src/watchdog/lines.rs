//! Splits the stream of a pipe into lines of bounded length.

/// Limit on a line in bytes, without its newline. torch's client has the same limit (`PIPE_BUF`).
pub const MAX_LINE_BYTES: usize = 4096;

/// The splitter, with the incomplete line at the end of the stream.
#[derive(Debug, Default)]
pub struct Lines {
    partial: Vec<u8>,
    /// The current line exceeds the limit; the rest of it is skipped.
    skipping: bool,
}

impl Lines {
    /// Takes the next bytes of the stream. Calls `line` with each complete line without its newline, and with `None` for each line over
    /// the limit. Empty lines are skipped.
    pub fn feed(&mut self, mut bytes: &[u8], mut line: impl FnMut(Option<&[u8]>)) {
        while let Some(end) = memchr::memchr(b'\n', bytes) {
            let (head, tail) = (&bytes[..end], &bytes[end + 1..]);
            bytes = tail;
            if self.skipping || self.partial.len() + head.len() > MAX_LINE_BYTES {
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
        if self.skipping || self.partial.len() + bytes.len() > MAX_LINE_BYTES {
            self.partial.clear();
            self.skipping = true;
        } else {
            self.partial.extend_from_slice(bytes);
        }
    }

    /// Buffered bytes of the incomplete line.
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
        let (mut splitter, mut seen) = (Lines::default(), Vec::new());
        for chunk in chunks {
            splitter.feed(chunk, |line| seen.push(line.map(<[u8]>::to_vec)));
        }
        seen
    }

    #[test]
    fn an_overlong_line_loses_no_other_line() {
        let long = [b'x'; MAX_LINE_BYTES + 1];
        let fits = [b'y'; MAX_LINE_BYTES];
        let seen = lines(&[&long[..10], &long[10..], b"\na\n", &fits, b"\n"]);
        assert_eq!(seen, [None, Some(b"a".to_vec()), Some(fits.to_vec())]);
    }

    proptest! {
        #[test]
        fn chunk_boundaries_do_not_change_the_lines(
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
