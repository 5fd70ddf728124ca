//! The store's protocol and semantics, byte for byte.

use ferroelastic_core::store::state::{Misuse, Peer, StoreReply, StoreState};
use ferroelastic_core::store::wire::{Decoder, Limits, MAGIC, Refusal, StoreRequest};
use proptest::prelude::*;

fn validate() -> Vec<u8> {
    [&[0], &MAGIC.to_le_bytes()[..]].concat()
}

fn sized(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u64).to_le_bytes()[..], bytes].concat()
}

/// A request as a client writes it.
fn encode(request: &StoreRequest) -> Vec<u8> {
    let keys = |keys: &[Box<[u8]>]| {
        let keys: Vec<u8> =
            [(keys.len() as u64).to_le_bytes().to_vec(), keys.iter().flat_map(|key| sized(key)).collect()].concat();
        keys
    };
    let (opcode, arguments) = match request {
        StoreRequest::Set { key, value } => (1, [sized(key), sized(value)].concat()),
        StoreRequest::CompareSet { key, expected, desired } => {
            (2, [sized(key), sized(expected), sized(desired)].concat())
        }
        StoreRequest::Get { key } => (3, sized(key)),
        StoreRequest::Add { key, delta } => (4, [sized(key), delta.to_le_bytes().to_vec()].concat()),
        StoreRequest::Check { keys: list } => (5, keys(list)),
        StoreRequest::Wait { keys: list } => (6, keys(list)),
        StoreRequest::GetNumKeys => (7, Vec::new()),
        StoreRequest::DeleteKey { key } => (8, sized(key)),
        StoreRequest::Append { key, value } => (9, [sized(key), sized(value)].concat()),
        StoreRequest::MultiGet { keys: list } => (10, keys(list)),
        StoreRequest::MultiSet { pairs } => {
            let fields = pairs.iter().flat_map(|(key, value)| [sized(key), sized(value)].concat());
            (11, [(pairs.len() as u64).to_le_bytes().to_vec(), fields.collect()].concat())
        }
        StoreRequest::CancelWait => (12, Vec::new()),
        StoreRequest::Ping { nonce } => (13, nonce.to_le_bytes().to_vec()),
        StoreRequest::QueuePush { key, value } => (14, [sized(key), sized(value)].concat()),
        StoreRequest::QueuePop { key } => (15, sized(key)),
        StoreRequest::QueueLen { key } => (16, sized(key)),
        StoreRequest::ListKeys => (17, Vec::new()),
        StoreRequest::Barrier { key, world_size } => (18, [sized(key), world_size.to_le_bytes().to_vec()].concat()),
        StoreRequest::Upgrade => (0xFE, Vec::new()),
    };
    [vec![opcode], arguments].concat()
}

fn decode(chunks: &[&[u8]]) -> Result<Vec<StoreRequest>, Refusal> {
    let (mut decoder, mut requests) = (Decoder::new(Limits::default()), Vec::new());
    for chunk in chunks {
        decoder.feed(chunk);
        while let Some(request) = decoder.next()? {
            requests.push(request);
        }
    }
    Ok(requests)
}

fn requests() -> impl Strategy<Value = Vec<StoreRequest>> {
    let key = || proptest::collection::vec(any::<u8>(), 0..12).prop_map(Vec::into_boxed_slice);
    let value = || proptest::collection::vec(any::<u8>(), 0..40);
    let keys = || proptest::collection::vec(key(), 0..5);
    let request = prop_oneof![
        (key(), value()).prop_map(|(key, value)| StoreRequest::Set { key, value }),
        (key(), value(), value()).prop_map(|(key, expected, desired)| StoreRequest::CompareSet {
            key,
            expected,
            desired
        }),
        key().prop_map(|key| StoreRequest::Get { key }),
        (key(), any::<i64>()).prop_map(|(key, delta)| StoreRequest::Add { key, delta }),
        keys().prop_map(|keys| StoreRequest::Check { keys }),
        keys().prop_map(|keys| StoreRequest::Wait { keys }),
        Just(StoreRequest::GetNumKeys),
        key().prop_map(|key| StoreRequest::DeleteKey { key }),
        (key(), value()).prop_map(|(key, value)| StoreRequest::Append { key, value }),
        keys().prop_map(|keys| StoreRequest::MultiGet { keys }),
        proptest::collection::vec((key(), value()), 0..5).prop_map(|pairs| StoreRequest::MultiSet { pairs }),
        Just(StoreRequest::CancelWait),
        any::<u32>().prop_map(|nonce| StoreRequest::Ping { nonce }),
        (key(), value()).prop_map(|(key, value)| StoreRequest::QueuePush { key, value }),
        key().prop_map(|key| StoreRequest::QueuePop { key }),
        key().prop_map(|key| StoreRequest::QueueLen { key }),
        Just(StoreRequest::ListKeys),
        (key(), any::<i64>()).prop_map(|(key, world_size)| StoreRequest::Barrier { key, world_size }),
    ];
    proptest::collection::vec(request, 0..8)
}

proptest! {
    #[test]
    fn how_the_stream_is_cut_makes_no_difference(
        requests in requests(), cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let stream = [validate(), requests.iter().flat_map(encode).collect()].concat();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
        cuts.extend([0, stream.len()]);
        cuts.sort_unstable();
        let chunks: Vec<&[u8]> = cuts.windows(2).map(|pair| &stream[pair[0]..pair[1]]).collect();
        prop_assert_eq!(decode(&chunks), Ok(requests.clone()));
        let bytes: Vec<&[u8]> = stream.chunks(1).collect();
        prop_assert_eq!(decode(&bytes), Ok(requests));
    }

    #[test]
    fn arbitrary_bytes_are_understood_or_refused(stream in proptest::collection::vec(any::<u8>(), 0..400)) {
        let stream = [validate(), stream].concat();
        let _ = decode(&[&stream]);
    }
}

#[test]
fn a_connection_without_the_magic_number_is_refused() {
    assert_eq!(decode(&[b"GET / HTTP/1.1\r\n"]), Err(Refusal::NotAClient(b'G')));
    assert_eq!(decode(&[&[0, 1, 2, 3, 4]]), Err(Refusal::WrongMagic(0x0403_0201)));
    assert_eq!(
        decode(&[&[0], &[0xce, 0xf7], &[0x85, 0x3c, 13, 1, 0, 0, 0]]),
        Ok(vec![StoreRequest::Ping { nonce: 1 }])
    );
    assert_eq!(decode(&[&[validate(), validate()].concat()]), Err(Refusal::Opcode(0)));
    assert_eq!(decode(&[&[validate(), vec![19]].concat()]), Err(Refusal::Opcode(19)));
}

#[test]
fn the_limits_are_torchs() {
    let after = |bytes: Vec<u8>| decode(&[&[validate(), bytes].concat()]);
    let key = |size: usize| encode(&StoreRequest::Get { key: vec![b'k'; size].into() });
    assert!(after(key(8192)).is_ok_and(|requests| requests.len() == 1));
    assert_eq!(after(key(8193)), Err(Refusal::TooLarge { item: "a key", size: 8193, limit: 8192 }));
    let set = |size: usize| encode(&StoreRequest::Set { key: (*b"k").into(), value: vec![0; size] });
    assert!(after(set(8 << 20)).is_ok_and(|requests| requests.len() == 1));
    assert!(matches!(after(set((8 << 20) + 1)), Err(Refusal::TooLarge { item: "a value", .. })));
    let check = |count: usize| encode(&StoreRequest::Check { keys: vec![(*b"").into(); count] });
    assert!(after(check(131_072)).is_ok_and(|requests| requests.len() == 1));
    assert!(matches!(after(check(131_073)), Err(Refusal::TooLarge { item: "a number of keys", .. })));
    // What is announced is refused before it has come, and not made room for.
    let announced = [vec![1], u64::MAX.to_le_bytes().to_vec()].concat();
    assert!(matches!(after(announced), Err(Refusal::TooLarge { item: "a key", size: u64::MAX, .. })));
}

#[test]
fn a_large_request_in_small_pieces_is_read_once() {
    let pairs: Vec<(Box<[u8]>, Vec<u8>)> =
        (0..100_000u32).map(|key| (key.to_le_bytes().to_vec().into(), vec![0; 8])).collect();
    let stream = [validate(), encode(&StoreRequest::MultiSet { pairs: pairs.clone() })].concat();
    let mut decoder = Decoder::new(Limits::default());
    let mut complete = None;
    for chunk in stream.chunks(64) {
        assert_eq!(complete, None);
        decoder.feed(chunk);
        complete = decoder.next().expect("within the limits");
    }
    assert_eq!(complete, Some(StoreRequest::MultiSet { pairs }));
    assert_eq!(decoder.held(), 0);
}

const ME: Peer = 1;
const YOU: Peer = 2;

fn key(name: &str) -> Box<[u8]> {
    name.as_bytes().into()
}

fn keys(names: &[&str]) -> Vec<Box<[u8]>> {
    names.iter().map(|name| key(name)).collect()
}

#[derive(Default)]
struct Store(StoreState);

impl Store {
    fn ask(&mut self, peer: Peer, request: StoreRequest) -> Vec<(Peer, Vec<u8>)> {
        let mut replies = Vec::new();
        self.0.apply(peer, request, &mut replies).expect("well used");
        replies.into_iter().map(|StoreReply { peer, bytes }| (peer, bytes)).collect()
    }

    fn set(&mut self, name: &str, value: &[u8]) -> Vec<(Peer, Vec<u8>)> {
        self.ask(YOU, StoreRequest::Set { key: key(name), value: value.into() })
    }

    fn get(&mut self, name: &str) -> Vec<u8> {
        self.ask(ME, StoreRequest::Get { key: key(name) }).remove(0).1
    }

    fn wait(&mut self, peer: Peer, names: &[&str]) -> Vec<(Peer, Vec<u8>)> {
        self.ask(peer, StoreRequest::Wait { keys: keys(names) })
    }

    fn add(&mut self, name: &str, delta: i64) -> i64 {
        let reply = self.ask(ME, StoreRequest::Add { key: key(name), delta }).remove(0).1;
        i64::from_le_bytes(reply.try_into().expect("eight bytes"))
    }
}

#[test]
fn values_come_back_and_missing_ones_are_empty() {
    let mut store = Store::default();
    assert_eq!(store.get("k"), sized(b""));
    assert_eq!(store.set("k", b"ab"), []);
    assert_eq!(store.get("k"), sized(b"ab"));
    store.ask(ME, StoreRequest::Append { key: key("k"), value: b"cd".into() });
    store.ask(ME, StoreRequest::MultiSet { pairs: vec![(key("a"), b"1".into()), (key("b"), b"2".into())] });
    let got = store.ask(ME, StoreRequest::MultiGet { keys: keys(&["k", "missing", "b"]) });
    assert_eq!(got, [(ME, [sized(b"abcd"), sized(b""), sized(b"2")].concat())]);
    assert_eq!(store.ask(ME, StoreRequest::GetNumKeys), [(ME, 3i64.to_le_bytes().to_vec())]);
    assert_eq!(store.ask(ME, StoreRequest::DeleteKey { key: key("a") }), [(ME, 1i64.to_le_bytes().to_vec())]);
    assert_eq!(store.ask(ME, StoreRequest::DeleteKey { key: key("a") }), [(ME, 0i64.to_le_bytes().to_vec())]);
}

#[test]
fn numbers_are_text_and_read_as_leniently_as_torch_reads_them() {
    let mut store = Store::default();
    assert_eq!(store.add("n", -7), -7);
    assert_eq!(store.get("n"), sized(b"-7"));
    store.set("n", b" \t\r\n\x0b\x0c12abc");
    assert_eq!(store.add("n", 1), 13);
    store.set("n", i64::MAX.to_string().as_bytes());
    assert_eq!(store.add("n", 1), i64::MIN);
    for nonsense in [&b""[..], b"x", b"-", b"99999999999999999999"] {
        store.set("n", nonsense);
        let refused = store.0.apply(ME, StoreRequest::Add { key: key("n"), delta: 1 }, &mut Vec::new());
        assert_eq!(refused, Err(Misuse::NotANumber("n".into())), "{nonsense:?}");
    }
}

#[test]
fn compare_set_has_its_oddities() {
    let mut store = Store::default();
    let compare_set = |store: &mut Store, expected: &[u8], desired: &[u8]| {
        let (expected, desired) = (expected.to_vec(), desired.to_vec());
        store.ask(ME, StoreRequest::CompareSet { key: key("c"), expected, desired })
    };
    assert_eq!(compare_set(&mut store, b"other", b"new"), [(ME, sized(b"other"))], "says it is there");
    assert_eq!(store.ask(ME, StoreRequest::Check { keys: keys(&["c"]) }), [(ME, vec![1])], "but it is not");
    assert_eq!(compare_set(&mut store, b"", b"first"), [(ME, sized(b"first"))]);
    assert_eq!(compare_set(&mut store, b"wrong", b"second"), [(ME, sized(b"first"))]);
    assert_eq!(compare_set(&mut store, b"first", b"second"), [(ME, sized(b"second"))]);
}

#[test]
fn a_waiting_client_is_answered_when_all_keys_are_set() {
    let mut store = Store::default();
    assert_eq!(store.wait(ME, &[]), [(ME, vec![0])]);
    assert_eq!(store.wait(ME, &["a", "b", "a"]), []);
    assert_eq!(store.set("b", b""), []);
    assert_eq!(store.set("a", b""), [(ME, vec![0])]);
    assert_eq!(store.set("a", b"again"), []);
    assert_eq!(store.wait(ME, &["a", "b"]), [(ME, vec![0])]);
}

#[test]
fn a_wait_can_be_given_up_and_overtaken() {
    let mut store = Store::default();
    store.wait(ME, &["a"]);
    assert_eq!(store.ask(ME, StoreRequest::Ping { nonce: 7 }), [(ME, vec![7, 0, 0, 0])], "meanwhile");
    assert_eq!(store.ask(ME, StoreRequest::CancelWait), [(ME, vec![1])]);
    assert_eq!(store.set("a", b""), [], "nobody waits any more");
    assert_eq!(store.ask(ME, StoreRequest::CancelWait), [(ME, vec![1])], "always answered");
    // The answer and the cancellation have crossed: both are told.
    store.wait(ME, &["b"]);
    assert_eq!(store.set("b", b""), [(ME, vec![0])]);
    assert_eq!(store.ask(ME, StoreRequest::CancelWait), [(ME, vec![1])]);
    store.wait(ME, &["c"]);
    store.0.forget(ME);
    assert_eq!(store.set("c", b""), [], "who is gone is told nothing");
}

#[test]
fn queues_wake_one_and_are_there_as_long_as_they_hold_something() {
    let mut store = Store::default();
    let push = |store: &mut Store, value: &[u8]| {
        store.ask(YOU, StoreRequest::QueuePush { key: key("q"), value: value.into() })
    };
    let pop = |store: &mut Store| store.ask(ME, StoreRequest::QueuePop { key: key("q") }).remove(0).1;
    let length = |length: i64| length.to_le_bytes().to_vec();
    assert_eq!(pop(&mut store), length(0));
    store.wait(ME, &["q"]);
    store.wait(3, &["q"]);
    assert_eq!(push(&mut store, b"x"), [(ME, vec![0])]);
    assert_eq!(push(&mut store, b"y"), [(3, vec![0])]);
    assert_eq!(store.ask(ME, StoreRequest::QueueLen { key: key("q") }), [(ME, length(2))]);
    assert_eq!(store.ask(ME, StoreRequest::Check { keys: keys(&["q"]) }), [(ME, vec![0])]);
    assert_eq!(store.ask(ME, StoreRequest::GetNumKeys), [(ME, length(0))]);
    assert_eq!(store.ask(ME, StoreRequest::ListKeys), [(ME, length(0))]);
    assert_eq!(pop(&mut store), [length(2), sized(b"x")].concat());
    assert_eq!(pop(&mut store), [length(1), sized(b"y")].concat());
    assert_eq!(store.ask(ME, StoreRequest::Check { keys: keys(&["q"]) }), [(ME, vec![1])]);
}

#[test]
fn a_pushed_value_wakes_a_client_that_waits_for_that_key_alone() {
    let mut store = Store::default();
    let push = |store: &mut Store| store.ask(YOU, StoreRequest::QueuePush { key: key("q"), value: b"x".into() });
    store.wait(ME, &["q", "k"]);
    store.wait(3, &["q"]);
    assert_eq!(push(&mut store), [(3, vec![0])], "the first would leave it there");
    assert_eq!(store.set("k", b""), [(ME, vec![0])]);
    store.wait(ME, &["p", "p"]);
    store.wait(3, &["p"]);
    let push = StoreRequest::QueuePush { key: key("p"), value: b"x".into() };
    assert_eq!(store.ask(YOU, push), [(ME, vec![0])], "to name it twice is no more");
}

#[test]
fn a_cancelled_wait_that_names_a_key_often_is_forgotten_at_once() {
    let mut store = Store::default();
    let often = vec!["k"; 100_000];
    for peer in 0..4 {
        store.wait(peer, &often);
    }
    for peer in 0..3 {
        store.0.forget(peer);
    }
    assert_eq!(store.set("k", b""), [(3, vec![0])]);
}

#[test]
fn a_barrier_opens_for_all_and_keeps_its_counter() {
    let mut store = Store::default();
    let enter = |store: &mut Store, peer: Peer| store.ask(peer, StoreRequest::Barrier { key: key("b"), world_size: 2 });
    store.wait(9, &["b"]);
    assert_eq!(enter(&mut store, ME), [], "neither it nor who waits for the key is told");
    let opened = enter(&mut store, YOU);
    assert!(opened.contains(&(ME, vec![0])) && opened.contains(&(YOU, vec![0])));
    assert_eq!(enter(&mut store, ME), [(ME, vec![0])], "the third passes at once");
    assert_eq!(store.get("b"), sized(b"3"));
    store.ask(ME, StoreRequest::Barrier { key: key("c"), world_size: 2 });
    assert_eq!(store.set("c", b"7"), [(ME, vec![0])], "it waits for the key");
}

#[test]
fn a_client_that_leaves_a_barrier_has_been_counted() {
    for leave in
        [|store: &mut Store| drop(store.ask(ME, StoreRequest::CancelWait)), |store: &mut Store| store.0.forget(ME)]
    {
        let mut store = Store::default();
        store.ask(ME, StoreRequest::Barrier { key: key("b"), world_size: 2 });
        leave(&mut store);
        assert_eq!(store.ask(YOU, StoreRequest::Barrier { key: key("b"), world_size: 2 }), [(YOU, vec![0])]);
    }
}

#[test]
fn a_reply_has_its_limit_whatever_it_is_made_of() {
    let mut store = Store(StoreState::new(&Limits { reply_bytes: 64, ..Limits::default() }));
    let append =
        |store: &mut Store, size| store.ask(YOU, StoreRequest::Append { key: key("k"), value: vec![b'v'; size] }).len();
    let list = || StoreRequest::MultiGet { keys: keys(&["k", "k"]) };
    let compare = || StoreRequest::CompareSet { key: key("k"), expected: b"no".into(), desired: b"new".into() };
    // Two values of 24 bytes, each after its length.
    append(&mut store, 24);
    assert_eq!(store.ask(ME, list())[0].1.len(), 64);
    append(&mut store, 32);
    assert_eq!(store.get("k").len(), 64);
    assert_eq!(store.ask(ME, compare())[0].1.len(), 64);
    append(&mut store, 1);
    store.ask(YOU, StoreRequest::QueuePush { key: key("q"), value: vec![0; 49] });
    let refused = |store: &mut Store, request| store.0.apply(ME, request, &mut Vec::new());
    for (request, size) in [
        (StoreRequest::Get { key: key("k") }, 65),
        (list(), 130),
        (compare(), 65),
        (StoreRequest::QueuePop { key: key("q") }, 65),
    ] {
        assert_eq!(refused(&mut store, request), Err(Misuse::ReplyTooLarge { size, limit: 64 }));
    }
    // The number of keys, and each after its length: 8 + 9 + 8 + 39.
    let names = |size| StoreRequest::Set { key: vec![b'n'; size].into(), value: Vec::new() };
    store.ask(YOU, names(39));
    assert_eq!(store.ask(ME, StoreRequest::ListKeys)[0].1.len(), 64);
    store.ask(YOU, names(0));
    assert_eq!(refused(&mut store, StoreRequest::ListKeys), Err(Misuse::ReplyTooLarge { size: 72, limit: 64 }));
}
