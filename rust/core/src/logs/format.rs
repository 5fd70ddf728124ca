//! Text around the content of a line: prefixes with a time, and JSON objects.

use super::time::{TIME_LENGTH, write_time};

const TIME_MACRO: &[u8] = b"${time}";

/// The text before a line. Each `${time}` in its template is the time of the line.
#[derive(Clone, Debug)]
pub(super) struct Prefix {
    text: Vec<u8>,
    times: Vec<usize>,
}

impl Prefix {
    pub(super) fn new(template: &[u8]) -> Self {
        let (mut text, mut times, mut rest) = (Vec::new(), Vec::new(), template);
        while let Some(start) = memchr::memmem::find(rest, TIME_MACRO) {
            text.extend_from_slice(&rest[..start]);
            times.push(text.len());
            text.extend_from_slice(&[b'0'; TIME_LENGTH]);
            rest = &rest[start + TIME_MACRO.len()..];
        }
        text.extend_from_slice(rest);
        let mut prefix = Self { text, times };
        prefix.set_time(0);
        prefix
    }

    /// Sets the time of the next lines, in nanoseconds since the epoch.
    pub(super) fn set_time(&mut self, realtime_ns: u64) {
        if let Some((first, others)) = self.times.split_first() {
            write_time(realtime_ns, &mut self.text[*first..*first + TIME_LENGTH]);
            for other in others {
                self.text.copy_within(*first..*first + TIME_LENGTH, *other);
            }
        }
    }

    pub(super) fn has_time(&self) -> bool {
        !self.times.is_empty()
    }

    pub(super) fn text(&self) -> &[u8] {
        &self.text
    }
}

/// Appends `line` to `out` as the content of a JSON string. Bytes that are not UTF-8 become U+FFFD.
pub(super) fn escape_json(line: &[u8], out: &mut Vec<u8>) {
    for chunk in line.utf8_chunks() {
        escape_text(chunk.valid().as_bytes(), out);
        if !chunk.invalid().is_empty() {
            out.extend_from_slice("\u{fffd}".as_bytes());
        }
    }
}

fn escape_text(text: &[u8], out: &mut Vec<u8>) {
    let mut plain = 0;
    for (position, byte) in text.iter().copied().enumerate() {
        if byte >= b' ' && byte != b'"' && byte != b'\\' {
            continue;
        }
        out.extend_from_slice(&text[plain..position]);
        plain = position + 1;
        match byte {
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            b'\t' => out.extend_from_slice(b"\\t"),
            _ => {
                const HEX: &[u8; 16] = b"0123456789abcdef";
                let digits = [HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]];
                out.extend_from_slice(b"\\u00");
                out.extend_from_slice(&digits);
            }
        }
    }
    out.extend_from_slice(&text[plain..]);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_time_of_a_prefix_is_replaced() {
        let mut prefix = Prefix::new(b"${time} [r0] ${time}:");
        prefix.set_time(1_700_000_000_123_456_789);
        assert_eq!(prefix.text(), b"2023-11-14T22:13:20.123Z [r0] 2023-11-14T22:13:20.123Z:");
        let mut plain = Prefix::new(b"${tim} $time}");
        plain.set_time(1);
        assert!(!plain.has_time());
        assert_eq!(plain.text(), b"${tim} $time}");
    }

    proptest! {
        #[test]
        fn any_line_is_a_json_string(line in proptest::collection::vec(prop_oneof![any::<u8>(), Just(b'"'), Just(b'\\'), Just(0x1b)], 0..200)) {
            let mut json = vec![b'"'];
            escape_json(&line, &mut json);
            json.push(b'"');
            let text: String = serde_json::from_slice(&json).expect("valid JSON");
            prop_assert_eq!(text, String::from_utf8_lossy(&line));
        }
    }
}
