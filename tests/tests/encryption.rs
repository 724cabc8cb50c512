//! Pages are encrypted unless both hosts are told otherwise, and hosts that do not agree say so.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use xferry_lab::guest::GuestKind;
use xferry_lab::lab::{Host, LabConfig, Report, Side};
use xferry_lab::scenario::{Scenario, Workload, bare, skipped, status};

const LIMIT: Duration = Duration::from_secs(60);
const CHECK: [&str; 4] = ["check", "demo", "--to", "host-b"];

fn scenario() -> Scenario {
    Scenario::started(LabConfig::for_test(), bare(Workload::USUAL).unwrap()).unwrap()
}

/// Starts the agent anew with `setting` before its first table.
fn restart(host: &Host, setting: &str) {
    host.kill_agent();
    host.start_agent_saying(setting).unwrap();
}

fn both(scenario: &Scenario, setting: &str) {
    restart(&scenario.lab.a, setting);
    restart(&scenario.lab.b, setting);
}

fn used(report: &Report) -> String {
    report.get("/transport/encryption").and_then(|name| name.as_str()).unwrap().to_owned()
}

/// What the check says of page encryption, and its exit code.
fn checked(scenario: &Scenario) -> (String, Option<i32>) {
    let output = scenario.lab.a.xferry(&CHECK, LIMIT).unwrap();
    let line = output.stdout.lines().find(|line| line.contains("page-encryption"));
    (line.unwrap_or_else(|| panic!("{}", output.stdout)).to_owned(), output.status.code())
}

#[test]
fn every_cipher_and_none() {
    if skipped("every_cipher_and_none", GuestKind::Bare) {
        return;
    }
    let scenario = scenario();
    let mut source = Side::A;
    let mut crosses = |name: &str| {
        let report = scenario.expect_migrates(source, &["--verify"]).unwrap();
        assert_eq!(used(&report), name);
        for figures in report.get("/stream/queues").unwrap().as_array().unwrap() {
            assert_eq!((&figures["bad-tag"], &figures["corrupt"]), (&0.into(), &0.into()), "{name}");
        }
        source = source.other();
    };
    // By default, with what is fastest here.
    let fastest =
        if std::arch::is_x86_feature_detected!("aes") { "aes-128-gcm" } else { "chacha20-poly1305" };
    crosses(fastest);
    for cipher in ["aes-256-gcm", "chacha20-poly1305", "aes-128-gcm"] {
        both(&scenario, &format!("ciphers = [\"{cipher}\"]"));
        crosses(cipher);
    }
    assert_eq!(status(&scenario.lab.b).unwrap()["page-encryption"], "required");
    both(&scenario, "encryption = \"off\"");
    crosses("off");
    let text = scenario.lab.b.xferry(&["status"], LIMIT).unwrap().stdout;
    assert!(text.contains("pages NOT ENCRYPTED"), "{text}");
}

#[test]
fn hosts_that_do_not_agree() {
    if skipped("hosts_that_do_not_agree", GuestKind::Bare) {
        return;
    }
    let scenario = scenario();
    let (a, b) = (&scenario.lab.a, &scenario.lab.b);
    let says = |code: Option<i32>, words: &[&str]| {
        let (line, ended) = checked(&scenario);
        assert!(words.iter().all(|word| line.contains(word)), "{words:?} in {line}");
        assert_eq!(ended, code, "{line}");
    };
    restart(b, "encryption = \"off\"");
    says(Some(1), &["✗", "host-a requires encrypted pages, host-b has them off"]);
    let refused = a.xferry(&["migrate", "demo", "--to", "host-b", "--force"], LIMIT).unwrap();
    assert_eq!(refused.status.code(), Some(1));
    scenario.expect_running(Side::A).unwrap();
    restart(a, "ciphers = [\"aes-256-gcm\"]");
    restart(b, "ciphers = [\"chacha20-poly1305\"]");
    says(Some(1), &["✗", "no cipher in common", "host-b takes chacha20-poly1305"]);
    // Who only prefers it goes without, and it is said.
    restart(a, "encryption = \"preferred\"");
    restart(b, "encryption = \"off\"");
    says(Some(0), &["!", "pages are not encrypted (off on host-b)"]);
    let report = scenario.expect_migrates(Side::A, &["--verify"]).unwrap();
    assert_eq!(used(&report), "off");
    assert!(report.get("/notes").unwrap().to_string().contains("page-encryption"));
}
