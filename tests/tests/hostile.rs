//! A guest neither crashes nor misleads the agents by what it has in its memory.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use serde_json::Value;

use xferry_lab::guest::GuestKind;
use xferry_lab::lab::{LabConfig, Side, wait_for};
use xferry_lab::scenario::{GuestRam, Scenario, Workload, bare, hostile, skipped, status};

/// How long a migration that is held back may take.
const LIMIT: Duration = Duration::from_secs(60);
/// First page of memory that the guest does not use: 128 MiB.
const FIRST: u64 = 128 << 8;
/// How often all of it is written anew while pages are on their way.
const REWRITES: u64 = 12;

/// Frames that were not as they should be, by what they are called anywhere in a status or a report.
fn strange(value: &Value) -> Vec<String> {
    const STRANGE: [&str; 5] = ["corrupt", "bad-tag", "malformed", "duplicates", "stale"];
    match value {
        Value::Array(items) => items.iter().flat_map(strange).collect(),
        Value::Object(fields) if fields.contains_key("reason") && fields.contains_key("frames") => {
            if fields["frames"] == 0 { Vec::new() } else { vec![value.to_string()] }
        }
        Value::Object(fields) => fields
            .iter()
            .flat_map(|(name, field)| match field.as_u64() {
                Some(1..) if STRANGE.contains(&name.as_str()) => vec![format!("{field} {name}")],
                _ => strange(field),
            })
            .collect(),
        _ => Vec::new(),
    }
}

fn expect_nothing_strange(scenario: &Scenario) {
    for side in Side::BOTH {
        let host = scenario.lab.host(side);
        let status = status(host).unwrap();
        // What is looked for must be there to be looked at.
        assert!(status["port"]["drops"].as_array().is_some_and(|drops| drops.len() > 3), "{status}");
        assert_eq!(strange(&status), Vec::<String>::new(), "on {side}");
        let log = std::fs::read_to_string(host.agent_log()).unwrap();
        assert!(!log.contains("panicked") && !log.contains("WARN") && !log.contains("ERROR"), "{log}");
    }
}

#[test]
fn memory_full_of_lies() {
    if skipped("memory_full_of_lies", GuestKind::Bare) {
        return;
    }
    let scenario = Scenario::started(LabConfig::for_test(), bare(Workload::USUAL).unwrap()).unwrap();
    let agents = Side::BOTH.map(|side| scenario.lab.host(side).agent_pid());
    for source in [Side::A, Side::B] {
        let ram = GuestRam::open(scenario.lab.host(source)).unwrap();
        // Before it is known which migration it will be.
        let guessed: Vec<_> = [0, 1, u64::MAX].into_iter().flat_map(hostile::pages).collect();
        ram.write(FIRST, &guessed).unwrap();
        let known = FIRST + guessed.len() as u64;
        let mut command = scenario.begin(source, &["--verify=full", "--bandwidth", "40"]).unwrap();
        // A guest cannot know; this one does. And it writes its lies anew in every round.
        let session = wait_for("the session's number", LIMIT, || {
            Ok(status(scenario.lab.host(source.other()))?["port"]["sessions"][0]["session"].as_u64())
        })
        .unwrap();
        let lies = hostile::pages(session);
        for round in 0..REWRITES {
            command.expect_running().unwrap();
            let mut changed = lies.clone();
            for page in &mut changed {
                page[hostile::PAGE - 1] ^= round as u8;
            }
            ram.write(known, &changed).unwrap();
            std::thread::sleep(Duration::from_millis(20));
        }
        ram.write(known, &lies).unwrap();
        let phase = status(scenario.lab.host(source)).unwrap()["leaving"][0]["phase"].clone();
        assert_eq!(phase, "pre-copy", "the guest could still write");
        assert!(command.wait(LIMIT).unwrap().success(), "{}", command.tail());
        let report = scenario.lab.host(source).report(None).unwrap();
        assert_eq!(report.verified(), Some(true));
        assert_eq!(strange(&report.0), Vec::<String>::new());
        scenario.expect_moved(source).unwrap();
        let arrived = GuestRam::open(scenario.lab.host(source.other())).unwrap();
        assert!(arrived.read(FIRST, guessed.len()).unwrap() == guessed);
        assert!(arrived.read(known, lies.len()).unwrap() == lies);
        println!(
            "{} lies, {} of them about session {session}: RAM equal",
            guessed.len() + lies.len(),
            lies.len()
        );
    }
    expect_nothing_strange(&scenario);
    assert_eq!(Side::BOTH.map(|side| scenario.lab.host(side).agent_pid()), agents);
}
