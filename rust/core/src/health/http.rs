//! Parsing of request heads and formatting of response heads: the part of HTTP/1.0 and 1.1 that probes, scrapers and `curl` need. GET and
//! HEAD, one request per connection.

/// Limit on the bytes of a request's head.
pub const MAX_HEAD: usize = 8192;

/// Limit on the number of header lines.
const MAX_HEADERS: usize = 64;

/// The result of parsing the received bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received<'a> {
    /// The head is not complete.
    Incomplete,
    /// A valid request.
    Request(HttpRequest<'a>),
    /// Not a valid request; the status names the error.
    Refused(HttpStatus),
}

/// A request with a complete head. A body and further requests are ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HttpRequest<'a> {
    /// The method is HEAD: the response has no body.
    pub head_only: bool,
    /// The path, without the query.
    pub path: &'a str,
    /// The client prefers `OpenMetrics`, or accepts it as well as plain text.
    pub wants_openmetrics: bool,
}

/// Status of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HttpStatus {
    /// 200
    Ok,
    /// 400
    BadRequest,
    /// 404
    NotFound,
    /// 405
    MethodNotAllowed,
    /// 431
    HeadTooLarge,
    /// 503
    Unavailable,
    /// 505
    VersionNotSupported,
}

impl HttpStatus {
    /// The numeric status code.
    #[must_use]
    pub fn code(self) -> u16 {
        match self {
            Self::Ok => 200,
            Self::BadRequest => 400,
            Self::NotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::HeadTooLarge => 431,
            Self::Unavailable => 503,
            Self::VersionNotSupported => 505,
        }
    }

    fn phrase(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::BadRequest => "Bad Request",
            Self::NotFound => "Not Found",
            Self::MethodNotAllowed => "Method Not Allowed",
            Self::HeadTooLarge => "Request Header Fields Too Large",
            Self::Unavailable => "Service Unavailable",
            Self::VersionNotSupported => "HTTP Version Not Supported",
        }
    }

    /// The body of an error response.
    #[must_use]
    pub fn error_text(self) -> &'static str {
        match self {
            Self::MethodNotAllowed => "method not supported; use GET or HEAD\n",
            Self::HeadTooLarge => "request head too large; the limits are 8192 bytes and 64 header lines\n",
            Self::VersionNotSupported => "HTTP version not supported; use HTTP/1.0 or HTTP/1.1\n",
            Self::NotFound => "unknown path; use /livez (also / and /healthz), /readyz, /status or /metrics\n",
            Self::Ok | Self::BadRequest | Self::Unavailable => "not a valid HTTP/1.0 or HTTP/1.1 request\n",
        }
    }
}

/// Parses the head of a request at the start of `received`. Bytes beyond [`MAX_HEAD`] are ignored.
#[must_use]
pub fn parse(received: &[u8]) -> Received<'_> {
    let bounded = &received[..received.len().min(MAX_HEAD)];
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bounded) {
        Ok(httparse::Status::Complete(_)) => check_request(&request),
        Ok(httparse::Status::Partial) if received.len() < MAX_HEAD => Received::Incomplete,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            Received::Refused(HttpStatus::HeadTooLarge)
        }
        Err(httparse::Error::Version) if has_http_version(bounded) => {
            Received::Refused(HttpStatus::VersionNotSupported)
        }
        Err(_) => Received::Refused(HttpStatus::BadRequest),
    }
}

fn check_request<'a>(request: &httparse::Request<'_, 'a>) -> Received<'a> {
    let (Some(method), Some(target), Some(version)) = (request.method, request.path, request.version) else {
        return Received::Refused(HttpStatus::BadRequest);
    };
    let hosts = request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case("host")).count();
    if hosts > 1 || (version == 1 && hosts == 0) {
        return Received::Refused(HttpStatus::BadRequest);
    }
    let head_only = match method {
        "GET" => false,
        "HEAD" => true,
        _ => return Received::Refused(HttpStatus::MethodNotAllowed),
    };
    let accept = request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case("accept"));
    let ranges = accept.filter_map(|header| std::str::from_utf8(header.value).ok()).flat_map(|value| value.split(','));
    let wants_openmetrics = prefers_openmetrics(ranges);
    Received::Request(HttpRequest { head_only, path: path_of(target), wants_openmetrics })
}

/// Whether the `Accept` header gives `OpenMetrics` at least the weight of plain text.
fn prefers_openmetrics<'h>(ranges: impl Iterator<Item = &'h str>) -> bool {
    let (mut openmetrics, mut plain) = (0.0, 0.0);
    for range in ranges {
        let mut parts = range.split(';').map(str::trim);
        let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
        let weight = parts.find_map(|part| part.strip_prefix("q=").or_else(|| part.strip_prefix("Q=")));
        let weight: f32 = weight.map_or(1.0, |weight| weight.trim().parse().unwrap_or(0.0));
        match kind.as_str() {
            "application/openmetrics-text" => openmetrics = weight.max(openmetrics),
            "text/plain" | "text/*" => plain = weight.max(plain),
            _ => {}
        }
    }
    openmetrics > 0.0 && openmetrics >= plain
}

/// The path of a target `/path?query`, or of `http://host/path?query` as sent by proxies.
fn path_of(target: &str) -> &str {
    let scheme = target.get(..7).filter(|scheme| scheme.eq_ignore_ascii_case("http://"));
    let target = match scheme {
        Some(_) => target[7..].find(['/', '?']).map_or("/", |start| &target[7 + start..]),
        None => target,
    };
    let path = target.split(['?', '#']).next().unwrap_or_default();
    if path.is_empty() { "/" } else { path }
}

/// Whether the first line ends with an HTTP version. Called for rejected versions only.
fn has_http_version(received: &[u8]) -> bool {
    let line = received.split(|byte| matches!(byte, b'\r' | b'\n')).find(|line| !line.is_empty());
    let word = line.and_then(|line| line.rsplit(|byte| *byte == b' ').next()).unwrap_or_default();
    word.strip_prefix(b"HTTP/").is_some_and(|version| version.first().is_some_and(u8::is_ascii_digit))
}

/// The head of a response with a body of `length` bytes. The connection closes after the response.
#[must_use]
pub fn response_head(status: HttpStatus, content_type: &str, length: usize) -> String {
    let allow = if status == HttpStatus::MethodNotAllowed { "Allow: GET, HEAD\r\n" } else { "" };
    format!(
        "HTTP/1.1 {} {}\r\n{allow}Content-Type: {content_type}\r\nContent-Length: {length}\r\n\
         Cache-Control: no-store\r\nConnection: close\r\n\r\n",
        status.code(),
        status.phrase()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(received: &str) -> &str {
        match parse(received.as_bytes()) {
            Received::Request(request) => request.path,
            other => panic!("{received:?}: {other:?}"),
        }
    }

    fn refusal(received: &[u8]) -> HttpStatus {
        match parse(received) {
            Received::Refused(status) => status,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn requests_of_probes_are_parsed() {
        assert_eq!(path("GET / HTTP/1.1\r\nHost: 10.0.0.1:8080\r\nUser-Agent: kube-probe/1.31\r\n\r\n"), "/");
        assert_eq!(path("GET /livez?verbose=1 HTTP/1.0\r\n\r\n"), "/livez");
        assert_eq!(path("\r\nGET /readyz HTTP/1.1\nhost: a\n\n"), "/readyz");
        assert_eq!(path("GET http://agent:80/status?x HTTP/1.1\r\nHost: agent\r\n\r\n"), "/status");
        assert_eq!(path("GET http://agent HTTP/1.1\r\nHost: agent\r\n\r\n"), "/");
        assert_eq!(path("GET HTTP://agent?x HTTP/1.1\r\nHost: agent\r\n\r\n"), "/");
        let head = parse(b"HEAD /livez HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\n");
        assert_eq!(head, Received::Request(HttpRequest { head_only: true, path: "/livez", wants_openmetrics: false }));
    }

    #[test]
    fn the_accept_header_selects_the_format_of_metrics() {
        let wants = |accept: &str| {
            let request = format!("GET /metrics HTTP/1.1\r\nHost: a\r\n{accept}\r\n");
            let Received::Request(request) = parse(request.as_bytes()) else { panic!("{accept}") };
            request.wants_openmetrics
        };
        let prometheus =
            "Accept: application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1\r\n";
        assert!(wants(prometheus));
        assert!(wants("accept: Application/OpenMetrics-Text\r\n"));
        for accept in [
            "",
            "Accept: */*\r\n",
            "Accept: text/plain;version=0.0.4\r\n",
            "Accept: application/openmetrics-text;q=0\r\n",
            "Accept: application/openmetrics-text;q=0.1,text/plain\r\n",
            "Accept: text/html\r\n",
        ] {
            assert!(!wants(accept), "{accept}");
        }
    }

    #[test]
    fn every_proper_prefix_of_a_request_is_incomplete() {
        let request = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n";
        for end in 0..request.len() {
            assert_eq!(parse(&request[..end]), Received::Incomplete, "{end}");
        }
    }

    #[test]
    fn invalid_requests_get_the_matching_status() {
        assert_eq!(refusal(b"POST / HTTP/1.1\r\nHost: a\r\n\r\n"), HttpStatus::MethodNotAllowed);
        assert_eq!(refusal(b"get / HTTP/1.1\r\nHost: a\r\n\r\n"), HttpStatus::MethodNotAllowed);
        assert_eq!(refusal(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), HttpStatus::VersionNotSupported);
        assert_eq!(refusal(b"GET / HTTP/1.2\r\nHost: a\r\n\r\n"), HttpStatus::VersionNotSupported);
        assert_eq!(refusal(b"GET / FTP/1.1\r\n\r\n"), HttpStatus::BadRequest);
        assert_eq!(refusal(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"), HttpStatus::BadRequest, "TLS");
        assert_eq!(refusal(b"GET / HTTP/1.1\r\n\r\n"), HttpStatus::BadRequest, "no host");
        assert_eq!(refusal(b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"), HttpStatus::BadRequest, "two hosts");
        assert_eq!(refusal(b"GET / HTTP/1.1\r\nHost : a\r\n\r\n"), HttpStatus::BadRequest);
    }

    #[test]
    fn the_head_is_limited_in_bytes_and_lines() {
        let long = format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(MAX_HEAD));
        assert_eq!(refusal(long.as_bytes()), HttpStatus::HeadTooLarge);
        assert_eq!(parse(&long.as_bytes()[..MAX_HEAD - 1]), Received::Incomplete);
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1));
        assert_eq!(refusal(many.as_bytes()), HttpStatus::HeadTooLarge);
    }

    #[test]
    fn a_response_head_is_complete() {
        let head = response_head(HttpStatus::MethodNotAllowed, "text/plain", 5);
        assert_eq!(
            head,
            "HTTP/1.1 405 Method Not Allowed\r\nAllow: GET, HEAD\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\
             Cache-Control: no-store\r\nConnection: close\r\n\r\n"
        );
    }
}
