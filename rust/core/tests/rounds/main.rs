//! Single decisions of the host of a rendezvous, under a clock that is moved by hand: who takes part, and when a round begins and ends.

mod ending;
mod restarts;
mod table;

use std::time::Duration;

use ferroelastic_core::rendezvous::message::{HostMessage, Introduction, Join};
use ferroelastic_core::rendezvous::rounds::{HostAction, HostEvent, HostSettings, Id};
use ferroelastic_core::vocabulary::RestartCause;
use table::{
    JOIN_TIMEOUT, LOSS_GRACE, MOMENT, SECOND, SILENCE, Table, begun, closed, end, explained, introduction, over,
    refused, remarks, settings,
};

#[test]
fn the_store_is_emptied_before_any_node_begins() {
    let mut table = Table::new(settings(2, 2));
    table.enter(1, (2, 2));
    table.enter(2, (2, 2));
    table.join(2, None);
    let actions = table.join(1, None);
    assert_eq!(actions[0], HostAction::RenewStore);
    assert_eq!(actions.len(), 3);
}

#[test]
fn ranks_follow_the_host_the_names_and_the_roles() {
    let mut table = Table::new(settings(3, 3));
    for id in [3, 2, 1] {
        table.enter(id, (3, 3));
    }
    table.join_as(3, None, "trainer", 4);
    table.join_as(2, None, "reader", 1);
    let places = begun(&table.join_as(1, None, "trainer", 2));
    let ranks: Vec<_> = places
        .iter()
        .map(|(id, place)| (*id, place.group_rank, place.first_rank, place.first_role_rank, place.role_world_size))
        .collect();
    assert_eq!(ranks, [(1, 0, 0, 0, 6), (2, 1, 2, 0, 1), (3, 2, 3, 2, 6)]);
    assert!(places.iter().all(|(_, place)| (place.group_world_size, place.world_size) == (3, 7)));
}

#[test]
fn a_given_rank_is_kept_and_assigned_once() {
    let mut table = Table::new(settings(2, 2));
    let who =
        |id: Id, node_rank| Introduction { node_rank: Some(node_rank), name: format!("node{id}"), ..introduction(id) };
    table.step(HostEvent::Entered(7, who(7, 1)));
    assert_eq!(refused(&table.step(HostEvent::Entered(8, who(8, 1)))), None);
    let text = refused(&table.step(HostEvent::Beat(7, 1))).expect("refused");
    assert_eq!(text, "node rank 1 is taken by node7 (agent 100): give each node its own --node-rank");
    let text = refused(&table.step(HostEvent::Entered(9, who(9, 2)))).expect("refused");
    assert_eq!(text, "node rank 2 is not below the number of nodes, 2");
    table.step(HostEvent::Entered(9, who(9, 0)));
    table.join(7, None);
    let ranks: Vec<_> = begun(&table.join(9, None)).iter().map(|(id, place)| (*id, place.group_rank)).collect();
    assert_eq!(ranks, [(9, 0), (7, 1)]);
}

#[test]
fn an_agent_that_does_not_fit_the_job_is_told_the_reason() {
    let mut table = Table::new(settings(2, 2));
    let who = introduction(1);
    let stranger = Introduction { run_id: "other".into(), ..who.clone() };
    let text = refused(&table.step(HostEvent::Entered(1, stranger))).expect("refused");
    assert!(text.contains("belongs to job \"job\", not to job \"other\""), "{text}");
    let text = refused(&table.enter(2, (1, 4))).expect("refused");
    assert!(text.contains("--nnodes=2:2") && text.contains("--nnodes=1:4"), "{text}");
    let older = Introduction { protocol: 0, ..who };
    let text = refused(&table.step(HostEvent::Entered(3, older))).expect("refused");
    assert!(text.contains("version 0"), "{text}");
}

#[test]
fn the_host_is_warned_of_events_before_its_own_entry() {
    let mut table = Table::new(settings(2, 2));
    let text = "a foreign peer came".to_owned();
    assert_eq!(table.step(HostEvent::ForeignPeer(text.clone())), []);
    table.enter(2, (2, 2));
    let warned = remarks(&table.enter(1, (2, 2)));
    assert_eq!(warned, [(1, text)]);
}

#[test]
fn a_failure_ends_the_round_for_all_and_the_last_one_back_begins_the_next() {
    let mut table = Table::running(2, 3);
    let ended = over(&table.fail(2, 0, 50));
    assert_eq!(
        ended.iter().map(|(id, kind, _)| (*id, *kind)).collect::<Vec<_>>(),
        [1, 2, 3].map(|id| (id, RestartCause::Failure))
    );
    assert_eq!(ended[0].2, "rank 2 exited with 1 on node2");
    assert_eq!(begun(&table.join(1, Some(0))), []);
    // Two are enough, but the third is on its way.
    assert_eq!(begun(&table.join(3, Some(0))), []);
    assert_eq!(begun(&table.pass(60 * SECOND, &[1, 2, 3])), []);
    let places = begun(&table.join(2, Some(0)));
    assert_eq!(places.len(), 3);
    assert!(places.iter().all(|(_, place)| (place.round, place.failures, place.membership_changes) == (1, 1, 0)));
}

#[test]
fn the_first_failure_is_that_of_the_earliest_time() {
    let mut table = Table::running(2, 2);
    table.fail(2, 0, 50);
    assert_eq!(table.fail(1, 0, 40), []);
    table.join(1, Some(0));
    let places = begun(&table.join(2, Some(0)));
    let cause = places[0].1.cause.clone().expect("a cause");
    assert_eq!((cause.text.as_str(), cause.at_ns), ("rank 1 exited with 1 on node1", Some(40)));
    assert_eq!(places[0].1.failures, 1);
}

#[test]
fn a_failure_of_a_round_that_is_over_ends_no_other() {
    let mut table = Table::running(2, 2);
    table.fail(2, 0, 50);
    table.join(1, Some(0));
    table.join(2, Some(0));
    assert_eq!(table.fail(1, 0, 60), []);
}

#[test]
fn survivors_go_on_at_once_where_they_are_enough() {
    let mut table = Table::running(2, 3);
    let ended = over(&table.step(HostEvent::Lost(3, "its connection broke".into())));
    assert_eq!(ended.len(), 2);
    assert_eq!(ended[0].2, "node3 (agent 100) was lost: its connection broke");
    table.join(1, Some(0));
    let places = begun(&table.join(2, Some(0)));
    assert_eq!(places.len(), 2);
    assert!(places.iter().all(|(_, place)| (place.failures, place.membership_changes) == (0, 1)));
}

#[test]
fn survivors_that_are_too_few_wait_for_another_or_until_the_join_timeout() {
    let mut table = Table::running(2, 2);
    table.step(HostEvent::Lost(2, "gone".into()));
    assert_eq!(table.join(1, Some(0)), []);
    table.pass(JOIN_TIMEOUT.saturating_sub(SECOND), &[1]);
    table.enter(3, (2, 2));
    assert_eq!(begun(&table.join(3, None)).len(), 2);

    table.step(HostEvent::Lost(3, "gone".into()));
    table.join(1, Some(1));
    let actions = table.pass(JOIN_TIMEOUT, &[1]);
    let waiting = vec!["node1 (agent 100)".into()];
    let cause = Some("node3 (agent 100) was lost: gone".into());
    assert_eq!(actions, [HostAction::Send(1, HostMessage::TimedOut { waiting, cause })]);
}

#[test]
fn a_spare_takes_the_place_of_a_node_that_is_lost() {
    let mut table = Table::running(2, 2);
    table.enter(3, (2, 2));
    let why = "2 of 2 nodes run, and --nnodes allows no more";
    let told = [
        (3, format!("this node waits as a spare, and no worker is started: {why}")),
        (1, format!("node3 (agent 100) waits as a spare: {why}")),
    ];
    assert_eq!(remarks(&table.join(3, None)), told);
    table.pass(2 * JOIN_TIMEOUT, &[1, 2, 3]);
    table.step(HostEvent::Lost(2, "gone".into()));
    let places = begun(&table.join(1, Some(0)));
    assert_eq!(places.iter().map(|(id, place)| (*id, place.group_rank)).collect::<Vec<_>>(), [(1, 0), (3, 1)]);
}

#[test]
fn nodes_of_the_last_round_have_their_places_before_spares() {
    let mut table = Table::running(2, 2);
    table.enter(3, (2, 2));
    table.join(3, None);
    table.fail(1, 0, 1);
    assert_eq!(begun(&table.join(2, Some(0))), []);
    let places = begun(&table.join(1, Some(0)));
    assert_eq!(places.iter().map(|(id, place)| (*id, place.group_rank)).collect::<Vec<_>>(), [(1, 0), (2, 1)]);
}

#[test]
fn a_newcomer_interrupts_a_round_with_room() {
    let mut table = Table::running(1, 2);
    table.step(HostEvent::Lost(2, "gone".into()));
    table.join(1, Some(0));
    table.enter(3, (1, 2));
    let ended = over(&table.join(3, None));
    assert_eq!(ended, [(1, RestartCause::Membership, "node3 (agent 100) joins".into())]);
    assert_eq!(begun(&table.join(1, Some(1))).len(), 2);
}

#[test]
fn a_newcomer_does_not_interrupt_workers_that_are_about_to_succeed() {
    let mut table = Table::running(1, 3);
    table.step(HostEvent::Lost(3, "gone".into()));
    table.join(1, Some(0));
    table.join(2, Some(0));
    table.step(HostEvent::Finished(2, 1));
    table.enter(4, (1, 3));
    assert_eq!(begun(&table.join(4, None)), []);
    let actions = table.step(HostEvent::Finished(1, 1));
    let spare = HostMessage::Late { text: "the job has succeeded".into() };
    let told = [(1, HostMessage::Released), (2, HostMessage::Released), (4, spare)];
    assert_eq!(actions, told.map(|(id, notice)| HostAction::Send(id, notice)));
}

#[test]
fn membership_changes_have_a_limit_of_their_own() {
    let limited = HostSettings { max_membership_changes: Some(1), ..settings(1, 2) };
    let mut table = Table::new(limited);
    for id in [1, 2] {
        table.enter(id, (1, 2));
        table.join(id, None);
    }
    table.fail(1, 0, 1);
    table.join(1, Some(0));
    table.join(2, Some(0));
    table.step(HostEvent::Lost(2, "gone".into()));
    assert_eq!(begun(&table.join(1, Some(1))).len(), 1);
    // No more of them: who comes now is a spare.
    table.enter(3, (1, 2));
    assert_eq!(over(&table.join(3, None)), []);
    assert_eq!(table.rounds.closed(), None);
}

#[test]
fn a_failure_without_a_restart_left_closes_the_job_for_all() {
    let mut table = Table::running(2, 2);
    // It might be explained by a node that is lost.
    assert_eq!(table.fail_for_good(2, 0), []);
    let actions = table.pass(LOSS_GRACE, &[1, 2]);
    assert_eq!(explained(&actions), [1, 2].map(|id| end(id, "rank 2 exited with 1 on node2", 2)));
}

#[test]
fn a_node_that_has_finished_is_not_missed() {
    let mut table = Table::running(2, 2);
    table.step(HostEvent::Finished(2, 0));
    assert_eq!(table.step(HostEvent::Lost(2, "gone".into())), []);
    assert_eq!(table.step(HostEvent::Finished(1, 0)), [HostAction::Send(1, HostMessage::Released)]);
}

#[test]
fn a_node_that_has_finished_comes_back_when_another_fails() {
    let mut table = Table::running(2, 2);
    table.step(HostEvent::Finished(2, 0));
    assert_eq!(over(&table.fail(1, 0, 1)).len(), 2);
    table.join(1, Some(0));
    assert_eq!(begun(&table.join(2, Some(0))).len(), 2);
}

#[test]
fn a_silent_node_is_lost_after_the_silence_and_not_before() {
    let mut table = Table::running(1, 3);
    assert_eq!(table.pass(SILENCE.saturating_sub(MOMENT), &[1, 2]), []);
    let actions = table.pass(2 * MOMENT, &[1, 2]);
    assert!(
        matches!(&actions[0], HostAction::Send(3, HostMessage::Dropped { text }) if text.contains("silent for 15.0 s"))
    );
    assert_eq!(actions[1], HostAction::Disconnect(3));
    assert_eq!(over(&actions).len(), 2);
}

#[test]
fn a_host_that_was_suspended_declares_no_node_lost() {
    let mut table = Table::running(1, 3);
    table.now += 60 * SECOND;
    assert_eq!(table.step(HostEvent::Tick), []);
    // From then on it listens as before.
    assert_eq!(table.pass(SILENCE.saturating_sub(MOMENT), &[1, 2]), []);
    assert_ne!(table.pass(2 * MOMENT, &[1, 2]), []);
}

#[test]
fn a_newcomer_does_not_interrupt_a_round_that_a_node_has_finished_and_left() {
    let mut table = Table::running(1, 2);
    table.step(HostEvent::Finished(2, 0));
    table.step(HostEvent::Left(2, "it has waited long enough".into()));
    table.enter(3, (1, 2));
    assert_eq!(over(&table.join(3, None)), []);
}

/// Agent 2, over a connection that is later or earlier than its first.
fn again(connection: u64, node_rank: Option<u32>) -> Introduction {
    Introduction { connection, node_rank, ..introduction(2) }
}

#[test]
fn an_agent_that_comes_again_takes_its_own_place() {
    for node_ranks in [[None; 2], [Some(0), Some(1)]] {
        let mut table = Table::new(settings(2, 2));
        table.step(HostEvent::Entered(1, Introduction { node_rank: node_ranks[0], ..introduction(1) }));
        table.step(HostEvent::Entered(2, again(2, node_ranks[1])));
        table.join(1, None);
        table.join(2, None);
        // One that it has given up, and that was slower.
        assert_eq!(table.step(HostEvent::Entered(7, again(1, node_ranks[1]))), [HostAction::Disconnect(7)]);
        // Only it has seen its connection break.
        let actions = table.step(HostEvent::Entered(8, again(3, node_ranks[1])));
        assert!(actions.contains(&HostAction::Disconnect(2)), "{actions:?}");
        assert_eq!(refused(&actions), None);
        assert_eq!(
            over(&actions).iter().map(|(id, kind, _)| (*id, *kind)).collect::<Vec<_>>(),
            [(1, RestartCause::Membership)]
        );
        assert_eq!(table.step(HostEvent::Lost(2, "dropped".into())), []);
        table.join(8, None);
        assert_eq!(begun(&table.join(1, Some(0))).len(), 2);
    }
}

#[test]
fn a_node_that_has_finished_and_comes_again_has_finished() {
    let mut table = Table::running(2, 2);
    table.step(HostEvent::Finished(2, 0));
    table.step(HostEvent::Entered(8, again(3, None)));
    assert_eq!(table.step(HostEvent::Finished(8, 0)), []);
    assert!(table.step(HostEvent::Finished(1, 0)).contains(&HostAction::Send(8, HostMessage::Released)));
}

#[test]
fn a_node_that_has_finished_may_lose_its_connection() {
    let mut table = Table::running(2, 2);
    table.step(HostEvent::Finished(2, 0));
    table.step(HostEvent::Lost(2, "gone".into()));
    table.enter(7, (2, 2));
    // The same agent, over another connection.
    let who = Introduction { nodes: (2, 2), ..introduction(2) };
    table.step(HostEvent::Entered(8, who));
    assert_eq!(table.step(HostEvent::Finished(8, 0)), []);
    let ended = over(&table.step(HostEvent::Finished(7, 0)));
    assert_eq!(ended.iter().map(|(id, ..)| *id).collect::<Vec<_>>(), [7], "no worker of its was in this round");
    let actions = table.step(HostEvent::Finished(1, 0));
    assert!(actions.contains(&HostAction::Send(8, HostMessage::Released)), "{actions:?}");
    // An agent that comes now is late.
    let late = table.enter(9, (2, 2));
    let text = "the job has succeeded".into();
    assert_eq!(late[late.len() - 2..], [HostAction::Send(9, HostMessage::Late { text }), HostAction::Disconnect(9)]);
}

#[test]
fn a_node_that_has_finished_and_lost_its_connection_comes_back_too() {
    let mut table = Table::running(2, 2);
    table.step(HostEvent::Finished(2, 0));
    table.step(HostEvent::Lost(2, "gone".into()));
    table.step(HostEvent::Entered(8, Introduction { nodes: (2, 2), ..introduction(2) }));
    table.step(HostEvent::Finished(8, 0));
    assert_eq!(over(&table.fail(1, 0, 1)).len(), 2);
    table.join(1, Some(0));
    assert_eq!(begun(&table.join(8, Some(0))).len(), 2);
}

#[test]
fn a_node_that_has_finished_hears_that_its_round_was_over() {
    let mut table = Table::running(2, 2);
    table.step(HostEvent::Finished(2, 0));
    table.step(HostEvent::Lost(2, "gone".into()));
    table.fail(1, 0, 1);
    table.step(HostEvent::Entered(8, Introduction { nodes: (2, 2), ..introduction(2) }));
    let actions = table.step(HostEvent::Finished(8, 0));
    assert_eq!(over(&actions), [(8, RestartCause::Failure, "rank 1 exited with 1 on node1".into())]);
}

#[test]
fn times_out_of_range_of_the_clock_have_no_deadline() {
    let endless = HostSettings { last_call: Duration::MAX, silence: Duration::MAX, ..settings(1, 2) };
    let mut table = Table::new(endless);
    table.enter(1, (1, 2));
    assert_eq!(begun(&table.join(1, None)), []);
    table.enter(2, (1, 2));
    let timeout = Duration::MAX;
    let join = Join { after: None, role: "default".into(), local_world_size: 2, timeout };
    assert_eq!(begun(&table.step(HostEvent::Joined(2, join))).len(), 2);
}

#[test]
fn of_many_waiting_nodes_some_are_named() {
    let mut table = Table::new(settings(100, 100));
    for id in 1..=99 {
        table.enter(id, (100, 100));
        table.join(id, None);
    }
    let actions = table.pass(JOIN_TIMEOUT, &(1..=99).collect::<Vec<_>>());
    let HostAction::Send(1, HostMessage::TimedOut { waiting, .. }) = &actions[0] else { panic!("{actions:?}") };
    assert_eq!((waiting.len(), waiting[32].as_str()), (33, "67 more"));
}

#[test]
fn an_agent_that_comes_after_the_end_was_no_spare() {
    for is_success in [true, false] {
        let mut table = Table::running(2, 2);
        table.enter(3, (2, 2));
        table.join(3, None);
        if is_success {
            table.step(HostEvent::Finished(1, 0));
            table.step(HostEvent::Finished(2, 0));
        } else {
            table.fail_for_good(2, 0);
            table.pass(LOSS_GRACE, &[1, 2, 3]);
        }
        let actions = table.enter(4, (2, 2));
        let text = table.rounds.closed().expect("the end").to_owned();
        assert_eq!(
            actions[1..],
            [HostAction::Send(4, HostMessage::Late { text: text.clone() }), HostAction::Disconnect(4)]
        );
        // An agent that was there before, and whose connection broke, hears how the job has ended.
        table.step(HostEvent::Lost(3, "gone".into()));
        let code = if is_success { 0 } else { 7 };
        assert_eq!(closed(&table.enter(3, (2, 2))), [(3, text, code)]);
    }
}

#[test]
fn all_nodes_hear_of_the_failure_and_its_exit_code() {
    let mut table = Table::running(3, 3);
    table.enter(4, (3, 3));
    table.join(4, None);
    // Its workers have succeeded, which changes nothing.
    table.step(HostEvent::Finished(1, 0));
    table.fail_for_good(2, 0);
    let told = [1, 2, 3, 4].map(|id| end(id, "rank 2 exited with 1 on node2", 2));
    assert_eq!(explained(&table.pass(LOSS_GRACE, &[1, 2, 3, 4])), told);
}

#[test]
fn settings_that_differ_are_refused_with_both_values() {
    let who = |id, restarts: &str| {
        let settings = [("--max-restarts".to_owned(), restarts.to_owned())].into();
        Introduction { settings, ..introduction(id) }
    };
    let text = "the job has --max-restarts=3, this node was started with --max-restarts=1: give all nodes the same";
    let mut table = Table::new(settings(2, 2));
    table.step(HostEvent::Entered(1, who(1, "3")));
    assert_eq!(refused(&table.step(HostEvent::Entered(2, who(2, "1")))).as_deref(), Some(text));
    assert_eq!(refused(&table.step(HostEvent::Entered(3, who(3, "3")))), None);
    // The host's count, also if it comes later.
    let mut table = Table::new(settings(2, 2));
    table.step(HostEvent::Entered(2, who(2, "1")));
    table.join(2, None);
    let actions = table.step(HostEvent::Entered(1, who(1, "3")));
    assert_eq!(refused(&actions).as_deref(), Some(text));
    assert!(actions.contains(&HostAction::Disconnect(2)), "{actions:?}");
    let (host, told) = &remarks(&actions)[0];
    assert!(*host == 1 && told.ends_with(text), "{told}");
    assert_eq!(begun(&table.join(1, None)), []);
}

#[test]
fn a_refused_agent_is_reported_by_the_host() {
    let mut table = Table::new(settings(2, 2));
    table.enter(1, (2, 2));
    let actions = table.enter(2, (1, 4));
    let (host, text) = &remarks(&actions)[0];
    assert!(*host == 1 && text.starts_with("node2 (agent 100) was turned away: the job has --nnodes=2:2"), "{text}");
}

#[test]
fn agents_that_wait_are_told_the_reason_and_each_change_of_it() {
    let mut table = Table::new(settings(3, 4));
    table.enter(1, (3, 4));
    table.join(1, None);
    let told = |actions: &[HostAction]| remarks(actions).into_iter().map(|(_, text)| text).collect::<Vec<_>>();
    let one = "waiting for nodes: 1 of at least 3 have joined (node1 (agent 100))";
    assert_eq!(told(&table.listen(60 * SECOND, &[1])), [one]);
    table.enter(2, (3, 4));
    table.join(2, None);
    let two = "waiting for nodes: 2 of at least 3 have joined (node1 (agent 100), node2 (agent 100))";
    assert_eq!(told(&table.listen(60 * SECOND, &[1, 2])), [two; 2]);
    table.enter(3, (3, 4));
    table.join(3, None);
    let enough = "3 nodes have joined, which is enough; waiting for up to 4 nodes until the last call ends";
    assert_eq!(told(&table.listen(20 * SECOND, &[1, 2, 3])), [enough; 3]);
    assert_eq!(begun(&table.pass(20 * SECOND, &[1, 2, 3])).len(), 3);
    table.fail(1, 0, 1);
    table.join(1, Some(0));
    table.join(2, Some(0));
    let stop = "waiting for nodes that are stopping their workers: node3 (agent 100)";
    assert_eq!(told(&table.listen(60 * SECOND, &[1, 2, 3])), [stop; 2]);
}

#[test]
fn a_spare_that_may_not_join_is_told_the_reason() {
    let mut table = Table::new(HostSettings { max_membership_changes: Some(0), ..settings(1, 2) });
    table.enter(1, (1, 2));
    table.join(1, None);
    table.pass(60 * SECOND, &[1]);
    table.enter(2, (1, 2));
    let told = remarks(&table.join(2, None));
    let why = "1 of 2 nodes run, but no membership change is left (max_membership_changes)";
    assert!(told[0].0 == 2 && told[0].1.ends_with(why), "{told:?}");
}

#[test]
fn the_replacement_of_a_silent_node_waits_until_that_is_lost() {
    let mut table = Table::new(settings(2, 2));
    let who = |id: Id, rank| Introduction { node_rank: Some(rank), ..introduction(id) };
    for (id, rank) in [(1, 0), (2, 1)] {
        table.step(HostEvent::Entered(id, who(id, rank)));
        table.join(id, None);
    }
    table.pass(3 * SECOND, &[1]);
    let actions = table.step(HostEvent::Entered(7, who(7, 1)));
    let text = "node rank 1 is held by node2 (agent 100), last heard from 3.0 s ago: waiting until that node responds or is lost";
    assert_eq!(actions, [HostAction::Send(7, HostMessage::Warning { text: text.into() })]);
    // One that goes in the meantime is not taken in later.
    table.step(HostEvent::Entered(6, who(6, 1)));
    table.step(HostEvent::Lost(6, "gone".into()));
    let actions = table.pass(SILENCE, &[1]);
    assert_eq!(over(&actions).len(), 1);
    assert!(actions.contains(&HostAction::Send(7, HostMessage::Welcome { silence: SILENCE })), "{actions:?}");
    table.join(1, Some(0));
    let ranks: Vec<_> = begun(&table.join(7, None)).iter().map(|(id, place)| (*id, place.group_rank)).collect();
    assert_eq!(ranks, [(1, 0), (7, 1)]);
}

#[test]
fn the_silence_of_a_node_is_looked_into_and_reported() {
    let mut table = Table::running(1, 2);
    let actions = table.listen(SILENCE / 2, &[1]);
    let probe = actions.iter().position(|action| *action == HostAction::Send(2, HostMessage::Probe)).expect("a probe");
    assert!(actions[probe..].contains(&HostAction::CheckProbe(2)), "{actions:?}");
    for (is_acknowledged, guess) in [(true, "the agent is suspended or stuck"), (false, "network to it is down")] {
        let told = remarks(&table.step(HostEvent::ProbeChecked(2, is_acknowledged)));
        assert!(told[0].0 == 1 && told[0].1.contains(guess), "{told:?}");
    }
    // It goes on.
    assert_eq!(over(&table.pass(SILENCE, &[1, 2])), []);
    assert_eq!(table.step(HostEvent::ProbeChecked(2, true)), []);
}

#[test]
fn an_agent_that_waits_for_a_rank_hears_of_the_end() {
    let mut table = Table::new(settings(2, 2));
    let who = |id: Id, rank| Introduction { node_rank: Some(rank), ..introduction(id) };
    for (id, rank) in [(1, 0), (2, 1)] {
        table.step(HostEvent::Entered(id, who(id, rank)));
        table.join(id, None);
    }
    table.step(HostEvent::Entered(7, who(7, 1)));
    let actions = table.step(HostEvent::Closed(1, "it was told to end".into(), 143));
    let text = "node1 (agent 100): it was told to end".to_owned();
    assert!(
        actions.ends_with(&[HostAction::Send(7, HostMessage::Late { text }), HostAction::Disconnect(7)]),
        "{actions:?}"
    );
}
