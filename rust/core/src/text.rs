//! Makes untrusted text safe to display.

use serde::{Deserialize, Deserializer};

/// The beginning of `text`: at most `max_bytes` bytes, cut at a character boundary.
#[must_use]
pub fn bounded(text: &str, max_bytes: usize) -> &str {
    let end = (0..=text.len().min(max_bytes)).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}

/// `text` with control characters and changes of the writing direction escaped, because they can manipulate a terminal or a log.
#[must_use]
pub fn printable(text: &str) -> String {
    let is_unsafe = |c: char| {
        c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if !text.contains(is_unsafe) {
        return text.to_owned();
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_unsafe(c) { shown.extend(c.escape_default()) } else { shown.push(c) }
    }
    shown
}

/// Deserializes text of another process and makes it printable, because it is shown to the user.
pub(crate) fn printable_string<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    String::deserialize(deserializer).map(|text| printable(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_and_direction_changes_are_escaped() {
        assert_eq!(printable("loss 0.5 für α"), "loss 0.5 für α");
        assert_eq!(printable("\u{1b}[2J\rgone\n\u{9b}1m\u{202e}txt"), r"\u{1b}[2J\rgone\n\u{9b}1m\u{202e}txt");
    }

    #[test]
    fn bounded_text_ends_at_a_character_boundary() {
        assert_eq!(bounded("αβ", 3), "α");
        assert_eq!(bounded("αβ", 4), "αβ");
    }
}
