//! Whole jobs: how they begin, go on and end, and what a restart costs.

mod simulation;

use std::collections::BTreeMap;
use std::time::Duration;

use simulation::{Faults, JOIN_TIMEOUT, Job, MS, NO_FAULTS, Random, SECOND};

#[test]
fn an_undisturbed_job_takes_one_round() {
    for nodes in [1, 2, 8] {
        let mut job = Job::new(7, nodes, nodes, nodes as usize, NO_FAULTS);
        job.run();
        assert!(job.all_ended("released"), "{:?}", job.ends());
        assert_eq!(job.begun.len(), 1);
    }
}

#[test]
fn a_job_with_fewer_nodes_than_it_may_have_begins_after_the_last_call() {
    let mut job = Job::new(7, 2, 4, 3, NO_FAULTS);
    job.run();
    assert!(job.all_ended("released"), "{:?}", job.ends());
    assert_eq!(job.begun[0].1.len(), 3);
}

#[test]
fn a_job_that_lacks_nodes_ends_with_the_join_timeout() {
    let mut job = Job::new(7, 3, 3, 2, NO_FAULTS);
    job.run();
    assert!(job.all_ended("timed out"), "{:?}", job.ends());
    assert_eq!(job.begun.len(), 0);
    assert!(job.finished_at >= job.start + JOIN_TIMEOUT && job.finished_at < job.start + JOIN_TIMEOUT + SECOND);
}

#[test]
fn spares_wait_and_leave_in_peace() {
    let mut job = Job::new(7, 2, 2, 5, NO_FAULTS);
    job.run();
    assert_eq!((job.count_ended("released"), job.count_ended("closed")), (2, 3));
    assert_eq!(job.begun.len(), 1);
}

/// Options of the restart policy.
const POLICIES: [&[(&str, &str)]; 7] = [
    &[],
    &[("--restart-backoff", "0")],
    &[("--max-restarts", "0")],
    &[("--max-restarts", "3"), ("--restart-backoff", "2"), ("--restart-backoff-max", "30")],
    &[("--restart-rate", "2/60"), ("--on-node-failure", "wait")],
    &[("--on-node-failure", "exit"), ("--restarts-without-progress", "2")],
    &[("--early-exit-timeout", "5"), ("--max-restarts", "3"), ("--min-uptime", "1")],
];

/// Thousands of schedules; the assertions are in the simulation.
#[test]
fn under_random_faults_rounds_do_not_mix_and_everything_ends() {
    let mut ends: BTreeMap<String, usize> = BTreeMap::new();
    let mut longest_delay = Duration::ZERO;
    for seed in 0..1500 {
        let mut random = Random::new(seed);
        let max_nodes = u32::try_from(1 + random.below(6)).expect("small");
        let min_nodes = u32::try_from(1 + random.below(u64::from(max_nodes))).expect("small");
        let agents = max_nodes as usize + usize::try_from(random.below(3)).expect("small");
        let faults = Faults {
            failing: [0, 10, 50][usize::try_from(random.below(3)).expect("small")],
            last: [0, 10][usize::try_from(random.below(2)).expect("small")],
            breaking: [0, 1, 5][usize::try_from(random.below(3)).expect("small")],
            doubled: [0, 10][usize::try_from(random.below(2)).expect("small")],
            disturbed: [0, 30, 80][usize::try_from(random.below(3)).expect("small")],
            longest_delay: [MS, MS * 30, MS * 400][usize::try_from(random.below(3)).expect("small")],
            policy: POLICIES[usize::try_from(random.below(POLICIES.len() as u64)).expect("small")],
        };
        let mut job = Job::new(seed, min_nodes, max_nodes, agents, faults);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job.run()));
        assert!(outcome.is_ok(), "seed {seed}: {min_nodes} to {max_nodes} of {agents} nodes");
        for (_, end) in job.ends() {
            *ends.entry(format!("{end:?}")).or_default() += 1;
        }
        longest_delay = longest_delay.max(job.longest_delay());
    }
    assert!(longest_delay >= SECOND, "{longest_delay:?}");
    // That the schedules are not all of one kind.
    for how in ["released", "closed", "failed", "timed out", "killed", "left", "late"] {
        assert!(ends.get(&format!("Ended({how:?})")).is_some_and(|count| *count > 30), "{ends:?}");
    }
}

/// A failure on one node: one message about it, and then three per agent, whatever their number.
#[test]
fn a_restart_costs_each_agent_three_messages() {
    for nodes in [2u32, 32, 256, 1024] {
        let mut job = Job::new(7, nodes, nodes, nodes as usize, NO_FAULTS);
        job.run_until_all_work(1);
        let (before, failed_at) = (job.messages, job.now);
        job.fail_workers(1);
        job.run_until_all_work(2);
        assert_eq!(job.messages - before, 3 * u64::from(nodes) + 1);
        // One way there takes 50 us here: the failure, the end of the round, the wish to join, the beginning.
        assert_eq!(job.now - failed_at, Duration::from_micros(200));
    }
}
