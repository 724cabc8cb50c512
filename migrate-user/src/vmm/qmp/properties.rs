//! What a monitor writes is what is read, whatever it says and however the socket cuts it.

use proptest::prelude::*;
use tokio::io::AsyncWriteExt;

use super::*;

/// Any JSON.
fn values() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        // Numbers that text holds exactly.
        any::<i32>().prop_map(|number| Value::from(f64::from(number) / 8.0)),
        ".{0,20}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map(".{0,8}", inner, 0..4)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

/// A line as a monitor writes it.
fn line(value: &Value) -> Vec<u8> {
    format!("{value}\r\n").into_bytes()
}

proptest! {
    #![proptest_config(crate::fuzzing::at_most(64))]

    #[test]
    fn answers_are_read_as_they_were_written(id: u64, value in values()) {
        let Line::Answer(number, result) = sort(&line(&json!({ "return": value, "id": id }))) else {
            return Err(TestCaseError::fail("no answer"));
        };
        prop_assert_eq!((number, result), (id, Ok(value.clone())));
        let Line::Answer(number, result) = sort(&line(&json!({ "id": id, "error": value }))) else {
            return Err(TestCaseError::fail("no error"));
        };
        prop_assert_eq!((number, result), (id, Err(value)));
    }

    #[test]
    fn events_are_read_as_they_were_written(name in ".{0,20}", data in values(), seconds: u32, micros in 0u64..1_000_000) {
        let time = json!({ "seconds": seconds, "microseconds": micros });
        let written = json!({ "event": name, "data": data, "timestamp": time });
        let Line::Event(event) = sort(&line(&written)) else {
            return Err(TestCaseError::fail("no event"));
        };
        prop_assert_eq!((event.name, event.data), (name, data));
        prop_assert_eq!(event.micros, u64::from(seconds) * 1_000_000 + micros);
    }

    #[test]
    fn greetings_tell_the_version(major: u32, minor: u32, micro: u32) {
        let qemu = json!({ "major": major, "minor": minor, "micro": micro });
        let written = json!({ "QMP": { "version": { "qemu": qemu, "package": "" }, "capabilities": [] } });
        let Line::Greeting(version) = sort(&line(&written)) else {
            return Err(TestCaseError::fail("no greeting"));
        };
        prop_assert_eq!(version, format!("{major}.{minor}.{micro}"));
    }
}

proptest! {
    #![proptest_config(crate::fuzzing::at_most(16))]

    /// Each case has a socket and a runtime of its own.
    #[test]
    fn lines_survive_any_cut(sent in proptest::collection::vec(values(), 1..6), cut in 1usize..40) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        let got = runtime.block_on(async {
            let (mut monitor, ours) = UnixStream::pair().unwrap();
            let (events, mut heard) = broadcast::channel(EVENTS);
            let (greeted, _greeting) = oneshot::channel();
            let text: Vec<u8> = sent.iter().flat_map(|data| line(&json!({ "event": "X", "data": data }))).collect();
            let write = async move {
                for part in text.chunks(cut) {
                    monitor.write_all(part).await.unwrap();
                    tokio::task::yield_now().await;
                }
            };
            tokio::join!(write, read_lines(Arc::new(ours), Pending::default(), events, greeted));
            let mut got = Vec::new();
            while let Ok(event) = heard.recv().await {
                got.push(event.data);
            }
            got
        });
        prop_assert_eq!(got, sent);
    }
}
