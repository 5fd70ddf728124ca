//! What a round has ended of: of which failure, or of a node that is lost; and what ends the job.

use std::time::Duration;

use ferroelastic_core::rendezvous::message::Place;
use ferroelastic_core::rendezvous::rounds::HostEvent;
use ferroelastic_core::vocabulary::RestartCause;

use crate::table::{
    LOSS_GRACE, MOMENT, SECOND, SILENCE, Table, begun, detail, end, explained, introduction, last, over,
};

#[test]
fn a_note_of_a_worker_in_the_store_is_a_failure() {
    let mut table = Table::running(2, 2);
    let ended = over(
        &table.step(HostEvent::FailureAnnounced { text: "rank 3 wrote /remote_error".into(), grace: Duration::ZERO }),
    );
    assert_eq!(ended.len(), 2);
    assert_eq!(ended[0].1, RestartCause::Failure);
}

#[test]
fn after_a_note_that_workers_write_evidence_they_have_time_for_it() {
    let mut table = Table::running(2, 2);
    let grace = 20 * SECOND;
    assert_eq!(table.step(HostEvent::FailureAnnounced { text: "rank 3 wrote /exception_dump".into(), grace }), []);
    assert_eq!(table.pass(grace.saturating_sub(MOMENT), &[1, 2]), []);
    assert_eq!(over(&table.pass(2 * MOMENT, &[1, 2])).len(), 2);
    // A worker that fails meanwhile ends the round before.
    table.join(1, Some(0));
    table.join(2, Some(0));
    table.step(HostEvent::FailureAnnounced { text: "rank 3 wrote /exception_dump".into(), grace });
    assert_eq!(over(&table.fail(1, 1, 1)).len(), 2);
    table.join(1, Some(1));
    table.join(2, Some(1));
    assert_eq!(table.pass(2 * grace, &[1, 2]), []);
}

#[test]
fn of_two_notes_the_earlier_deadline_counts() {
    let mut table = Table::running(2, 2);
    let grace = 20 * SECOND;
    table.step(HostEvent::FailureAnnounced { text: "rank 3 wrote /exception_dump".into(), grace });
    let error = HostEvent::FailureAnnounced { text: "rank 3 wrote /remote_error".into(), grace: Duration::ZERO };
    assert_eq!(over(&table.step(error)).len(), 2);
}

#[test]
fn workers_that_fail_because_their_peers_are_lost_have_not_failed() {
    let mut table = Table::running(2, 3);
    // Heard of before the loss.
    assert_eq!(over(&table.fail(1, 0, 1)).len(), 3);
    table.join(1, Some(0));
    table.step(HostEvent::Lost(3, "its connection broke".into()));
    let places = begun(&table.join(2, Some(0)));
    assert_eq!(places.len(), 2);
    assert!(places.iter().all(|(_, place)| (place.failures, place.membership_changes) == (0, 1)));
    let cause = places[0].1.cause.clone().expect("a cause");
    assert_eq!(
        (cause.kind, cause.text.as_str()),
        (RestartCause::Membership, "node3 (agent 100) was lost: its connection broke")
    );
}

#[test]
fn a_node_that_is_lost_a_while_after_a_failure_does_not_explain_it() {
    let mut table = Table::running(2, 3);
    table.fail(1, 0, 1);
    table.join(1, Some(0));
    table.pass(LOSS_GRACE + MOMENT, &[1, 2, 3]);
    table.step(HostEvent::Lost(3, "its connection broke".into()));
    let places = begun(&table.join(2, Some(0)));
    assert!(places.iter().all(|(_, place)| (place.failures, place.membership_changes) == (1, 0)));
}

#[test]
fn a_silence_dates_back_to_when_the_node_was_heard_last() {
    for (quiet_since, failures) in [(Duration::ZERO, 0), (4 * SECOND, 1)] {
        let mut table = Table::running(2, 3);
        table.fail(1, 0, 1);
        table.join(1, Some(0));
        table.join(2, Some(0));
        table.pass(quiet_since, &[1, 2, 3]);
        let places = begun(&table.pass(SILENCE + SECOND, &[1, 2]));
        assert_eq!(places.len(), 2);
        let counts = |place: &Place| (place.failures, place.membership_changes);
        assert!(places.iter().all(|(_, place)| counts(place) == (failures, 1 - failures)), "{places:?}");
    }
}

#[test]
fn a_last_failure_waits_for_what_becomes_of_a_silent_node() {
    for comes_back in [false, true] {
        let mut table = Table::running(2, 3);
        // Its guard has ended its workers, and with them those of others fail.
        table.pass(SILENCE.saturating_sub(SECOND), &[1, 2]);
        assert_eq!(table.fail_for_good(1, 0), []);
        assert_eq!(table.pass(SECOND / 2, &[1, 2]), []);
        if comes_back {
            table.step(HostEvent::Beat(3, 1));
        }
        let actions = table.pass(2 * SECOND, &[1, 2]);
        assert_eq!(table.rounds.closed().is_some(), comes_back);
        assert!(over(&actions).iter().all(|(_, kind, _)| *kind == RestartCause::Membership));
        assert_eq!(over(&actions).len(), if comes_back { 0 } else { 2 });
    }
}

#[test]
fn a_node_that_leaves_explains_no_failure() {
    let mut table = Table::running(2, 3);
    table.fail(1, 0, 1);
    table.step(HostEvent::Left(3, "its agent was ended by SIGTERM".into()));
    table.join(1, Some(0));
    let places = begun(&table.join(2, Some(0)));
    assert!(places.iter().all(|(_, place)| (place.failures, place.membership_changes) == (1, 0)));
    // Nor does it save a job whose last failure has been.
    let mut table = Table::running(2, 3);
    assert_eq!(table.fail_for_good(1, 0), []);
    assert_eq!(over(&table.step(HostEvent::Left(3, "its agent was ended by SIGTERM".into()))), []);
    table.pass(LOSS_GRACE, &[1, 2]);
    assert_eq!(table.rounds.closed(), Some("rank 1 exited with 1 on node1, and no restart is left"));
    // A note of a failure is one, also if its worker has not ended by then.
    let mut table = Table::running(2, 3);
    table.step(HostEvent::FailureAnnounced { text: "rank 3 wrote /exception_dump".into(), grace: 20 * SECOND });
    let ended = over(&table.step(HostEvent::Left(3, "its agent was ended by SIGTERM".into())));
    assert_eq!(ended.iter().map(|(_, kind, _)| *kind).collect::<Vec<_>>(), [RestartCause::Failure; 2]);
}

#[test]
fn each_failure_counts_though_a_node_is_lost_each_time_workers_are_stopped() {
    let mut table = Table::running(2, 3);
    for round in 0..3 {
        table.fail(1, round, 1);
        table.join(1, Some(round));
        let stopping = 3 + round;
        table.pass(SECOND, &[1, 2, stopping]);
        table.step(HostEvent::Lost(stopping, "it was killed".into()));
        table.enter(stopping + 1, (2, 3));
        table.join(stopping + 1, None);
        let places = begun(&table.join(2, Some(round)));
        assert!(places.iter().all(|(_, place)| place.failures == round + 1), "{places:?}");
        assert_eq!(places.len(), 3);
    }
}

#[test]
fn the_last_failure_is_none_if_a_node_was_lost() {
    let mut table = Table::running(2, 3);
    assert_eq!(table.fail_for_good(1, 0), []);
    // Nor does another failure of the same round make it less final.
    assert_eq!(table.fail(2, 0, 1), []);
    let ended = over(&table.step(HostEvent::Lost(3, "its connection broke".into())));
    assert_eq!(
        ended.iter().map(|(id, kind, _)| (*id, *kind)).collect::<Vec<_>>(),
        [1, 2].map(|id| (id, RestartCause::Membership))
    );
    // Heard of after the loss.
    assert_eq!(table.fail_for_good(2, 0), []);
    table.pass(LOSS_GRACE, &[1, 2]);
    table.join(1, Some(0));
    assert_eq!(begun(&table.join(2, Some(0))).len(), 2);
}

#[test]
fn a_newcomer_does_not_undo_the_last_failure() {
    let mut table = Table::running(2, 3);
    table.step(HostEvent::Lost(3, "gone".into()));
    table.join(1, Some(0));
    table.join(2, Some(0));
    assert_eq!(table.fail_for_good(1, 1), []);
    table.enter(4, (2, 3));
    assert_eq!(over(&table.join(4, None)), []);
    table.pass(LOSS_GRACE, &[1, 2, 4]);
    assert_eq!(table.rounds.closed(), Some("rank 1 exited with 1 on node1, and no restart is left"));
}

#[test]
fn a_node_that_starts_again_does_not_undo_the_last_failure() {
    let mut table = Table::running(2, 3);
    assert_eq!(table.fail_for_good(1, 0), []);
    assert_eq!(begun(&table.join(2, Some(0))), []);
    assert_eq!(table.rounds.closed(), Some("rank 1 exited with 1 on node1, and no restart is left"));
}

#[test]
fn a_note_in_the_store_does_not_hasten_the_last_failure() {
    let mut table = Table::running(2, 3);
    table.fail_for_good(1, 0);
    table.step(HostEvent::FailureAnnounced { text: "rank 2 wrote /remote_error".into(), grace: Duration::ZERO });
    assert_eq!(over(&table.step(HostEvent::Lost(3, "gone".into()))).len(), 2);
}

#[test]
fn of_two_last_failures_the_first_is_named_whichever_is_heard_first() {
    for order in [[1, 2], [2, 1]] {
        let mut table = Table::running(2, 2);
        for id in order {
            table.step(HostEvent::Failed {
                id,
                round: 0,
                at_ns: id,
                text: format!("rank {id} fell"),
                code: 7,
                facts: last(),
                detail: detail(id),
            });
        }
        table.pass(SECOND, &[1, 2]);
        assert_eq!(table.rounds.closed(), Some("rank 1 fell on node1, and no restart is left"));
    }
}

#[test]
fn a_job_of_one_node_ends_at_once() {
    let mut table = Table::running(1, 1);
    assert_eq!(explained(&table.fail_for_good(1, 0)), [end(1, "rank 1 exited with 1 on node1", 1)]);
}

#[test]
fn a_failure_after_the_end_of_the_job_starts_no_round() {
    let mut table = Table::running(2, 2);
    table.step(HostEvent::Closed(1, "it was told to end".into(), 143));
    assert_eq!(table.fail(2, 0, 1), []);
    table.step(HostEvent::Entered(3, introduction(3)));
    let actions = table.join(3, None);
    assert!(begun(&actions).is_empty(), "{actions:?}");
}
