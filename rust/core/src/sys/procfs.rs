//! Reading processes from `/proc`.

use std::fs;

use crate::text::printable;

/// Fields of `/proc/PID/stat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Process id.
    pub pid: i32,
    /// State letter: `R`, `S`, `D`, `T`, `Z` …
    pub state: char,
    /// Parent process id.
    pub parent: i32,
    /// Process group id.
    pub group: i32,
    /// Session id.
    pub session: i32,
    /// Start time in clock ticks since boot. Identifies a process uniquely together with the pid.
    pub started: u64,
}

impl Stat {
    /// Whether the process is a zombie or exiting: only its exit status is left.
    #[must_use]
    pub fn is_dead(self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x')
    }
}

/// Parses `/proc/PID/stat`. The command in it may contain spaces and parentheses.
#[must_use]
pub fn parse_stat(line: &str) -> Option<Stat> {
    let pid = line.split_once(' ')?.0.parse().ok()?;
    let mut fields = line.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    let group = fields.next()?.parse().ok()?;
    let session = fields.next()?.parse().ok()?;
    let started = fields.nth(15)?.parse().ok()?;
    Some(Stat { pid, state, parent, group, session, started })
}

/// State of one process, or `None` if it does not exist.
#[must_use]
pub fn stat(pid: i32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The name of a process (`/proc/PID/comm`). Empty if it cannot be read.
#[must_use]
pub fn name(pid: i32) -> String {
    let mut name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.truncate(name.trim_end_matches('\n').len());
    name
}

/// The environment that a process received from its last `execve`, as entries that each end with a zero byte. Empty if it cannot be read.
///
/// The kernel shows an empty environment and an empty command line for a moment during `execve`, and even after it has released a parent
/// that waits in `vfork`. This function retries for up to 10 ms while both are empty.
#[must_use]
pub fn environment(pid: i32) -> Vec<u8> {
    const RETRIES: u32 = 100;
    let read = |name: &str| fs::read(format!("/proc/{pid}/{name}"));
    for _ in 0..RETRIES {
        match read("environ") {
            Ok(environment) if environment.is_empty() => {}
            result => return result.unwrap_or_default(),
        }
        // A process with a command line has no environment. A process with neither costs the whole 10 ms.
        if !read("cmdline").is_ok_and(|line| line.is_empty()) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_micros(100));
    }
    read("environ").unwrap_or_default()
}

/// The memory layout of this process, from `/proc/self/stat`: start and end of the code, start of the stack, start and end of the data, start
/// of the heap.
#[must_use]
pub fn own_layout() -> Option<[u64; 6]> {
    // Numbers of the fields in proc(5), less the first that follows the command.
    const FIRST: usize = 3;
    const FIELDS: [usize; 6] = [26, 27, 28, 45, 46, 47];
    let line = fs::read_to_string("/proc/self/stat").ok()?;
    let fields: Vec<&str> = line.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let values: Vec<u64> = FIELDS.iter().map(|field| fields.get(field - FIRST)?.parse().ok()).collect::<Option<_>>()?;
    values.try_into().ok()
}

/// The pids of all processes.
#[must_use]
pub fn pids() -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Candidates for the children of a process: exactly the children of all its threads if the kernel lists them (`CONFIG_PROC_CHILDREN`),
/// otherwise the pids of all processes.
#[must_use]
pub fn children(pid: i32) -> Vec<i32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = threads.map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    let lists: Option<Vec<String>> = lists.collect();
    let parse = |lists: Vec<String>| {
        let words = lists.iter().flat_map(|list| list.split_ascii_whitespace());
        words.filter_map(|word| word.parse().ok()).collect()
    };
    lists.map_or_else(pids, parse)
}

/// The processes of a group without zombies.
#[must_use]
pub fn living_members(group: i32) -> Vec<Stat> {
    pids().into_iter().filter_map(stat).filter(|stat| stat.group == group && !stat.is_dead()).collect()
}

/// The kernel function in which a process sleeps (`/proc/PID/wchan`). Empty if it does not sleep or the file cannot be read.
#[must_use]
pub fn wait_channel(pid: i32) -> String {
    match fs::read_to_string(format!("/proc/{pid}/wchan")) {
        Ok(name) if name != "0" => name,
        _ => String::new(),
    }
}

/// The command line of a process with its arguments separated by spaces, or its name if that is empty. Empty if the process does not exist.
#[must_use]
pub fn command(pid: i32) -> String {
    let read = |name| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let line = read("cmdline");
    let words: Vec<_> = line.split(|byte| *byte == 0).filter(|word| !word.is_empty()).collect();
    let text = if words.is_empty() { read("comm") } else { words.join(&b' ') };
    // A process can set its name and command line to any bytes.
    printable(String::from_utf8_lossy(&text).trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_with_spaces_and_parentheses_does_not_shift_the_fields() {
        let line = "4711 (a) b (c) D 1 4700 4699 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987 4096";
        let expected = Stat { pid: 4711, state: 'D', parent: 1, group: 4700, session: 4699, started: 987 };
        assert_eq!(parse_stat(line), Some(expected));
    }

    #[test]
    fn malformed_lines_are_refused() {
        for line in ["", "x", "1 (a", "1 (a)", "1 (a) S", "1 (a) S 1", "1 (a) S 1 x", "1 (a) S 1 2 3"] {
            assert_eq!(parse_stat(line), None, "{line:?}");
        }
    }

    #[test]
    fn this_process_is_a_living_member_of_its_group() {
        let pid = i32::try_from(std::process::id()).expect("pids fit");
        let own = stat(pid).expect("own stat");
        assert!(!own.is_dead());
        assert!(living_members(own.group).iter().any(|member| member.pid == pid));
    }
}
