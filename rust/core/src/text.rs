//! Text that somebody else has written, made fit to be shown.

/// The beginning of `text`, no more than `most` bytes of it.
#[must_use]
pub fn bounded(text: &str, most: usize) -> &str {
    let end = (0..=text.len().min(most)).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}

/// `text` with everything escaped that does more to a terminal or a log than to be shown: control characters and changes of the
/// direction of writing.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_not_told_what_to_do() {
        assert_eq!(printable("loss 0.5 für α"), "loss 0.5 für α");
        assert_eq!(printable("\u{1b}[2J\rgone\n\u{9b}1m\u{202e}txt"), r"\u{1b}[2J\rgone\n\u{9b}1m\u{202e}txt");
    }

    #[test]
    fn a_character_is_not_cut() {
        assert_eq!(bounded("αβ", 3), "α");
        assert_eq!(bounded("αβ", 4), "αβ");
    }
}
