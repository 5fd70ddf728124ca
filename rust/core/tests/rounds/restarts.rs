//! The restart policy at the host: delays, limits, final causes, lost nodes and early exits.

use std::time::Duration;

use ferroelastic_core::rendezvous::policy::{FailureFacts, NO_RESTART_EXIT_CODE, RestartVerdict};
use ferroelastic_core::rendezvous::rounds::{HostAction, HostEvent, Id};
use ferroelastic_core::vocabulary::RestartCause;

use crate::table::{JOIN_TIMEOUT, LOSS_GRACE, MOMENT, SECOND, Table, begun, closed, introduction, over, refused};

fn fail_with(table: &mut Table, id: Id, round: u64, facts: FailureFacts) -> Vec<HostAction> {
    table.step(HostEvent::Failed {
        id,
        round,
        at_ns: 1,
        text: format!("rank {id} fell"),
        code: 7,
        facts,
        detail: String::new(),
    })
}

fn status(status: i32) -> FailureFacts {
    FailureFacts { status: Some(status), ..FailureFacts::default() }
}

#[test]
fn all_nodes_wait_for_the_end_of_the_delay() {
    let mut table = Table::running_with(2, 2, &[("--restart-backoff", "2")]);
    table.fail(1, 0, 1);
    table.join(1, Some(0));
    assert_eq!(begun(&table.join(2, Some(0))).len(), 2, "the first restart has no delay");
    table.fail(1, 1, 1);
    table.join(1, Some(1));
    assert_eq!(begun(&table.join(2, Some(1))), []);
    // The jitter shortens it by up to a fifth.
    assert_eq!(begun(&table.pass(Duration::from_millis(1600).saturating_sub(MOMENT), &[1, 2])), []);
    let places = begun(&table.pass(Duration::from_millis(400) + MOMENT, &[1, 2]));
    assert_eq!(places.iter().map(|(_, place)| (place.round, place.restarts_used)).collect::<Vec<_>>(), [(2, 2); 2]);
    let decision = places[0].1.cause.clone().expect("a cause").decision.expect("a decision");
    assert!(decision.text.starts_with("restart 2 follows after 1."), "{}", decision.text);
}

#[test]
fn a_node_that_leaves_during_the_delay_is_handled_at_once() {
    let mut table = Table::running_with(1, 2, &[("--restart-backoff", "60"), ("--restart-backoff-max", "60")]);
    for round in 0..2 {
        table.fail(1, round, 1);
        table.join(1, Some(round));
        table.join(2, Some(round));
    }
    assert_eq!(table.step(HostEvent::Left(2, "SIGTERM".into())), []);
    let places = begun(&table.pass(60 * SECOND, &[1]));
    assert_eq!(places.len(), 1);
}

#[test]
fn a_loss_that_explains_a_failure_takes_the_delay_back() {
    let mut table = Table::running_with(2, 3, &[("--restart-backoff", "60"), ("--max-restarts", "2")]);
    table.fail(1, 0, 1);
    (1..=3).for_each(|id| drop(table.join(id, Some(0))));
    table.fail(1, 1, 1);
    table.join(1, Some(1));
    table.step(HostEvent::Lost(3, "gone".into()));
    let places = begun(&table.join(2, Some(1)));
    assert!(places.iter().all(|(_, place)| (place.restarts_used, place.membership_changes) == (1, 1)), "{places:?}");
    assert_eq!(places.len(), 2);
}

#[test]
fn the_limit_of_restarts_is_that_of_the_job() {
    let mut table = Table::running_with(2, 3, &[("--max-restarts", "1"), ("--restart-backoff", "0")]);
    table.fail(3, 0, 1);
    table.step(HostEvent::Left(3, "SIGTERM".into()));
    table.join(1, Some(0));
    assert_eq!(begun(&table.join(2, Some(0))).len(), 2);
    // The node whose workers failed is gone, and its failure still counts.
    assert_eq!(over(&table.fail(1, 1, 1)), []);
    let actions = table.pass(LOSS_GRACE, &[1, 2]);
    let text = "rank 1 exited with 1 on node1, and no restart is left".to_owned();
    assert_eq!(closed(&actions), [1, 2].map(|id| (id, text.clone(), 7)));
}

#[test]
fn a_final_failure_that_is_reported_after_another_one_ends_the_job() {
    let mut table = Table::running_with(2, 2, &[("--fatal-exit-codes", "3-5,SIGSEGV")]);
    assert_eq!(over(&fail_with(&mut table, 1, 0, status(1))).len(), 2);
    fail_with(&mut table, 2, 0, status(-11));
    assert_eq!(table.rounds.closed(), Some("rank 2 fell on node2, and SIGSEGV is final (--fatal-exit-codes)"),);
}

#[test]
fn facts_that_are_final_end_the_job() {
    let exits = ("--fatal-exit-codes", "4");
    let oom = FailureFacts { causes: vec!["signal".into(), "oom_killer".into()], ..FailureFacts::default() };
    let verdict = FailureFacts { verdict: RestartVerdict::Final("the data is gone".into()), ..FailureFacts::default() };
    for (facts, text) in [
        (status(NO_RESTART_EXIT_CODE), "exit code 97 forbids a restart"),
        (status(4), "exit code 4 is final (--fatal-exit-codes)"),
        (oom, "the cause oom_killer is final (--fatal-causes)"),
        (verdict, "the data is gone"),
    ] {
        let mut table = Table::running_with(1, 1, &[exits, ("--fatal-causes", "oom_killer")]);
        let actions = fail_with(&mut table, 1, 0, facts);
        assert_eq!(closed(&actions), [(1, format!("rank 1 fell on node1, and {text}"), 7)]);
    }
}

#[test]
fn progress_on_another_node_counts() {
    let mut table = Table::running_with(2, 2, &[("--restarts-without-progress", "1"), ("--restart-backoff", "0")]);
    for round in 0..3 {
        table.step(HostEvent::Progressed(2, round));
        assert_eq!(over(&table.fail(1, round, 1)).len(), 2);
        table.join(1, Some(round));
        table.join(2, Some(round));
    }
    // Progress of another round does not count.
    table.step(HostEvent::Progressed(2, 2));
    table.fail(1, 3, 1);
    table.pass(LOSS_GRACE, &[1, 2]);
    let why = "rank 1 exited with 1 on node1, and 1 restarts made no progress (--restarts-without-progress)";
    assert_eq!(table.rounds.closed(), Some(why));
}

#[test]
fn a_lost_node_ends_the_job_or_is_waited_for() {
    let mut table = Table::running_with(1, 2, &[("--on-node-failure", "exit")]);
    let actions = table.step(HostEvent::Left(2, "SIGTERM".into()));
    let text = "node2 (agent 100) left: SIGTERM, and the job ends with any of its nodes (--on-node-failure=exit)";
    assert_eq!(closed(&actions), [(1, text.to_owned(), 1)]);

    for comes in [true, false] {
        let mut table = Table::running_with(1, 2, &[("--on-node-failure", "wait")]);
        table.step(HostEvent::Left(2, "SIGTERM".into()));
        assert_eq!(begun(&table.join(1, Some(0))), []);
        assert_eq!(begun(&table.pass(JOIN_TIMEOUT.saturating_sub(SECOND), &[1])), []);
        if comes {
            table.enter(3, (1, 2));
            assert_eq!(begun(&table.join(3, None)).len(), 2);
        } else {
            assert_eq!(begun(&table.pass(2 * SECOND, &[1])).len(), 1);
        }
    }
}

#[test]
fn a_round_has_failed_if_some_nodes_have_succeeded_and_others_run_on() {
    let mut table = Table::running_with(2, 2, &[("--early-exit-timeout", "60"), ("--max-restarts", "1")]);
    table.step(HostEvent::Finished(2, 0));
    assert_eq!(table.pass(59 * SECOND, &[1, 2]), []);
    let ended = over(&table.pass(2 * SECOND, &[1, 2]));
    assert_eq!(ended.iter().map(|(_, kind, _)| *kind).collect::<Vec<_>>(), [RestartCause::Failure; 2]);
    let text = "all workers of other nodes have succeeded, and those of node1 (agent 100) ran on for 60 s";
    assert!(ended[0].2.starts_with(text), "{}", ended[0].2);
    // All succeed in time.
    table.join(1, Some(0));
    table.join(2, Some(0));
    table.step(HostEvent::Finished(2, 1));
    table.pass(59 * SECOND, &[1, 2]);
    table.step(HostEvent::Finished(1, 1));
    assert_eq!(table.rounds.closed(), Some("the job has succeeded"));
}

#[test]
fn an_agent_with_settings_that_are_not_valid_is_refused() {
    let mut table = Table::new(crate::settings(2, 2));
    let mut agent = introduction(1);
    agent.settings.insert("--restart-rate".into(), "5".into());
    let text = refused(&table.step(HostEvent::Entered(1, agent))).expect("refused");
    let expected = "give RESTARTS/SECONDS, e.g. 5/3600, with at most 1000 restarts, or none";
    assert_eq!(text, format!("--restart-rate=\"5\" is not valid: {expected}"));
}
