//! Messages between the agent, the zygote and its children.
//!
//! | message | from | to | descriptors |
//! | --- | --- | --- | --- |
//! | configuration (bytes of the program) | agent | zygote | |
//! | [`fork_order`] | agent | zygote | |
//! | [`Report::Ready`] | zygote | agent | the snapshot of the imported files |
//! | [`Report::Refused`] | zygote | agent | |
//! | [`Report::Shortage`] | zygote | agent | |
//! | [`Report::Forked`] | zygote | agent | |
//! | [`Report::Parked`] | child | agent | the agent's end of the child's channel |
//! | [`Release`] | agent | child | standard input, output and error, and [`Release::fds`] |

use std::ffi::CString;
use std::os::fd::RawFd;
use std::str::FromStr;

use crate::sys::spawn::Command;

/// Largest message. The default send buffer of a socket has 208 KiB.
pub const MAX_BYTES: usize = 192 * 1024;

/// A message to the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// The modules are imported, and the process can be forked.
    Ready,
    /// The zygote cannot be used, for this reason.
    Refused(String),
    /// No further child can be forked now, for this reason.
    Shortage(String),
    /// A child was forked.
    Forked {
        /// Its process id.
        pid: i32,
    },
    /// A child waits for its command.
    Parked {
        /// Its process id.
        pid: i32,
    },
}

impl Report {
    /// Encodes the message.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (kind, rest) = match self {
            Self::Ready => (b'R', Vec::new()),
            Self::Refused(reason) => (b'X', reason.as_bytes().to_vec()),
            Self::Shortage(reason) => (b'S', reason.as_bytes().to_vec()),
            Self::Forked { pid } => (b'F', pid.to_ne_bytes().to_vec()),
            Self::Parked { pid } => (b'P', pid.to_ne_bytes().to_vec()),
        };
        [vec![kind], rest].concat()
    }

    /// Decodes a message; `None` if it is malformed.
    #[must_use]
    pub fn decode(message: &[u8]) -> Option<Self> {
        let (kind, rest) = message.split_first()?;
        let pid = || rest.try_into().ok().map(i32::from_ne_bytes);
        Some(match kind {
            b'R' => Self::Ready,
            b'X' => Self::Refused(String::from_utf8_lossy(rest).into_owned()),
            b'S' => Self::Shortage(String::from_utf8_lossy(rest).into_owned()),
            b'F' => Self::Forked { pid: pid()? },
            b'P' => Self::Parked { pid: pid()? },
            _ => return None,
        })
    }
}

/// The order to fork `count` children.
#[must_use]
pub fn fork_order(count: u32) -> [u8; 4] {
    count.to_ne_bytes()
}

/// The number of children in an order.
#[must_use]
pub fn fork_count(order: &[u8]) -> Option<u32> {
    order.try_into().ok().map(u32::from_ne_bytes)
}

/// The command of a parked child.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Release {
    /// Program and arguments.
    pub argv: Vec<CString>,
    /// The whole environment, as `NAME=value`.
    pub env: Vec<CString>,
    /// Working directory; `None` keeps the zygote's.
    pub cwd: Option<CString>,
    /// Logical CPUs; empty keeps the zygote's.
    pub cpus: Vec<usize>,
    /// Soft limit of open descriptors; `None` keeps the zygote's.
    pub open_files: Option<u64>,
    /// Numbers of the descriptors that travel behind the standard streams.
    pub fds: Vec<RawFd>,
}

impl Release {
    /// The release for a command and further descriptors. The streams of the command travel as descriptors.
    #[must_use]
    pub fn of(command: &Command, fds: Vec<RawFd>) -> Self {
        Self {
            argv: command.argv.clone(),
            env: command.env.clone(),
            cwd: command.cwd.clone(),
            cpus: command.cpus.clone().unwrap_or_default(),
            open_files: command.open_files,
            fds,
        }
    }

    /// Encodes the message as strings that end in NUL: number of arguments, working directory, CPUs, limit, descriptors, arguments,
    /// environment.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let head = [
            self.argv.len().to_string().into_bytes(),
            self.cwd.as_ref().map(|cwd| cwd.as_bytes().to_vec()).unwrap_or_default(),
            join(&self.cpus),
            self.open_files.map(|limit| limit.to_string().into_bytes()).unwrap_or_default(),
            join(&self.fds),
        ];
        let mut message = Vec::new();
        let strings = self.argv.iter().chain(&self.env).map(CString::as_bytes);
        for field in head.iter().map(Vec::as_slice).chain(strings) {
            message.extend_from_slice(field);
            message.push(0);
        }
        message
    }

    /// Decodes a message; `None` if it is malformed.
    #[must_use]
    pub fn decode(message: &[u8]) -> Option<Self> {
        let mut fields = message.strip_suffix(&[0])?.split(|byte| *byte == 0).map(<[u8]>::to_vec);
        let mut text = || String::from_utf8(fields.next()?).ok();
        let argc: usize = text()?.parse().ok()?;
        let cwd = fields.next()?;
        let mut text = || String::from_utf8(fields.next()?).ok();
        let cpus = split(&text()?)?;
        let open_files = text()?;
        let fds = split(&text()?)?;
        let open_files = if open_files.is_empty() { None } else { Some(open_files.parse().ok()?) };
        let mut strings = fields.map(|field| CString::new(field).ok()).collect::<Option<Vec<_>>>()?;
        if argc == 0 || argc > strings.len() {
            return None;
        }
        let env = strings.split_off(argc);
        let cwd = if cwd.is_empty() { None } else { Some(CString::new(cwd).ok()?) };
        Some(Self { argv: strings, env, cwd, cpus, open_files, fds })
    }
}

fn join<T: ToString>(numbers: &[T]) -> Vec<u8> {
    numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(",").into_bytes()
}

fn split<T: FromStr>(numbers: &str) -> Option<Vec<T>> {
    numbers.split(',').filter(|number| !number.is_empty()).map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn c(text: &str) -> CString {
        CString::new(text).expect("no NUL")
    }

    #[test]
    fn releases_are_decoded_as_encoded() {
        let full = Release {
            argv: vec![c("python"), c(""), c("a b")],
            env: vec![c("A=1"), c("B=")],
            cwd: Some(c("/tmp/ä")),
            cpus: vec![0, 71],
            open_files: Some(1024),
            fds: vec![1023, 5],
        };
        let least = Release { argv: vec![c("python")], ..Release::default() };
        for release in [full, least] {
            assert_eq!(Release::decode(&release.encode()), Some(release));
        }
        for malformed in [
            &b""[..],
            b"1\0\0\0\0\0",
            b"2\0\0\0\0\0python\0",
            b"0\0\0\0\0\0",
            b"x\0\0\0\0\0python\0",
            b"1\0\0a\0\0\0python\0",
        ] {
            assert_eq!(Release::decode(malformed), None, "{malformed:?}");
        }
    }

    #[test]
    fn reports_are_decoded_as_encoded() {
        let reports = [
            Report::Ready,
            Report::Refused("a second thread".into()),
            Report::Shortage("ulimit".into()),
            Report::Forked { pid: 4711 },
            Report::Parked { pid: i32::MAX },
        ];
        for report in reports {
            assert_eq!(Report::decode(&report.encode()), Some(report));
        }
        for malformed in [&b""[..], b"?", b"F123"] {
            assert_eq!(Report::decode(malformed), None, "{malformed:?}");
        }
    }
}
