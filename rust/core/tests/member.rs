//! What one agent does, under a clock that is moved by hand.

#![expect(unused_must_use, reason = "a test reads the actions that it is about")]

use std::time::{Duration, Instant};

use ferroelastic_core::rendezvous::member::{self, Call, Failure, Member, MemberAction, MemberEvent, MembershipState};
use ferroelastic_core::rendezvous::message::{self, AgentMessage, Cause, HostMessage, MAX_DETAIL_BYTES, Place, encode};
use ferroelastic_core::rendezvous::policy::{FailureFacts, RestartVerdict};
use ferroelastic_core::vocabulary::RestartCause;

const SECOND: Duration = Duration::from_secs(1);
const SILENCE: Duration = Duration::from_secs(15);
const JOIN_TIMEOUT: Duration = Duration::from_secs(600);

fn member(is_host: bool) -> (Member, Instant) {
    let now = Instant::now();
    let settings = member::MemberSettings { endpoint: "host:29400".into(), connect_timeout: 60 * SECOND, is_host };
    (Member::new(settings, now), now)
}

fn join() -> MemberEvent {
    MemberEvent::Call(Call::Join { role: "default".into(), local_world_size: 2, timeout: JOIN_TIMEOUT })
}

#[test]
fn a_host_that_is_not_up_is_tried_again_until_the_connect_timeout() {
    let (mut member, start) = member(false);
    let mut now = start;
    assert_eq!(member.step(now, join()), [MemberAction::Connect]);
    let mut attempts = 1;
    while *member.state() == MembershipState::Joining {
        let refused = MemberEvent::NotConnected { text: "connection refused".into(), is_refused: true };
        let actions = member.step(now, refused);
        assert!(actions.iter().all(|action| matches!(action, MemberAction::Warning(_))), "{actions:?}");
        if let Some(next) = member.next_tick().filter(|_| *member.state() == MembershipState::Joining) {
            assert!(next - now <= SECOND / 4);
            now = next;
            attempts += member.step(now, MemberEvent::Tick).len();
        }
    }
    assert!(attempts > 200, "{attempts}");
    assert_eq!(now - start, 60 * SECOND);
    let text = "the host of the rendezvous at host:29400 was not reached within 60 s: connection refused";
    assert_eq!(*member.state(), MembershipState::Failed(Failure::Unreachable(text.into())));
}

#[test]
fn a_host_that_does_not_answer_is_given_up_after_the_connect_timeout() {
    let (mut member, start) = member(false);
    member.step(start, join());
    member.step(start, MemberEvent::Connected);
    let due = member.next_tick().expect("a deadline");
    assert_eq!(due - start, 60 * SECOND);
    assert_eq!(member.step(due, MemberEvent::Tick), [MemberAction::Disconnect]);
    assert!(matches!(member.state(), MembershipState::Failed(Failure::Unreachable(_))));
}

#[test]
fn the_reason_of_an_earlier_attempt_stays_if_the_last_one_has_no_time() {
    let (mut member, start) = member(false);
    member.step(start, join());
    let text = "connection refused".into();
    member.step(start, MemberEvent::NotConnected { text, is_refused: true });
    let later = start + 60 * SECOND;
    // The attempt is under way when the time is over.
    member.step(start + 59 * SECOND, MemberEvent::Tick);
    member.step(later, MemberEvent::Tick);
    let text = "the host of the rendezvous at host:29400 was not reached within 60 s: connection refused";
    assert_eq!(*member.state(), MembershipState::Failed(Failure::Unreachable(text.into())));
}

#[test]
fn texts_of_an_agent_fit_into_a_message() {
    let long = "x".repeat(1 << 20);
    let (causes, verdict) = (vec![long.clone(); 100], RestartVerdict::Final(long.clone()));
    let facts = FailureFacts { causes, verdict, ..FailureFacts::default() };
    let calls = [
        // Text within text needs an escape for each quotation mark.
        Call::Failed {
            at_ns: 1,
            text: long.clone(),
            code: 1,
            facts: facts.clone(),
            detail: "\"".repeat(MAX_DETAIL_BYTES),
        },
        Call::Failed { at_ns: 1, text: long.clone(), code: 1, facts, detail: long.clone() },
        Call::Close { text: long.clone(), code: 1 },
        Call::Leave(long),
    ];
    for call in calls {
        let (mut member, now) = member(false);
        placed(&mut member, now);
        let actions = member.step(now, MemberEvent::Call(call));
        let MemberAction::Send(request) = &actions[0] else { panic!("{actions:?}") };
        let mut frame = Vec::new();
        encode(request, &mut frame);
        assert!(message::decode::<AgentMessage>(&mut frame).expect("a message").is_some());
    }
}

fn place() -> Place {
    Place {
        round: 4,
        group_rank: 0,
        group_world_size: 1,
        first_rank: 0,
        world_size: 2,
        first_role_rank: 0,
        role_world_size: 2,
        address: None,
        failures: 0,
        restarts_used: 0,
        membership_changes: 0,
        cause: None,
    }
}

fn placed(member: &mut Member, now: Instant) {
    member.step(now, join());
    member.step(now, MemberEvent::Connected);
    let asked = member.step(now, MemberEvent::Received(HostMessage::Welcome { silence: SILENCE }));
    assert!(matches!(asked[..], [MemberAction::Send(AgentMessage::Join(_))]));
    member.step(now, MemberEvent::Received(HostMessage::Begin(place())));
    assert!(matches!(member.state(), MembershipState::Placed(_)));
}

/// Lets time pass until the agent stands otherwise, with a host that answers the first beats.
fn beats_until_over(member: &mut Member, start: Instant, answered: u64) -> (u64, Instant) {
    let (mut sent, mut now) = (0, start);
    while matches!(member.state(), MembershipState::Placed(_)) {
        now = member.next_tick().expect("a deadline");
        for action in member.step(now, MemberEvent::Tick) {
            if let MemberAction::Send(AgentMessage::Beat { number }) = action {
                sent = number;
                if number <= answered {
                    member.step(now + SECOND / 2, MemberEvent::Received(HostMessage::Beat { number }));
                }
            }
        }
    }
    (sent, now)
}

#[test]
fn an_agent_that_the_host_does_not_answer_stops_its_workers_before_it_is_lost() {
    let (mut member, start) = member(false);
    placed(&mut member, start);
    let lease = member.lease().expect("a lease");
    assert_eq!((lease.stop_at - start, lease.kill_at - start), (12 * SECOND, Duration::from_millis(14_250)));
    let (beats, now) = beats_until_over(&mut member, start, 3);
    // Counted from when the third beat was sent, and not from when it was answered.
    assert_eq!((beats, now - start), (14, 15 * SECOND));
    let MembershipState::Over(place, cause) = member.state() else { panic!("{:?}", member.state()) };
    assert_eq!((place.round, cause.kind), (4, RestartCause::Membership));
    assert_eq!(member.lease().expect("it goes on").kill_at - start, Duration::from_millis(17_250));
    assert_eq!(member.step(now, join()), [MemberAction::Connect]);
    assert_eq!(member.lease(), None);
}

#[test]
fn the_lease_goes_on_while_the_agent_is_suspended() {
    for (pause, is_over) in [(9, false), (13, true)] {
        let (mut member, start) = self::member(false);
        placed(&mut member, start);
        let now = start + pause * SECOND;
        // Its workers were killed meanwhile: that is no failure.
        let text = "rank 0 was killed".into();
        let (facts, detail) = (FailureFacts::default(), String::new());
        let actions = member.step(now, MemberEvent::Call(Call::Failed { at_ns: 1, text, code: 137, facts, detail }));
        let has_told = actions.iter().any(|action| matches!(action, MemberAction::Send(AgentMessage::Failed { .. })));
        assert_eq!((has_told, matches!(member.state(), MembershipState::Over(..))), (!is_over, is_over), "{pause}");
    }
}

#[test]
fn an_answer_counts_for_the_beat_that_it_answers() {
    let (mut member, start) = member(false);
    placed(&mut member, start);
    for beat in 1..=3 {
        let now = start + beat * SECOND;
        assert_eq!(
            member.step(now, MemberEvent::Tick),
            [MemberAction::Send(AgentMessage::Beat { number: beat.into() })]
        );
    }
    let renewed = |member: &Member| member.lease().expect("a lease").renewed - start;
    for (answer, expected) in [(1, 1), (1, 1), (3, 3), (2, 3)] {
        member.step(start + 4 * SECOND, MemberEvent::Received(HostMessage::Beat { number: answer }));
        assert_eq!(renewed(&member), expected * SECOND, "{answer}");
    }
    member.step(start + 4 * SECOND, MemberEvent::Received(HostMessage::Probe));
    assert_eq!(renewed(&member), 3 * SECOND);
}

#[test]
fn the_workers_of_others_are_waited_for_without_a_lease() {
    let (mut member, start) = member(false);
    placed(&mut member, start);
    member.step(start, MemberEvent::Call(Call::Finished));
    member.step(start + 13 * SECOND, MemberEvent::Tick);
    assert!(matches!(member.state(), MembershipState::Placed(_)));
}

#[test]
fn an_agent_that_does_not_reach_the_host_reports_the_reason() {
    let (mut member, start) = member(false);
    member.step(start, join());
    let mut told = Vec::new();
    for second in 0..60 {
        let text = if second < 40 { "connection refused" } else { "no route to host" }.to_owned();
        let refused = MemberEvent::NotConnected { text, is_refused: true };
        let actions = member.step(start + second * SECOND, refused);
        told.extend(actions.into_iter().filter_map(|action| match action {
            MemberAction::Warning(text) => Some(text),
            _ => None,
        }));
    }
    let text = "the host of the rendezvous at host:29400 cannot be reached: connection refused; retrying for 50 s (read_timeout)";
    assert_eq!(told[0], text);
    assert!(told.len() == 2 && told[1].contains("no route to host"), "{told:?}");
}

#[test]
fn a_late_agent_is_told_that_it_is_late() {
    let (mut member, now) = member(false);
    member.step(now, join());
    member.step(now, MemberEvent::Connected);
    let text = String::from("the job has succeeded");
    let actions = member.step(now, MemberEvent::Received(HostMessage::Late { text: text.clone() }));
    assert_eq!(actions, [MemberAction::Disconnect]);
    assert_eq!(*member.state(), MembershipState::Failed(Failure::Late(text)));
}

#[test]
fn an_agent_in_the_process_of_the_host_need_not_beat() {
    let (mut member, start) = member(true);
    placed(&mut member, start);
    assert_eq!(member.next_tick(), None);
}

#[test]
fn a_host_that_is_gone_is_not_waited_for() {
    let (mut member, now) = member(false);
    placed(&mut member, now);
    member.step(now, MemberEvent::Disconnected("it was closed".into()));
    assert!(matches!(member.state(), MembershipState::Over(..)));
    assert_eq!(member.step(now, join()), [MemberAction::Connect]);
    member.step(now, MemberEvent::NotConnected { text: "connection refused".into(), is_refused: true });
    let MembershipState::Failed(Failure::Unreachable(text)) = member.state() else { panic!("{:?}", member.state()) };
    assert!(text.contains("is gone"), "{text}");
}

#[test]
fn a_host_that_was_started_again_begins_with_its_own_rounds() {
    let (mut member, now) = member(false);
    placed(&mut member, now);
    member.step(now, MemberEvent::Disconnected("it was closed".into()));
    placed(&mut member, now);
}

#[test]
fn an_agent_that_is_heard_waits_as_long_as_the_host_lets_it() {
    let (mut member, mut now) = member(false);
    member.step(now, join());
    member.step(now, MemberEvent::Connected);
    member.step(now, MemberEvent::Received(HostMessage::Welcome { silence: SILENCE }));
    let end = now + 3 * JOIN_TIMEOUT;
    while now < end {
        now = member.next_tick().expect("a deadline");
        member.step(now, MemberEvent::Received(HostMessage::Probe));
    }
    assert_eq!(*member.state(), MembershipState::Joining);
    // A connection that ends is made again, and the time begins anew.
    let actions = member.step(now, MemberEvent::Disconnected("it broke".into()));
    assert_eq!(actions, [MemberAction::Connect]);
    assert_eq!(*member.state(), MembershipState::Joining);
}

#[test]
fn an_agent_that_has_finished_says_so_again_when_its_connection_has_ended() {
    let (mut member, now) = member(false);
    placed(&mut member, now);
    assert_eq!(
        member.step(now, MemberEvent::Call(Call::Finished)),
        [MemberAction::Send(AgentMessage::Finished { round: 4 })]
    );
    assert_eq!(member.step(now, MemberEvent::Disconnected("it broke".into())), [MemberAction::Connect]);
    assert!(matches!(member.state(), MembershipState::Placed(_)));
    member.step(now, MemberEvent::Connected);
    let said = member.step(now, MemberEvent::Received(HostMessage::Welcome { silence: SILENCE }));
    assert_eq!(said, [MemberAction::Send(AgentMessage::Finished { round: 4 })]);
    member.step(now, MemberEvent::Received(HostMessage::Released));
    assert_eq!(*member.state(), MembershipState::Released);
}

#[test]
fn only_an_agent_that_has_finished_is_released() {
    let (mut member, now) = member(false);
    placed(&mut member, now);
    member.step(now, MemberEvent::Received(HostMessage::Released));
    assert!(matches!(member.state(), MembershipState::Placed(_)));
    let text = String::from("the job has succeeded");
    let (detail, is_loss, decision) = (String::new(), false, None);
    let end = HostMessage::Closed { text: text.clone(), code: 0, detail: detail.clone(), is_loss, decision };
    member.step(now, MemberEvent::Received(end));
    assert_eq!(*member.state(), MembershipState::Closed { text, code: 1, detail, is_loss, decision: None });
}

#[test]
fn another_host_has_rounds_of_its_own() {
    let (mut member, now) = member(false);
    placed(&mut member, now);
    member.step(now, MemberEvent::Call(Call::Finished));
    member.step(now, MemberEvent::Disconnected("it broke".into()));
    member.step(now, MemberEvent::Connected);
    member.step(now, MemberEvent::Received(HostMessage::Welcome { silence: SILENCE }));
    let cause = Cause::membership(String::new(), "it is another one".into());
    member.step(now, MemberEvent::Received(HostMessage::Over { round: 4, cause }));
    member.step(now, join());
    let place = Place { round: 0, ..place() };
    member.step(now, MemberEvent::Received(HostMessage::Begin(place.clone())));
    assert_eq!(*member.state(), MembershipState::Placed(place));
}
