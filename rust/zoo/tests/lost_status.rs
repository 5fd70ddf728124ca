//! A process that ignores SIGCHLD: the kernel throws exit statuses away. In a program of its own, because that is the process's.

mod support;

use ferroelastic_core::sys::probe;
use ferroelastic_core::sys::wait::ExitStatus;
use support::{all_exits, engines, plan, stopped, zoo};

/// Whether a pidfd keeps the status of a process that was reaped (Linux 6.15).
fn pidfds_keep_statuses() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("release");
    let mut numbers = release.split(|character: char| !character.is_ascii_digit()).map(str::parse::<u32>);
    let (major, minor) = (numbers.next(), numbers.next());
    (major.expect("major").expect("number"), minor.expect("minor").expect("number")) >= (6, 15)
}

#[test]
fn the_kernel_still_tells_the_status() {
    let before = probe::probe();
    support::sys::ignore_children();
    assert_eq!(probe::probe(), before, "what works does not depend on it");
    for engine in engines() {
        let is_told = engine.support().pidfd && pidfds_keep_statuses();
        let of = |status| if is_told { status } else { ExitStatus::Unknown };
        let commands = [["exit", "0"], ["exit", "7"], ["signal", "9"]];
        let group = engine.spawn(commands.iter().map(|words| zoo(words)).collect()).expect("spawn");
        for exit in all_exits(&group) {
            let expected =
                [ExitStatus::Exited(0), ExitStatus::Exited(7), ExitStatus::Signalled { signal: 9, core_dumped: false }]
                    [exit.index];
            assert_eq!(exit.status, of(expected));
        }
        group.stop(plan(support::PATIENCE)).expect("stop");
        assert!(stopped(&group).survivors.is_empty());
    }
}
