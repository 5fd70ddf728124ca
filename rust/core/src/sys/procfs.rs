//! Reading `/proc`: who is in a process group, and in what state.

use std::fs;

/// A process as `/proc/PID/stat` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Process id.
    pub pid: i32,
    /// State letter: `R`, `S`, `D`, `T`, `Z` …
    pub state: char,
    /// Process group id.
    pub group: i32,
}

impl Stat {
    /// A zombie or a process in its last instants: nothing of it is left but its exit status.
    #[must_use]
    pub fn is_dead(self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x')
    }
}

/// Parses the line of `/proc/PID/stat`; the command in it may hold spaces and parentheses.
#[must_use]
pub fn parse_stat(line: &str) -> Option<Stat> {
    let pid = line.split_once(' ')?.0.parse().ok()?;
    let mut fields = line.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let _parent = fields.next()?;
    let group = fields.next()?.parse().ok()?;
    Some(Stat { pid, state, group })
}

/// State of one process, or `None` if it does not exist.
#[must_use]
pub fn stat(pid: i32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The processes of a group that are not dead.
#[must_use]
pub fn living_members(group: i32) -> Vec<Stat> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(stat)
        .filter(|stat| stat.group == group && !stat.is_dead())
        .collect()
}

/// The kernel function a process sleeps in, `/proc/PID/wchan`; empty where it cannot be read.
#[must_use]
pub fn wait_channel(pid: i32) -> String {
    match fs::read_to_string(format!("/proc/{pid}/wchan")) {
        Ok(name) if name != "0" => name,
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_with_spaces_and_parentheses_does_not_shift_the_fields() {
        let line = "4711 (a) b (c) D 1 4700 4699 0 -1 4194560";
        assert_eq!(parse_stat(line), Some(Stat { pid: 4711, state: 'D', group: 4700 }));
    }

    #[test]
    fn broken_lines_are_refused() {
        for line in ["", "x", "1 (a", "1 (a)", "1 (a) S", "1 (a) S 1", "1 (a) S 1 x"] {
            assert_eq!(parse_stat(line), None, "{line:?}");
        }
    }

    #[test]
    fn this_process_is_alive_and_in_a_group() {
        let pid = i32::try_from(std::process::id()).expect("pids fit");
        let me = stat(pid).expect("own stat");
        assert!(!me.is_dead());
        assert!(living_members(me.group).iter().any(|member| member.pid == pid));
    }
}
