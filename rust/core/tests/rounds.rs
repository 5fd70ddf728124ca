//! Single decisions of the host of a rendezvous, under a clock that is moved by hand.

use std::time::{Duration, Instant};

use ferroelastic_core::rendezvous::message::{Introduction, Join, Kind, Notice, PROTOCOL, Place};
use ferroelastic_core::rendezvous::rounds::{Action, Event, Id, Rounds, Settings};

const SECOND: Duration = Duration::from_secs(1);
const SILENCE: Duration = Duration::from_secs(5);
const JOIN_TIMEOUT: Duration = Duration::from_secs(600);
const LOSS_GRACE: Duration = Duration::from_millis(250);
const MOMENT: Duration = Duration::from_millis(10);

fn settings(min_nodes: u32, max_nodes: u32) -> Settings {
    Settings {
        run_id: "job".into(),
        min_nodes,
        max_nodes,
        last_call: 30 * SECOND,
        silence: SILENCE,
        address: None,
        most_membership_changes: None,
    }
}

fn introduction(id: Id) -> Introduction {
    Introduction {
        protocol: PROTOCOL,
        run_id: "job".into(),
        name: format!("node{id}"),
        pid: 100,
        membership: id,
        connection: id,
        is_host: id == 1,
        nodes: (2, 2),
        node_rank: None,
    }
}

/// A rendezvous and the time. Agents have the numbers from 1; that of the host is number 1.
struct Table {
    rounds: Rounds,
    now: Instant,
}

impl Table {
    fn new(settings: Settings) -> Self {
        let now = Instant::now();
        Self { rounds: Rounds::new(settings, now), now }
    }

    fn step(&mut self, event: Event) -> Vec<Action> {
        self.rounds.step(self.now, event)
    }

    fn enter(&mut self, id: Id, nodes: (u32, u32)) -> Vec<Action> {
        let who = Introduction { nodes, ..introduction(id) };
        self.step(Event::Entered(id, who))
    }

    fn join(&mut self, id: Id, after: Option<u64>) -> Vec<Action> {
        self.join_as(id, after, "default", 2)
    }

    fn join_as(&mut self, id: Id, after: Option<u64>, role: &str, local_world_size: u64) -> Vec<Action> {
        self.step(Event::Joined(id, Join { after, role: role.into(), local_world_size, timeout: JOIN_TIMEOUT }))
    }

    fn fail(&mut self, id: Id, round: u64, at_ns: u64) -> Vec<Action> {
        self.step(Event::Failed { id, round, at_ns, text: format!("rank {id} exited with 1"), is_final: false })
    }

    fn fail_for_good(&mut self, id: Id, round: u64) -> Vec<Action> {
        self.step(Event::Failed { id, round, at_ns: 1, text: format!("rank {id} exited with 1"), is_final: true })
    }

    /// So many agents in their first round.
    fn running(min_nodes: u32, max_nodes: u32) -> Self {
        let mut table = Self::new(settings(min_nodes, max_nodes));
        for id in 1..=u64::from(max_nodes) {
            table.enter(id, (min_nodes, max_nodes));
        }
        let last: Vec<_> = (1..=u64::from(max_nodes)).map(|id| table.join(id, None)).collect();
        assert_eq!(begun(last.last().expect("one")).len(), max_nodes as usize);
        table
    }

    /// Lets time pass as it does: with a tick whenever one is due, and beats of those who live.
    fn pass(&mut self, time: Duration, living: &[Id]) -> Vec<Action> {
        let end = self.now + time;
        let mut actions = Vec::new();
        loop {
            let beat = self.now + SECOND;
            let next = self.rounds.next_tick().unwrap_or(end).min(beat).min(end);
            self.now = next.max(self.now);
            for id in living {
                actions.extend(self.step(Event::Beat(*id)));
            }
            actions.extend(self.step(Event::Tick));
            if self.now >= end {
                actions.retain(|action| !matches!(action, Action::Tell(_, Notice::Beat)));
                return actions;
            }
        }
    }
}

fn begun(actions: &[Action]) -> Vec<(Id, Place)> {
    let begun = actions.iter().filter_map(|action| match action {
        Action::Tell(id, Notice::Begin(place)) => Some((*id, place.clone())),
        _ => None,
    });
    begun.collect()
}

fn over(actions: &[Action]) -> Vec<(Id, Kind, String)> {
    let over = actions.iter().filter_map(|action| match action {
        Action::Tell(id, Notice::Over { cause, .. }) => Some((*id, cause.kind, cause.text.clone())),
        _ => None,
    });
    over.collect()
}

fn refused(actions: &[Action]) -> Option<String> {
    actions.iter().find_map(|action| match action {
        Action::Tell(_, Notice::Refused { text }) => Some(text.clone()),
        _ => None,
    })
}

#[test]
fn the_store_is_emptied_before_anybody_begins() {
    let mut table = Table::new(settings(2, 2));
    table.enter(1, (2, 2));
    table.enter(2, (2, 2));
    table.join(2, None);
    let actions = table.join(1, None);
    assert_eq!(actions[0], Action::RenewStore);
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
fn a_rank_that_was_given_beforehand_is_kept_and_given_once() {
    let mut table = Table::new(settings(2, 2));
    let who =
        |id: Id, node_rank| Introduction { node_rank: Some(node_rank), name: format!("node{id}"), ..introduction(id) };
    table.step(Event::Entered(7, who(7, 1)));
    let text = refused(&table.step(Event::Entered(8, who(8, 1)))).expect("refused");
    assert_eq!(text, "node rank 1 is taken by node7 (agent 100): give each node its own --node-rank");
    let text = refused(&table.step(Event::Entered(9, who(9, 2)))).expect("refused");
    assert_eq!(text, "node rank 2 is not below the number of nodes, 2");
    table.step(Event::Entered(9, who(9, 0)));
    table.join(7, None);
    let ranks: Vec<_> = begun(&table.join(9, None)).iter().map(|(id, place)| (*id, place.group_rank)).collect();
    assert_eq!(ranks, [(9, 0), (7, 1)]);
}

#[test]
fn who_does_not_belong_here_is_told_why() {
    let mut table = Table::new(settings(2, 2));
    let who = introduction(1);
    let stranger = Introduction { run_id: "other".into(), ..who.clone() };
    let text = refused(&table.step(Event::Entered(1, stranger))).expect("refused");
    assert!(text.contains("that of job \"job\", not of job \"other\""), "{text}");
    let text = refused(&table.enter(2, (1, 4))).expect("refused");
    assert!(text.contains("--nnodes=2:2") && text.contains("--nnodes=1:4"), "{text}");
    let older = Introduction { protocol: 0, ..who };
    let text = refused(&table.step(Event::Entered(3, older))).expect("refused");
    assert!(text.contains("version 0"), "{text}");
}

#[test]
fn a_failure_ends_the_round_for_all_and_the_last_one_back_begins_the_next() {
    let mut table = Table::running(2, 3);
    let ended = over(&table.fail(2, 0, 50));
    assert_eq!(
        ended.iter().map(|(id, kind, _)| (*id, *kind)).collect::<Vec<_>>(),
        [1, 2, 3].map(|id| (id, Kind::Failure))
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
    let ended = over(&table.step(Event::Lost(3, "its connection broke".into())));
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
    table.step(Event::Lost(2, "gone".into()));
    assert_eq!(table.join(1, Some(0)), []);
    table.pass(JOIN_TIMEOUT.saturating_sub(SECOND), &[1]);
    table.enter(3, (2, 2));
    assert_eq!(begun(&table.join(3, None)).len(), 2);

    table.step(Event::Lost(3, "gone".into()));
    table.join(1, Some(1));
    let actions = table.pass(JOIN_TIMEOUT, &[1]);
    let waiting = vec!["node1 (agent 100)".into()];
    let cause = Some("node3 (agent 100) was lost: gone".into());
    assert_eq!(actions, [Action::Tell(1, Notice::TimedOut { waiting, cause })]);
}

#[test]
fn a_spare_takes_the_place_of_a_node_that_is_lost() {
    let mut table = Table::running(2, 2);
    table.enter(3, (2, 2));
    let text = "node3 (agent 100) waits as a spare".to_owned();
    assert_eq!(table.join(3, None), [Action::Tell(1, Notice::Remark { text })]);
    table.pass(2 * JOIN_TIMEOUT, &[1, 2, 3]);
    table.step(Event::Lost(2, "gone".into()));
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
    table.step(Event::Lost(2, "gone".into()));
    table.join(1, Some(0));
    table.enter(3, (1, 2));
    let ended = over(&table.join(3, None));
    assert_eq!(ended, [(1, Kind::Membership, "node3 (agent 100) joins".into())]);
    assert_eq!(begun(&table.join(1, Some(1))).len(), 2);
}

#[test]
fn a_newcomer_does_not_interrupt_workers_that_are_about_to_succeed() {
    let mut table = Table::running(1, 3);
    table.step(Event::Lost(3, "gone".into()));
    table.join(1, Some(0));
    table.join(2, Some(0));
    table.step(Event::Finished(2, 1));
    table.enter(4, (1, 3));
    assert_eq!(begun(&table.join(4, None)), []);
    let actions = table.step(Event::Finished(1, 1));
    let spare = Notice::Closed { text: "the job has succeeded".into(), is_spare: true };
    let told = [(1, Notice::Released), (2, Notice::Released), (4, spare)];
    assert_eq!(actions, told.map(|(id, notice)| Action::Tell(id, notice)));
}

#[test]
fn membership_changes_have_a_limit_of_their_own() {
    let limited = Settings { most_membership_changes: Some(1), ..settings(1, 2) };
    let mut table = Table::new(limited);
    for id in [1, 2] {
        table.enter(id, (1, 2));
        table.join(id, None);
    }
    table.fail(1, 0, 1);
    table.join(1, Some(0));
    table.join(2, Some(0));
    table.step(Event::Lost(2, "gone".into()));
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
    let text = "rank 2 exited with 1 on node2, and no restart is left".to_owned();
    assert_eq!(actions[0], Action::Tell(1, Notice::Closed { text: text.clone(), is_spare: false }));
    table.enter(3, (2, 2));
    assert_eq!(table.join(3, None), [Action::Tell(3, Notice::Closed { text, is_spare: false })]);
}

#[test]
fn a_node_that_has_finished_is_not_missed() {
    let mut table = Table::running(2, 2);
    table.step(Event::Finished(2, 0));
    assert_eq!(table.step(Event::Lost(2, "gone".into())), []);
    assert_eq!(table.step(Event::Finished(1, 0)), [Action::Tell(1, Notice::Released)]);
}

#[test]
fn a_node_that_has_finished_comes_back_when_another_fails() {
    let mut table = Table::running(2, 2);
    table.step(Event::Finished(2, 0));
    assert_eq!(over(&table.fail(1, 0, 1)).len(), 2);
    table.join(1, Some(0));
    assert_eq!(begun(&table.join(2, Some(0))).len(), 2);
}

#[test]
fn a_silent_node_is_lost_after_the_silence_and_not_before() {
    let mut table = Table::running(1, 3);
    assert_eq!(table.pass(SILENCE.saturating_sub(MOMENT), &[1, 2]), []);
    let actions = table.pass(2 * MOMENT, &[1, 2]);
    assert!(matches!(&actions[0], Action::Tell(3, Notice::Dropped { text }) if text.contains("silent for 5.0 s")));
    assert_eq!(actions[1], Action::Drop(3));
    assert_eq!(over(&actions).len(), 2);
}

#[test]
fn a_host_that_was_paused_blames_nobody() {
    let mut table = Table::running(1, 3);
    table.now += 60 * SECOND;
    assert_eq!(table.step(Event::Tick), []);
    // From then on it listens as before.
    assert_eq!(table.pass(SILENCE.saturating_sub(MOMENT), &[1, 2]), []);
    assert_ne!(table.pass(2 * MOMENT, &[1, 2]), []);
}

#[test]
fn a_note_of_a_worker_in_the_store_is_a_failure() {
    let mut table = Table::running(2, 2);
    let ended =
        over(&table.step(Event::Announced { text: "rank 3 wrote /remote_error".into(), grace: Duration::ZERO }));
    assert_eq!(ended.len(), 2);
    assert_eq!(ended[0].1, Kind::Failure);
}

#[test]
fn after_a_note_that_workers_write_evidence_they_have_time_for_it() {
    let mut table = Table::running(2, 2);
    let grace = 20 * SECOND;
    assert_eq!(table.step(Event::Announced { text: "rank 3 wrote /exception_dump".into(), grace }), []);
    assert_eq!(table.pass(grace.saturating_sub(MOMENT), &[1, 2]), []);
    assert_eq!(over(&table.pass(2 * MOMENT, &[1, 2])).len(), 2);
    // A worker that fails meanwhile ends the round before.
    table.join(1, Some(0));
    table.join(2, Some(0));
    table.step(Event::Announced { text: "rank 3 wrote /exception_dump".into(), grace });
    assert_eq!(over(&table.fail(1, 1, 1)).len(), 2);
    table.join(1, Some(1));
    table.join(2, Some(1));
    assert_eq!(table.pass(2 * grace, &[1, 2]), []);
}

#[test]
fn of_two_notes_the_earlier_deadline_counts() {
    let mut table = Table::running(2, 2);
    let grace = 20 * SECOND;
    table.step(Event::Announced { text: "rank 3 wrote /exception_dump".into(), grace });
    let error = Event::Announced { text: "rank 3 wrote /remote_error".into(), grace: Duration::ZERO };
    assert_eq!(over(&table.step(error)).len(), 2);
}

#[test]
fn workers_that_fail_because_their_peers_are_lost_have_not_failed() {
    let mut table = Table::running(2, 3);
    // Heard of before the loss.
    assert_eq!(over(&table.fail(1, 0, 1)).len(), 3);
    table.join(1, Some(0));
    table.step(Event::Lost(3, "its connection broke".into()));
    let places = begun(&table.join(2, Some(0)));
    assert_eq!(places.len(), 2);
    assert!(places.iter().all(|(_, place)| (place.failures, place.membership_changes) == (0, 1)));
    let cause = places[0].1.cause.clone().expect("a cause");
    assert_eq!(
        (cause.kind, cause.text.as_str()),
        (Kind::Membership, "node3 (agent 100) was lost: its connection broke")
    );
}

#[test]
fn a_node_that_is_lost_long_after_a_failure_does_not_explain_it() {
    let mut table = Table::running(2, 3);
    table.fail(1, 0, 1);
    table.join(1, Some(0));
    table.pass(SILENCE, &[1, 2, 3]);
    table.step(Event::Lost(3, "its connection broke".into()));
    let places = begun(&table.join(2, Some(0)));
    assert!(places.iter().all(|(_, place)| (place.failures, place.membership_changes) == (1, 0)));
}

#[test]
fn the_last_failure_is_none_if_a_node_was_lost() {
    let mut table = Table::running(2, 3);
    assert_eq!(table.fail_for_good(1, 0), []);
    // Nor does another failure of the same round make it less final.
    assert_eq!(table.fail(2, 0, 1), []);
    let ended = over(&table.step(Event::Lost(3, "its connection broke".into())));
    assert_eq!(
        ended.iter().map(|(id, kind, _)| (*id, *kind)).collect::<Vec<_>>(),
        [1, 2].map(|id| (id, Kind::Membership))
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
    table.step(Event::Lost(3, "gone".into()));
    table.join(1, Some(0));
    table.join(2, Some(0));
    assert_eq!(table.fail_for_good(1, 1), []);
    table.enter(4, (2, 3));
    assert_eq!(over(&table.join(4, None)), []);
    table.pass(LOSS_GRACE, &[1, 2, 4]);
    assert_eq!(table.rounds.closed(), Some("rank 1 exited with 1 on node1, and no restart is left"));
}

#[test]
fn nor_does_a_node_that_begins_again() {
    let mut table = Table::running(2, 3);
    assert_eq!(table.fail_for_good(1, 0), []);
    assert_eq!(begun(&table.join(2, Some(0))), []);
    assert_eq!(table.rounds.closed(), Some("rank 1 exited with 1 on node1, and no restart is left"));
}

#[test]
fn a_note_in_the_store_does_not_hasten_the_last_failure() {
    let mut table = Table::running(2, 3);
    table.fail_for_good(1, 0);
    table.step(Event::Announced { text: "rank 2 wrote /remote_error".into(), grace: Duration::ZERO });
    assert_eq!(over(&table.step(Event::Lost(3, "gone".into()))).len(), 2);
}

#[test]
fn a_newcomer_does_not_interrupt_a_round_that_a_node_has_finished_and_left() {
    let mut table = Table::running(1, 2);
    table.step(Event::Finished(2, 0));
    table.step(Event::Left(2, "it has waited long enough".into()));
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
        table.step(Event::Entered(1, Introduction { node_rank: node_ranks[0], ..introduction(1) }));
        table.step(Event::Entered(2, again(2, node_ranks[1])));
        table.join(1, None);
        table.join(2, None);
        // One that it has given up, and that was slower.
        assert_eq!(table.step(Event::Entered(7, again(1, node_ranks[1]))), [Action::Drop(7)]);
        // Only it has seen its connection break.
        let actions = table.step(Event::Entered(8, again(3, node_ranks[1])));
        assert!(actions.contains(&Action::Drop(2)), "{actions:?}");
        assert_eq!(refused(&actions), None);
        assert_eq!(
            over(&actions).iter().map(|(id, kind, _)| (*id, *kind)).collect::<Vec<_>>(),
            [(1, Kind::Membership)]
        );
        assert_eq!(table.step(Event::Lost(2, "dropped".into())), []);
        table.join(8, None);
        assert_eq!(begun(&table.join(1, Some(0))).len(), 2);
    }
}

#[test]
fn a_node_that_has_finished_and_comes_again_has_finished() {
    let mut table = Table::running(2, 2);
    table.step(Event::Finished(2, 0));
    table.step(Event::Entered(8, again(3, None)));
    assert_eq!(table.step(Event::Finished(8, 0)), []);
    assert!(table.step(Event::Finished(1, 0)).contains(&Action::Tell(8, Notice::Released)));
}

#[test]
fn of_two_last_failures_the_first_is_named_whichever_is_heard_first() {
    for order in [[1, 2], [2, 1]] {
        let mut table = Table::running(2, 2);
        for id in order {
            table.step(Event::Failed { id, round: 0, at_ns: id, text: format!("rank {id} fell"), is_final: true });
        }
        table.pass(SECOND, &[1, 2]);
        assert_eq!(table.rounds.closed(), Some("rank 1 fell on node1, and no restart is left"));
    }
}

#[test]
fn a_job_of_one_node_ends_at_once() {
    let mut table = Table::running(1, 1);
    let text = "rank 1 exited with 1 on node1, and no restart is left".into();
    assert_eq!(table.fail_for_good(1, 0), [Action::Tell(1, Notice::Closed { text, is_spare: false })]);
}

#[test]
fn a_node_that_has_finished_may_lose_its_connection() {
    let mut table = Table::running(2, 2);
    table.step(Event::Finished(2, 0));
    table.step(Event::Lost(2, "gone".into()));
    table.enter(7, (2, 2));
    // The same agent, over another connection.
    let who = Introduction { nodes: (2, 2), ..introduction(2) };
    table.step(Event::Entered(8, who));
    assert_eq!(table.step(Event::Finished(8, 0)), []);
    let ended = over(&table.step(Event::Finished(7, 0)));
    assert_eq!(ended.iter().map(|(id, ..)| *id).collect::<Vec<_>>(), [7], "no worker of its was in this round");
    let actions = table.step(Event::Finished(1, 0));
    assert!(actions.contains(&Action::Tell(8, Notice::Released)), "{actions:?}");
    // And to a job that has succeeded nobody is late.
    let late = table.enter(9, (2, 2));
    let text = "the job has succeeded".into();
    assert!(late.contains(&Action::Tell(9, Notice::Closed { text, is_spare: true })), "{late:?}");
}

#[test]
fn a_node_that_has_finished_and_lost_its_connection_comes_back_too() {
    let mut table = Table::running(2, 2);
    table.step(Event::Finished(2, 0));
    table.step(Event::Lost(2, "gone".into()));
    table.step(Event::Entered(8, Introduction { nodes: (2, 2), ..introduction(2) }));
    table.step(Event::Finished(8, 0));
    assert_eq!(over(&table.fail(1, 0, 1)).len(), 2);
    table.join(1, Some(0));
    assert_eq!(begun(&table.join(8, Some(0))).len(), 2);
}

#[test]
fn a_node_that_has_finished_hears_that_its_round_was_over() {
    let mut table = Table::running(2, 2);
    table.step(Event::Finished(2, 0));
    table.step(Event::Lost(2, "gone".into()));
    table.fail(1, 0, 1);
    table.step(Event::Entered(8, Introduction { nodes: (2, 2), ..introduction(2) }));
    let actions = table.step(Event::Finished(8, 0));
    assert_eq!(over(&actions), [(8, Kind::Failure, "rank 1 exited with 1 on node1".into())]);
}

#[test]
fn times_that_are_longer_than_the_clock_goes_are_no_times() {
    let endless = Settings { last_call: Duration::MAX, silence: Duration::MAX, ..settings(1, 2) };
    let mut table = Table::new(endless);
    table.enter(1, (1, 2));
    assert_eq!(begun(&table.join(1, None)), []);
    table.enter(2, (1, 2));
    let timeout = Duration::MAX;
    let join = Join { after: None, role: "default".into(), local_world_size: 2, timeout };
    assert_eq!(begun(&table.step(Event::Joined(2, join))).len(), 2);
}

#[test]
fn of_many_who_wait_some_are_named() {
    let mut table = Table::new(settings(100, 100));
    for id in 1..=99 {
        table.enter(id, (100, 100));
        table.join(id, None);
    }
    let actions = table.pass(JOIN_TIMEOUT, &(1..=99).collect::<Vec<_>>());
    let Action::Tell(1, Notice::TimedOut { waiting, .. }) = &actions[0] else { panic!("{actions:?}") };
    assert_eq!((waiting.len(), waiting[32].as_str()), (33, "67 more"));
}
