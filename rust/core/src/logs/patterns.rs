//! Rules for log lines: patterns, and the effect of a line that matches.

use std::fmt;

use regex::bytes::{RegexSet, RegexSetBuilder};
use regex_syntax::ParserBuilder;
use regex_syntax::hir::Look;

use crate::vocabulary::LogEffect;

/// A rule for log lines.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LogRule {
    /// The effect of a line that matches.
    pub effect: LogEffect,
    /// Regular expression that matches a part of the line.
    pub pattern: String,
    /// Description of the event, for people.
    pub reason: String,
}

/// The fault of a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PatternError {
    /// The pattern.
    pub pattern: String,
    fault: Fault,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Fault {
    Syntax { text: String, column: usize },
    Anchor,
    MatchesAll,
    Size(String),
}

impl fmt::Display for PatternError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.fault {
            Fault::Syntax { text, column } => write!(formatter, "the pattern is invalid at character {column}: {text}"),
            Fault::Anchor => write!(formatter, r"the pattern contains \A or \z; write ^ or $ for the ends of a line"),
            Fault::MatchesAll => write!(formatter, "the pattern matches every line; write a more specific one"),
            Fault::Size(text) => write!(formatter, "the pattern is too large: {text}; write a shorter one"),
        }
    }
}

impl std::error::Error for PatternError {}

/// Compiled rules. A match takes time linear in the length of the text.
#[derive(Clone, Debug)]
pub struct LogRules {
    rules: Vec<LogRule>,
    set: RegexSet,
}

impl LogRules {
    /// Compiles rules.
    pub fn compile(rules: Vec<LogRule>) -> Result<Self, PatternError> {
        for rule in &rules {
            check(&rule.pattern).map_err(|fault| PatternError { pattern: rule.pattern.clone(), fault })?;
        }
        let set = compile(rules.iter().map(|rule| rule.pattern.as_str())).map_err(|error| PatternError {
            pattern: rules.last().map(|rule| rule.pattern.clone()).unwrap_or_default(),
            fault: Fault::Size(error),
        })?;
        Ok(Self { rules, set })
    }

    /// The rules in the given order.
    #[must_use]
    pub fn rules(&self) -> &[LogRule] {
        &self.rules
    }

    /// Whether any line of `lines` may match. `false` is certain.
    pub(super) fn may_match(&self, lines: &[u8]) -> bool {
        self.set.is_match(lines)
    }

    /// Positions of the rules that match a line.
    pub(super) fn matches(&self, line: &[u8]) -> impl Iterator<Item = usize> + use<> {
        self.set.matches(line).into_iter()
    }
}

fn compile<'p>(patterns: impl Iterator<Item = &'p str>) -> Result<RegexSet, String> {
    // The ends of lines are those of `LineFormat`. A text of several lines is then searched at once.
    RegexSetBuilder::new(patterns).multi_line(true).crlf(true).build().map_err(|error| error.to_string())
}

/// Checks one pattern. Lines are searched in blocks, so a pattern cannot refer to the ends of the text.
fn check(pattern: &str) -> Result<(), Fault> {
    let mut parser = ParserBuilder::new().multi_line(true).crlf(true).utf8(false).build();
    let parsed = parser.parse(pattern).map_err(|error| match error {
        regex_syntax::Error::Parse(error) => {
            Fault::Syntax { text: error.kind().to_string(), column: error.span().start.column }
        }
        regex_syntax::Error::Translate(error) => {
            Fault::Syntax { text: error.kind().to_string(), column: error.span().start.column }
        }
        error => Fault::Syntax { text: error.to_string(), column: 1 },
    })?;
    let looks = parsed.properties().look_set();
    if looks.contains(Look::Start) || looks.contains(Look::End) {
        return Err(Fault::Anchor);
    }
    if matches_all(pattern)? { Err(Fault::MatchesAll) } else { Ok(()) }
}

/// Whether the pattern matches each line of one character.
fn matches_all(pattern: &str) -> Result<bool, Fault> {
    let set = compile([pattern].into_iter()).map_err(Fault::Size)?;
    Ok(["a", "Z", "0", " ", "#", "="].iter().all(|line| set.is_match(line.as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(patterns: &[&str]) -> Result<LogRules, PatternError> {
        let rule = |pattern: &&str| LogRule {
            effect: LogEffect::Fail,
            pattern: (*pattern).to_owned(),
            reason: "why".to_owned(),
        };
        LogRules::compile(patterns.iter().map(rule).collect())
    }

    fn fault(pattern: &str) -> String {
        rules(&[pattern]).expect_err(pattern).to_string()
    }

    #[test]
    fn a_broken_pattern_is_reported_with_its_position() {
        assert_eq!(fault("loss=(nan"), "the pattern is invalid at character 6: unclosed group");
        assert_eq!(
            fault("äö[z-a]"),
            "the pattern is invalid at character 4: invalid character class range, the start must be <= the end"
        );
        assert!(fault(r"(a)\1").starts_with("the pattern is invalid at character 4: backreferences"));
        assert!(fault(r"\w{5000}").starts_with("the pattern is too large"), "{}", fault(r"\w{5000}"));
    }

    #[test]
    fn a_pattern_for_every_line_is_refused() {
        for pattern in ["", ".*", "a*", "^", "$", "nan|", ".", ".+", "^.+$", "(?s).", "[^~]"] {
            assert!(fault(pattern).contains("matches every line"), "{pattern}");
        }
        for pattern in [r"\Anan", r"nan\z", "(?-m)^nan"] {
            assert!(fault(pattern).contains(r"\A or \z"), "{pattern}");
        }
        for pattern in ["nan", r"\d", r"\S", "^$", r"\bnan\b", "(?i)é"] {
            rules(&[pattern]).expect(pattern);
        }
    }

    #[test]
    fn every_matching_rule_is_found() {
        let rules = rules(&["nan", "^loss", "step$"]).expect("valid");
        assert_eq!(rules.matches(b"loss nan at step").collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(rules.matches(b"a loss\xff").count(), 0);
        assert!(rules.may_match(b"first\r\nlast step\rother\n"));
        assert!(!rules.may_match(b"a loss\nsteps\n"));
    }
}
