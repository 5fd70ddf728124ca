//! What comes through the watchdog's pipe may be anything. The same as the fuzz target `request_line`, on a stable compiler.

use ferroelastic_core::watchdog::wire::TimerRequest;
use proptest::prelude::*;

#[path = "properties/request_line.rs"]
mod property;

use property::check;

#[test]
fn the_corpus_and_all_its_beginnings() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/request_line");
    let mut files = 0;
    for entry in std::fs::read_dir(folder).expect("the corpus") {
        let path = entry.expect("an entry").path();
        let mut input = std::fs::read(&path).expect("a file");
        input.push(b'\n');
        for end in 0..=input.len() {
            eprintln!("{}, {end} bytes", path.display()); // the last line names the input that fails
            check(&input[..end]);
        }
        files += 1;
    }
    assert!(files >= 20, "{files} files in {folder}");
}

fn lines() -> impl Strategy<Value = (TimerRequest, String)> {
    let time = prop_oneof![Just(-1.0), 0.0..4e9f64];
    (any::<i32>(), "\\PC{0,40}", time, -1..65i32).prop_map(|(pid, scope, expiration_time, signal)| {
        let text = serde_json::json!({
            "version": 1, "pid": pid, "scope_id": scope, "expiration_time": expiration_time, "signal": signal,
        });
        (TimerRequest { pid, scope, expiration_time, signal, heartbeat: None }, format!("{text}\n"))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes(stream in proptest::collection::vec(any::<u8>(), 0..512)) {
        check(&stream);
    }

    #[test]
    fn requests_of_a_client_are_read_unchanged(lines in proptest::collection::vec(lines(), 0..8)) {
        let (requests, texts): (Vec<_>, Vec<_>) = lines.into_iter().unzip();
        prop_assert_eq!(check(texts.concat().as_bytes()), requests);
    }

    #[test]
    fn a_damaged_line_costs_itself_alone(
        (_, mut damaged) in lines(), damage in any::<(prop::sample::Index, u8)>(), (request, whole) in lines(),
    ) {
        // Anything but a newline in place of one byte.
        let at = damage.0.index(damaged.len() - 1);
        let mut bytes = std::mem::take(&mut damaged).into_bytes();
        bytes[at] = if damage.1 == b'\n' { b' ' } else { damage.1 };
        bytes.extend_from_slice(whole.as_bytes());
        prop_assert_eq!(check(&bytes).pop(), Some(request));
    }
}
