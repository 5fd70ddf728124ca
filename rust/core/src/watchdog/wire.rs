//! The wire format of timer requests: one line of JSON each, as torch's `FileTimerRequest.to_json` writes it.

use std::borrow::Cow;

use serde::Deserialize;

/// The supported version of the wire format.
pub const VERSION: i64 = 1;

/// Expiration times at least this many seconds ahead (30 years) mean never. The value fits every clock.
pub const NEVER_S: f64 = 1e9;

const MAX_SIGNAL: i32 = 64;

/// The first bytes of every request. A torn line may be followed by a complete request on the same line.
const OPENING: &[u8] = b"{\"";
const MAX_OPENINGS: usize = 16;

/// A request to arm or release a timer.
#[derive(Clone, Debug, PartialEq)]
pub struct TimerRequest {
    /// The process that the timer watches.
    pub pid: i32,
    /// The name of the timed work. A process has at most one timer per scope.
    pub scope: String,
    /// Seconds since the epoch; negative releases the timer.
    pub expiration_time: f64,
    /// The signal to send on expiry; 0 or less sends none.
    pub signal: i32,
    /// Makes the timer a heartbeat, whose deadline moves with each beat of the process.
    pub heartbeat: Option<Heartbeat>,
}

impl TimerRequest {
    /// Whether the request releases the timer.
    #[must_use]
    pub fn is_release(&self) -> bool {
        self.expiration_time < 0.0
    }
}

/// The slot and timeout of a heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct Heartbeat {
    /// Index of the process's slot in the heartbeat page.
    pub slot: u32,
    /// Limit on the seconds between two beats.
    pub timeout_s: f64,
}

/// Why a line was rejected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// Not JSON, torn, or without a required field.
    #[error("{0}")]
    Syntax(String),
    /// A field is out of range.
    #[error("{field} {value} is out of range")]
    Range {
        /// Name of the field.
        field: &'static str,
        /// Value of the field.
        value: String,
    },
    /// Another version of the wire format.
    #[error("wire format version {0} is not supported; this server supports version {VERSION}")]
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

/// The content of a line.
#[derive(Clone, Debug, PartialEq)]
pub struct Parsed {
    /// The request, if one was found.
    pub request: Option<TimerRequest>,
    /// The error, if the line or a part of it was rejected.
    pub broken: Option<Broken>,
}

/// Parses one line without its newline. If a complete request follows a torn one on the same line, only the torn part is lost.
#[must_use]
pub fn parse(line: &[u8]) -> Parsed {
    let broken = match parse_whole(line) {
        Ok(request) => return Parsed { request: Some(request), broken: None },
        Err(broken @ Broken::Syntax(_)) => broken,
        Err(broken) => return Parsed { request: None, broken: Some(broken) },
    };
    let openings = memchr::memmem::find_iter(line, OPENING).filter(|at| *at > 0).take(MAX_OPENINGS);
    let request = openings.into_iter().find_map(|at| parse_whole(&line[at..]).ok());
    Parsed { request, broken: Some(broken) }
}

fn parse_whole(line: &[u8]) -> Result<TimerRequest, Broken> {
    let plain;
    let line: RequestLine<'_> = match serde_json::from_slice(line) {
        Ok(line) => line,
        Err(error) => {
            plain = to_plain_json(line).ok_or_else(|| Broken::Syntax(error.to_string()))?;
            serde_json::from_slice(&plain).map_err(|error| Broken::Syntax(error.to_string()))?
        }
    };
    if line.version != VERSION {
        return Err(Broken::Version(line.version));
    }
    let out_of_range = |field, value: &dyn ToString| Broken::Range { field, value: value.to_string() };
    let pid = i32::try_from(line.pid).map_err(|_| out_of_range("pid", &line.pid))?;
    let signal = i32::try_from(line.signal).ok().filter(|signal| *signal <= MAX_SIGNAL);
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

/// The line with the extensions of Python's `json` replaced by standard JSON; `None` if there are none.
///
/// - `Infinity` is an infinite time. The quoted field name cannot occur inside a JSON string, where its quotes would be escaped.
/// - `\udc80` to `\udcff` are unpaired surrogates, in file names that are not UTF-8.
fn to_plain_json(line: &[u8]) -> Option<Vec<u8>> {
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
    fn a_request_written_by_torch_is_parsed() {
        assert_eq!(parse(PLAIN.as_bytes()), Parsed { request: Some(plain()), broken: None });
    }

    #[test]
    fn a_release_with_an_integer_time_is_parsed() {
        let line = r#"{"version": 1, "pid": 1, "scope_id": "\u00e9", "expiration_time": -1, "signal": 0}"#;
        let request = parse(line.as_bytes()).request.expect("a request");
        assert!(request.is_release());
        assert_eq!(request.scope, "é");
    }

    #[test]
    fn infinity_means_never_and_nan_is_rejected() {
        let far = parse(PLAIN.replace("1700000000.25", "Infinity").as_bytes());
        assert!(far.broken.is_none() && far.request.expect("a request").expiration_time > NEVER_S);
        assert!(parse(PLAIN.replace("1700000000.25", "-Infinity").as_bytes()).request.expect("one").is_release());
        assert!(matches!(broken(&PLAIN.replace("1700000000.25", "NaN")), Broken::Syntax(_)));
    }

    #[test]
    fn a_file_name_that_is_not_utf_8_gets_replacement_characters() {
        let line = PLAIN.replace("train.py", r"tr\udce4in.py");
        assert_eq!(parse(line.as_bytes()).request.expect("a request").scope, "tr\u{fffd}in.py#42");
    }

    #[test]
    fn a_torn_request_does_not_lose_the_next_one() {
        for cut in 1..PLAIN.len() {
            let joined = format!("{}{PLAIN}", &PLAIN[..cut]);
            let parsed = parse(joined.as_bytes());
            assert_eq!(parsed.request, Some(plain()), "{joined}");
            assert!(parsed.broken.is_some());
        }
    }

    #[test]
    fn errors_name_the_field_that_is_out_of_range() {
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
