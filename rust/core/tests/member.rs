//! What one agent does, under a clock that is moved by hand.

use std::time::{Duration, Instant};

use ferroelastic_core::rendezvous::member::{self, Call, Failure, Member, Standing};
use ferroelastic_core::rendezvous::message::{self, Cause, Kind, Notice, Place, Request, encode};

const SECOND: Duration = Duration::from_secs(1);
const SILENCE: Duration = Duration::from_secs(5);
const JOIN_TIMEOUT: Duration = Duration::from_secs(600);

fn member(is_host: bool) -> (Member, Instant) {
    let now = Instant::now();
    let settings = member::Settings { endpoint: "host:29400".into(), connect_timeout: 60 * SECOND, is_host };
    (Member::new(settings, now), now)
}

fn join() -> member::Event {
    member::Event::Call(Call::Join { role: "default".into(), local_world_size: 2, timeout: JOIN_TIMEOUT })
}

#[test]
fn a_host_that_is_not_up_is_tried_again_until_the_connect_timeout() {
    let (mut member, start) = member(false);
    let mut now = start;
    assert_eq!(member.step(now, join()), [member::Action::Connect]);
    let mut attempts = 1;
    while *member.standing() == Standing::Joining {
        let refused = member::Event::NotConnected { text: "connection refused".into(), is_refused: true };
        assert_eq!(member.step(now, refused), []);
        if let Some(next) = member.next_tick().filter(|_| *member.standing() == Standing::Joining) {
            assert!(next - now <= SECOND / 4);
            now = next;
            attempts += member.step(now, member::Event::Tick).len();
        }
    }
    assert!(attempts > 200, "{attempts}");
    assert_eq!(now - start, 60 * SECOND);
    let text = "the host of the rendezvous at host:29400 was not reached within 60 s: connection refused";
    assert_eq!(*member.standing(), Standing::Failed(Failure::Unreachable(text.into())));
}

#[test]
fn a_host_that_does_not_answer_is_given_up_after_the_connect_timeout() {
    let (mut member, start) = member(false);
    member.step(start, join());
    member.step(start, member::Event::Connected);
    let due = member.next_tick().expect("a deadline");
    assert_eq!(due - start, 60 * SECOND);
    assert_eq!(member.step(due, member::Event::Tick), [member::Action::Disconnect]);
    assert!(matches!(member.standing(), Standing::Failed(Failure::Unreachable(_))));
}

#[test]
fn why_a_host_was_not_reached_is_said_also_if_the_last_attempt_has_no_time() {
    let (mut member, start) = member(false);
    member.step(start, join());
    let text = "connection refused".into();
    member.step(start, member::Event::NotConnected { text, is_refused: true });
    let later = start + 60 * SECOND;
    // The attempt is under way when the time is over.
    member.step(start + 59 * SECOND, member::Event::Tick);
    member.step(later, member::Event::Tick);
    let text = "the host of the rendezvous at host:29400 was not reached within 60 s: connection refused";
    assert_eq!(*member.standing(), Standing::Failed(Failure::Unreachable(text.into())));
}

#[test]
fn what_an_agent_says_fits_into_a_message() {
    let long = "x".repeat(1 << 20);
    let calls =
        [Call::Failed { at_ns: 1, text: long.clone(), is_final: true }, Call::Close(long.clone()), Call::Leave(long)];
    for call in calls {
        let (mut member, now) = member(false);
        placed(&mut member, now);
        let actions = member.step(now, member::Event::Call(call));
        let member::Action::Send(request) = &actions[0] else { panic!("{actions:?}") };
        let mut frame = Vec::new();
        encode(request, &mut frame);
        assert!(message::decode::<Request>(&mut frame).expect("a message").is_some());
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
        membership_changes: 0,
        cause: None,
    }
}

fn placed(member: &mut Member, now: Instant) {
    member.step(now, join());
    member.step(now, member::Event::Connected);
    let asked = member.step(now, member::Event::Received(Notice::Welcome { silence: SILENCE }));
    assert!(matches!(asked[..], [member::Action::Send(Request::Join(_))]));
    member.step(now, member::Event::Received(Notice::Begin(place())));
    assert!(matches!(member.standing(), Standing::Placed(_)));
}

#[test]
fn an_agent_beats_and_notices_a_silent_host() {
    let (mut member, start) = member(false);
    placed(&mut member, start);
    let mut beats = 0;
    let mut now = start;
    while matches!(member.standing(), Standing::Placed(_)) {
        now = member.next_tick().expect("a deadline");
        let actions = member.step(now, member::Event::Tick);
        beats += usize::from(actions == [member::Action::Send(Request::Beat)]);
    }
    assert_eq!((beats, now - start), (3, SILENCE));
    assert!(
        matches!(member.standing(), Standing::Over(place, cause) if place.round == 4 && cause.kind == Kind::Membership)
    );
    // It was paused, and the host was not silent.
    let (mut member, start) = self::member(false);
    placed(&mut member, start);
    assert_eq!(member.step(start + 60 * SECOND, member::Event::Tick), [member::Action::Send(Request::Beat)]);
    assert!(matches!(member.standing(), Standing::Placed(_)));
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
    member.step(now, member::Event::Disconnected("it was closed".into()));
    assert!(matches!(member.standing(), Standing::Over(..)));
    assert_eq!(member.step(now, join()), [member::Action::Connect]);
    member.step(now, member::Event::NotConnected { text: "connection refused".into(), is_refused: true });
    let Standing::Failed(Failure::Unreachable(text)) = member.standing() else { panic!("{:?}", member.standing()) };
    assert!(text.contains("is gone"), "{text}");
}

#[test]
fn a_host_that_was_started_again_begins_with_its_own_rounds() {
    let (mut member, now) = member(false);
    placed(&mut member, now);
    member.step(now, member::Event::Disconnected("it was closed".into()));
    placed(&mut member, now);
}

#[test]
fn an_agent_that_is_heard_waits_as_long_as_the_host_lets_it() {
    let (mut member, mut now) = member(false);
    member.step(now, join());
    member.step(now, member::Event::Connected);
    member.step(now, member::Event::Received(Notice::Welcome { silence: SILENCE }));
    let end = now + 3 * JOIN_TIMEOUT;
    while now < end {
        now = member.next_tick().expect("a deadline");
        member.step(now, member::Event::Received(Notice::Beat));
    }
    assert_eq!(*member.standing(), Standing::Joining);
    // A connection that ends is made again, and the time begins anew.
    let actions = member.step(now, member::Event::Disconnected("it broke".into()));
    assert_eq!(actions, [member::Action::Connect]);
    assert_eq!(*member.standing(), Standing::Joining);
}

#[test]
fn an_agent_that_has_finished_says_so_again_when_its_connection_has_ended() {
    let (mut member, now) = member(false);
    placed(&mut member, now);
    assert_eq!(
        member.step(now, member::Event::Call(Call::Finished)),
        [member::Action::Send(Request::Finished { round: 4 })]
    );
    assert_eq!(member.step(now, member::Event::Disconnected("it broke".into())), [member::Action::Connect]);
    assert!(matches!(member.standing(), Standing::Placed(_)));
    member.step(now, member::Event::Connected);
    let said = member.step(now, member::Event::Received(Notice::Welcome { silence: SILENCE }));
    assert_eq!(said, [member::Action::Send(Request::Finished { round: 4 })]);
    member.step(now, member::Event::Received(Notice::Released));
    assert_eq!(*member.standing(), Standing::Released);
}

#[test]
fn only_an_agent_that_has_finished_is_released() {
    let (mut member, now) = member(false);
    placed(&mut member, now);
    member.step(now, member::Event::Received(Notice::Released));
    assert!(matches!(member.standing(), Standing::Placed(_)));
    let text = String::from("the job has succeeded");
    member.step(now, member::Event::Received(Notice::Closed { text: text.clone(), is_spare: true }));
    assert_eq!(*member.standing(), Standing::Closed { text, is_spare: false });
}

#[test]
fn another_host_has_rounds_of_its_own() {
    let (mut member, now) = member(false);
    placed(&mut member, now);
    member.step(now, member::Event::Call(Call::Finished));
    member.step(now, member::Event::Disconnected("it broke".into()));
    member.step(now, member::Event::Connected);
    member.step(now, member::Event::Received(Notice::Welcome { silence: SILENCE }));
    let cause = Cause { kind: Kind::Membership, node: String::new(), at_ns: None, text: "it is another one".into() };
    member.step(now, member::Event::Received(Notice::Over { round: 4, cause }));
    member.step(now, join());
    let place = Place { round: 0, ..place() };
    member.step(now, member::Event::Received(Notice::Begin(place.clone())));
    assert_eq!(*member.standing(), Standing::Placed(place));
}
