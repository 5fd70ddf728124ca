//! The bookkeeping of one pool, without a zygote.

use super::*;
use crate::sys::probe;
use crate::warm::wire::fork_count;

const TOKENS: WarmTokens = WarmTokens { channel: |id| id, process: |_| 0 };

/// A pool that is ready, and the zygote's end of its channel.
fn ready_pool(wanted: usize) -> (Pool, Channel) {
    let (channel, zygote_end) = Channel::pair().expect("pair");
    let state = WarmState {
        phase: WarmPhase::Ready,
        reason: String::new(),
        shortage: String::new(),
        zygote: 0,
        parked: 0,
        released: 0,
        ready_after: None,
    };
    let pool = Pool {
        zygote: None,
        channel,
        children: HashMap::new(),
        wanted,
        ordered: 0,
        began: Instant::now(),
        deadline: None,
        timeout: Duration::ZERO,
        refill_at: None,
        early_ends: 0,
        parked_ends: 0,
        is_closing: false,
        closed: None,
        shared: Arc::new(WarmProgress { state: Published::new(state), imported: OnceLock::new() }),
        tokens: TOKENS,
        warnings: Warnings::default(),
    };
    (pool, zygote_end)
}

fn next_order(zygote_end: &Channel) -> Option<u32> {
    let mut buffer = [0; 8];
    let (length, _) = zygote_end.receive(&mut buffer, false).ok()?;
    fork_count(&buffer[..length])
}

/// A child of this process that ends with its pool.
fn child() -> std::process::Child {
    std::process::Command::new("sleep").arg("1000").spawn().expect("sleep")
}

fn report(pool: &mut Pool, report: Report, fd: Option<OwnedFd>) {
    let poller = Poller::new().expect("poller");
    let guard = GuardSlot::new(Warnings::default());
    let host = PoolHost { support: probe::probe(), poller: &poller, guard: &guard };
    pool.handle(report, fd, host);
}

#[test]
fn a_child_is_ordered_once() {
    let (mut pool, zygote_end) = ready_pool(2);
    pool.refill();
    pool.refill();
    assert_eq!((next_order(&zygote_end), next_order(&zygote_end)), (Some(2), None));
    // After a shortage the next refill is a new attempt.
    report(&mut pool, Report::Shortage("EAGAIN".into()), None);
    assert_eq!(pool.shared.state.read(|state| state.shortage.clone()), "EAGAIN");
    assert_eq!(next_order(&zygote_end), None);
    pool.refill();
    assert_eq!(next_order(&zygote_end), Some(2));
    assert_eq!(pool.shared.state.read(|state| state.shortage.clone()), "");
}

#[test]
fn a_child_is_watched_from_its_first_report_and_parked_after_its_second() {
    let (mut pool, zygote_end) = ready_pool(1);
    pool.refill();
    assert_eq!(next_order(&zygote_end), Some(1));
    let mut process = child();
    let pid = i32::try_from(process.id()).expect("pid");
    let (own_end, _agent_end) = Channel::pair().expect("pair");
    report(&mut pool, Report::Forked { pid }, None);
    assert!(!pool.children[&pid].is_parked());
    assert_eq!(pool.ordered, 0);
    report(&mut pool, Report::Parked { pid }, Some(own_end.into()));
    assert!(pool.children[&pid].is_parked());
    process.kill().expect("killed");
    process.wait().expect("reaped");
}

#[test]
fn a_process_that_is_no_child_is_not_adopted() {
    let (mut pool, _zygote_end) = ready_pool(0);
    report(&mut pool, Report::Forked { pid: 1 }, None);
    assert!(pool.children.is_empty());
}

#[test]
fn a_suspended_child_is_killed_and_not_used() {
    let (mut pool, _zygote_end) = ready_pool(0);
    let mut process = child();
    let pid = i32::try_from(process.id()).expect("pid");
    let (own_end, _agent_end) = Channel::pair().expect("pair");
    report(&mut pool, Report::Forked { pid }, None);
    report(&mut pool, Report::Parked { pid }, Some(own_end.into()));
    assert_eq!(pool.next_parked(), Some(pid));
    assert!(pool.children[&pid].leader.signal(libc::SIGSTOP).expect("suspended"));
    while !pool.children[&pid].leader.is_stopped() {
        std::thread::yield_now();
    }
    assert_eq!(pool.next_parked(), None);
    assert_eq!(
        pool.warnings.take(),
        [format!("A parked process (pid {pid}) was suspended. It was killed and is replaced")]
    );
    process.wait().expect("killed");
}
