//! One request of a timer client: a line of JSON, as torch's `FileTimerRequest.to_json` writes it.

use std::borrow::Cow;

use serde::Deserialize;

/// The version of the wire format that is spoken here.
pub const VERSION: i64 = 1;

/// Expiration times this far ahead (30 years) are as good as never, and still fit every clock.
pub const NEVER_S: f64 = 1e9;

const HIGHEST_SIGNAL: i32 = 64;

/// Where a request starts: what is left of a line that another one has run into.
const OPENING: &[u8] = b"{\"";
const MOST_OPENINGS: usize = 16;

/// A request to arm or release a timer.
#[derive(Clone, Debug, PartialEq)]
pub struct TimerRequest {
    /// The process that the timer watches.
    pub pid: i32,
    /// What the process calls the piece of work; one timer for each scope of a process.
    pub scope: String,
    /// Seconds since the epoch. Negative: the timer is released.
    pub expiration_time: f64,
    /// The signal that ends the process; 0 or less asks for none.
    pub signal: i32,
    /// The timer is a heartbeat: as long as the process beats, it does not expire.
    pub heartbeat: Option<Heartbeat>,
}

impl TimerRequest {
    /// Whether this asks to forget the timer.
    #[must_use]
    pub fn is_release(&self) -> bool {
        self.expiration_time < 0.0
    }
}

/// Where a process beats, and how often it promises to.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct Heartbeat {
    /// Position in the page of heartbeats.
    pub slot: u32,
    /// Seconds from one beat to the next at most.
    pub timeout_s: f64,
}

/// Why a line was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// Not JSON, torn, or without a field that is needed.
    #[error("{0}")]
    Syntax(String),
    /// A field holds what it cannot.
    #[error("{field} {value} is out of range")]
    Range {
        /// Its name.
        field: &'static str,
        /// Its value.
        value: String,
    },
    /// Another version of the wire format.
    #[error("version {0} of the wire format is not known here, {VERSION} is")]
    Version(i64),
}

#[derive(Deserialize)]
struct RequestLine<'line> {
    #[serde(default = "this_version")]
    version: i64,
    pid: i64,
    #[serde(borrow)]
    scope_id: Cow<'line, str>,
    expiration_time: f64,
    #[serde(default)]
    signal: i64,
    heartbeat: Option<Heartbeat>,
}

fn this_version() -> i64 {
    VERSION
}

/// What a line holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Parsed {
    /// The request in it.
    pub request: Option<TimerRequest>,
    /// What of it was not understood.
    pub broken: Option<Broken>,
}

/// Parses one line without its newline. Where a torn line runs into a whole one, the torn part alone is lost.
#[must_use]
pub fn parse(line: &[u8]) -> Parsed {
    let broken = match parse_whole(line) {
        Ok(request) => return Parsed { request: Some(request), broken: None },
        Err(broken @ Broken::Syntax(_)) => broken,
        Err(broken) => return Parsed { request: None, broken: Some(broken) },
    };
    let openings = memchr::memmem::find_iter(line, OPENING).filter(|at| *at > 0).take(MOST_OPENINGS);
    let request = openings.into_iter().find_map(|at| parse_whole(&line[at..]).ok());
    Parsed { request, broken: Some(broken) }
}

fn parse_whole(line: &[u8]) -> Result<TimerRequest, Broken> {
    let replaced;
    let line: RequestLine<'_> = match serde_json::from_slice(line) {
        Ok(line) => line,
        Err(error) => {
            replaced = in_plain_json(line).ok_or_else(|| Broken::Syntax(error.to_string()))?;
            serde_json::from_slice(&replaced).map_err(|error| Broken::Syntax(error.to_string()))?
        }
    };
    if line.version != VERSION {
        return Err(Broken::Version(line.version));
    }
    let out_of_range = |field, value: &dyn ToString| Broken::Range { field, value: value.to_string() };
    let pid = i32::try_from(line.pid).map_err(|_| out_of_range("pid", &line.pid))?;
    let signal = i32::try_from(line.signal).ok().filter(|signal| *signal <= HIGHEST_SIGNAL);
    let signal = signal.ok_or_else(|| out_of_range("signal", &line.signal))?;
    if let Some(Heartbeat { timeout_s, .. }) = line.heartbeat
        && !(timeout_s > 0.0 && timeout_s <= NEVER_S)
    {
        return Err(out_of_range("timeout_s", &timeout_s));
    }
    Ok(TimerRequest {
        pid,
        scope: line.scope_id.into_owned(),
        expiration_time: line.expiration_time,
        signal,
        heartbeat: line.heartbeat,
    })
}

/// The line without what Python's `json` writes and JSON does not know; `None` if there is nothing of the kind.
///
/// - An infinite time is `Infinity`. Inside a JSON string the quotes would be escaped, so that the name of the field with its quotes is
///   the field.
/// - A file name that is not UTF-8 has halves of surrogate pairs in it, `\udc80` to `\udcff`.
fn in_plain_json(line: &[u8]) -> Option<Vec<u8>> {
    const TIME: &[u8] = b"\"expiration_time\": ";
    const SURROGATE: &[u8] = b"\\ud";

    let mut plain = line.to_vec();
    if let Some(value) = memchr::memmem::find(line, TIME).map(|at| at + TIME.len()) {
        let words: [(&[u8], &[u8]); 2] = [(b"Infinity", b"1e300"), (b"-Infinity", b"-1")];
        if let Some((word, number)) = words.into_iter().find(|(word, _)| line[value..].starts_with(word)) {
            plain.splice(value..value + word.len(), number.iter().copied());
        }
    }
    let halves: Vec<usize> = memchr::memmem::find_iter(&plain, SURROGATE).collect();
    for at in halves {
        if let Some([digit, _, _]) = plain.get(at + 3..at + 6)
            && matches!(digit, b'8'..=b'9' | b'a'..=b'f')
        {
            plain[at + 2..at + 6].copy_from_slice(b"fffd");
        }
    }
    (plain != line).then_some(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str =
        r#"{"version": 1, "pid": 4711, "scope_id": "train.py#42", "expiration_time": 1700000000.25, "signal": 9}"#;

    fn plain() -> TimerRequest {
        let scope = "train.py#42".into();
        TimerRequest { pid: 4711, scope, expiration_time: 1_700_000_000.25, signal: 9, heartbeat: None }
    }

    fn broken(line: &str) -> Broken {
        let parsed = parse(line.as_bytes());
        assert_eq!(parsed.request, None, "{line}");
        parsed.broken.expect("broken")
    }

    #[test]
    fn a_request_of_torch() {
        assert_eq!(parse(PLAIN.as_bytes()), Parsed { request: Some(plain()), broken: None });
    }

    #[test]
    fn a_release_and_a_whole_number_for_a_time() {
        let line = r#"{"version": 1, "pid": 1, "scope_id": "\u00e9", "expiration_time": -1, "signal": 0}"#;
        let request = parse(line.as_bytes()).request.expect("a request");
        assert!(request.is_release());
        assert_eq!(request.scope, "é");
    }

    #[test]
    fn infinity_is_far_away_and_nan_is_nothing() {
        let far = parse(PLAIN.replace("1700000000.25", "Infinity").as_bytes());
        assert!(far.broken.is_none() && far.request.expect("a request").expiration_time > NEVER_S);
        assert!(parse(PLAIN.replace("1700000000.25", "-Infinity").as_bytes()).request.expect("one").is_release());
        assert!(matches!(broken(&PLAIN.replace("1700000000.25", "NaN")), Broken::Syntax(_)));
    }

    #[test]
    fn a_file_name_that_is_not_utf_8() {
        let line = PLAIN.replace("train.py", r"tr\udce4in.py");
        assert_eq!(parse(line.as_bytes()).request.expect("a request").scope, "tr\u{fffd}in.py#42");
    }

    #[test]
    fn a_torn_line_costs_itself_alone() {
        for cut in 1..PLAIN.len() {
            let glued = format!("{}{PLAIN}", &PLAIN[..cut]);
            let parsed = parse(glued.as_bytes());
            assert_eq!(parsed.request, Some(plain()), "{glued}");
            assert!(parsed.broken.is_some());
        }
    }

    #[test]
    fn what_is_out_of_range_is_named() {
        let line = PLAIN.replace("4711", "99999999999");
        assert_eq!(broken(&line).to_string(), "pid 99999999999 is out of range");
        assert_eq!(broken(&PLAIN.replace(": 9}", ": 65}")).to_string(), "signal 65 is out of range");
        assert!(matches!(broken(&PLAIN.replace("1,", "2,")), Broken::Version(2)));
        let beat =
            |timeout: &str| PLAIN.replace('}', &format!(r#", "heartbeat": {{"slot": 1, "timeout_s": {timeout}}}}}"#));
        assert!(parse(beat("0.5").as_bytes()).request.expect("one").heartbeat.is_some());
        assert!(matches!(broken(&beat("0")), Broken::Range { field: "timeout_s", .. }));
        assert!(matches!(broken(&beat("1e300")), Broken::Range { field: "timeout_s", .. }));
    }
}
