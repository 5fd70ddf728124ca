//! Alone in its process: it counts what is open.

mod support;

use std::time::Duration;

use support::{all_exits, engines, plan, stopped, zoo};

fn count(folder: &str) -> usize {
    std::fs::read_dir(folder).map_or(0, Iterator::count)
}

/// Waits for the fact that threads which have said their last word are gone.
fn settles(before: usize, folder: &str) {
    let deadline = std::time::Instant::now() + support::PATIENCE;
    while count(folder) > before {
        assert!(std::time::Instant::now() < deadline, "{} in {folder}, {before} before", count(folder));
        std::thread::yield_now();
    }
}

#[test]
fn fifty_rounds_leave_no_descriptor_no_thread_and_no_zombie() {
    let (threads, descriptors) = (count("/proc/self/task"), count("/proc/self/fd"));
    for engine in engines() {
        let group = engine.spawn(vec![zoo(&["exit", "0"])]).expect("spawn");
        all_exits(&group);
        drop(group);
        for _ in 0..50 {
            let group =
                engine.spawn(vec![zoo(&["exit", "1"]), zoo(&["sleep"]), zoo(&["deaf-orphan", "0"])]).expect("spawn");
            group.stop_on_failure(plan(Duration::from_millis(20))).expect("arm");
            assert!(stopped(&group).survivors.is_empty());
            assert_eq!(all_exits(&group).len(), 3);
        }
        assert!(engine.close(support::PATIENCE).expect("own process"));
    }
    settles(threads, "/proc/self/task");
    settles(descriptors, "/proc/self/fd");
    let status = std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    assert_eq!(status.trim(), "", "children are left");
}
