//! Agents know each other by their certificates, and nobody else gets anything out of them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, Permissions};
use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use xferry_lab::guest::GuestKind;
use xferry_lab::lab::plan::CONTROL_PORT;
use xferry_lab::lab::{Host, LabConfig, Output, Side, netns, wait_for};
use xferry_lab::scenario::{Scenario, Workload, bare, greet, hello, skipped, status};

/// How long a command that is refused may take.
const LIMIT: Duration = Duration::from_secs(60);
/// A refusal does not wait for any time limit.
const AT_ONCE: Duration = Duration::from_secs(4);
const MIGRATE: [&str; 4] = ["migrate", "demo", "--to", "host-b"];
const CHECK: [&str; 4] = ["check", "demo", "--to", "host-b"];

fn scenario() -> Scenario {
    Scenario::started(LabConfig::for_test(), bare(Workload::USUAL).unwrap()).unwrap()
}

fn has(text: &str, words: &[&str]) {
    assert!(words.iter().all(|word| text.contains(word)), "{words:?} in {text}");
}

fn said(output: &Output) -> String {
    format!("{}{}", output.stdout, output.stderr)
}

/// The migration and the check are refused with these words, at once, and the VM runs on.
fn refused(scenario: &Scenario, words: &[&str]) {
    for args in [MIGRATE, CHECK] {
        let begun = Instant::now();
        let output = scenario.lab.a.xferry(&args, LIMIT).unwrap();
        assert!(begun.elapsed() < AT_ONCE, "{args:?} took {:?}", begun.elapsed());
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        has(&said(&output), words);
    }
    scenario.expect_running(Side::A).unwrap();
    scenario.lab.b.wait_vm_gone(LIMIT).unwrap();
}

fn logged(host: &Host, words: &[&str]) {
    let log = || fs::read_to_string(host.agent_log()).unwrap();
    let found = |text: &str| text.lines().any(|line| words.iter().all(|word| line.contains(word)));
    wait_for("a line of the log", LIMIT, || Ok(found(&log()).then_some(())))
        .unwrap_or_else(|_| panic!("{words:?} in {}", log()));
}

fn restart(host: &Host, config: &str) {
    host.kill_agent();
    host.start_agent_by(config).unwrap();
}

/// Its agent's configuration without certificates.
fn insecure(host: &Host) -> String {
    host.agent_config().unwrap().replace("insecure = false", "insecure = true")
}

#[test]
fn there_and_back_with_certificates() {
    if skipped("there_and_back_with_certificates", GuestKind::Bare) {
        return;
    }
    let scenario = scenario();
    let check = scenario.lab.a.xferry(&CHECK, LIMIT).unwrap();
    has(
        &check.stdout,
        &["✓ control-channel", "TLS 1.3", "certificates of host-a until", "✓ page-encryption"],
    );
    let there = scenario.expect_migrates(Side::A, &["--verify"]).unwrap();
    let back = scenario.expect_migrates(Side::B, &["--verify"]).unwrap();
    for report in [there, back] {
        println!("with TLS: blackout {} ms", report.get("/downtime").unwrap());
    }
    let status = status(&scenario.lab.b).unwrap();
    assert_eq!(status["encrypted"], true);
    assert_eq!(status["authenticated"], true);
    assert_eq!(status["page-encryption"], "required");
    assert_eq!(status["certificate"]["name"], "host-b");
    assert_eq!(status["certificate"]["days-left"], 364);
    let text = scenario.lab.b.xferry(&["status"], LIMIT).unwrap().stdout;
    has(&text, &["control channel and pages authenticated and encrypted", "certificate of host-b until"]);
}

#[test]
fn without_certificates_it_is_said_everywhere() {
    if skipped("without_certificates_it_is_said_everywhere", GuestKind::Bare) {
        return;
    }
    let scenario = Scenario::started(LabConfig::insecure(), bare(Workload::USUAL).unwrap()).unwrap();
    let check = scenario.lab.a.xferry(&CHECK, LIMIT).unwrap();
    has(&check.stdout, &["! control-channel", "neither authenticated nor encrypted", "xferry pki"]);
    let there = scenario.expect_migrates(Side::A, &["--verify"]).unwrap();
    let back = scenario.expect_migrates(Side::B, &["--verify"]).unwrap();
    for report in [&there, &back] {
        println!("without TLS: blackout {} ms", report.get("/downtime").unwrap());
    }
    has(&there.get("/notes").unwrap().to_string(), &["control-channel", "insecure = true"]);
    let text = scenario.lab.b.xferry(&["status"], LIMIT).unwrap().stdout;
    has(&text, &["NOT ENCRYPTED, NOT AUTHENTICATED (insecure = true)"]);
    assert_eq!(status(&scenario.lab.b).unwrap()["authenticated"], false);
}

#[test]
fn one_host_without_certificates() {
    if skipped("one_host_without_certificates", GuestKind::Bare) {
        return;
    }
    let scenario = scenario();
    let (a, b) = (&scenario.lab.a, &scenario.lab.b);
    restart(b, &insecure(b));
    refused(&scenario, &["does not speak TLS", "xferry pki", "insecure = true"]);
    logged(b, &["speaks TLS", "insecure = true"]);
    restart(a, &insecure(a));
    restart(b, &b.agent_config().unwrap());
    refused(&scenario, &["speaks TLS", "insecure = true"]);
    logged(b, &["does not speak TLS"]);
    restart(a, &a.agent_config().unwrap());
    scenario.expect_migrates(Side::A, &["--verify"]).unwrap();
}

#[test]
fn stranger_with_a_certificate_of_another_ca() {
    if skipped("stranger_with_a_certificate_of_another_ca", GuestKind::Bare) {
        return;
    }
    let scenario = scenario();
    let (a, b) = (&scenario.lab.a, &scenario.lab.b);
    // At the other end.
    b.become_stranger().unwrap();
    restart(b, &b.agent_config().unwrap());
    refused(&scenario, &["control-channel", "certificate is not accepted", "another CA", "ca.pem"]);
    // And as the caller.
    b.renew_certificate().unwrap();
    restart(b, &b.agent_config().unwrap());
    a.become_stranger().unwrap();
    restart(a, &a.agent_config().unwrap());
    refused(&scenario, &["does not accept this host's certificate", "another CA"]);
    logged(b, &["connection refused", "another CA"]);
    a.renew_certificate().unwrap();
    restart(a, &a.agent_config().unwrap());
    scenario.expect_migrates(Side::A, &["--verify"]).unwrap();
}

#[test]
fn hosts_that_may_not() {
    if skipped("hosts_that_may_not", GuestKind::Bare) {
        return;
    }
    let scenario = scenario();
    let (a, b) = (&scenario.lab.a, &scenario.lab.b);
    b.kill_agent();
    b.start_agent_with("[allow]\nsend = [\"host-c\"]\n").unwrap();
    refused(&scenario, &["host-a may not send VMs", "host-c", "[allow] send on host-b"]);
    logged(b, &["host-a may not send"]);
    b.kill_agent();
    b.start_agent_with("[allow]\nsend = [\"host-a\"]\nreceive = []\n").unwrap();
    a.kill_agent();
    a.start_agent_with("[allow]\nreceive = [\"host-c\"]\n").unwrap();
    refused(&scenario, &["host-b may not receive VMs", "host-c", "[allow] receive on host-a"]);
    a.kill_agent();
    a.start_agent().unwrap();
    // By address too it is host-b, and nothing else is there.
    let by_address = ["migrate", "demo", "--to", "10.78.0.2:4790", "--verify"];
    let output = a.xferry(&by_address, LIMIT).unwrap();
    assert!(output.status.success(), "{}", said(&output));
    scenario.expect_moved(Side::A).unwrap();
    // What came may not go back: host-b gives nothing away.
    let output = b.xferry(&["migrate", "demo", "--to", "host-a"], LIMIT).unwrap();
    has(&said(&output), &["host-a may not receive VMs", "none", "[allow] receive on host-b"]);
    let output = b.xferry(&["migrate", "demo", "--to", "10.78.0.9"], LIMIT).unwrap();
    has(&said(&output), &["10.78.0.9:4790", "no configured peer", "[peers]"]);
    scenario.expect_running(Side::B).unwrap();
}

#[test]
fn files_that_are_not_as_they_should_be() {
    if skipped("files_that_are_not_as_they_should_be", GuestKind::Bare) {
        return;
    }
    let scenario = Scenario::new(LabConfig::for_test(), bare(Workload::USUAL).unwrap()).unwrap();
    let a = &scenario.lab.a;
    a.start_agent().unwrap();
    let refuses = |words: &[&str]| {
        a.kill_agent();
        has(&format!("{:#}", a.start_agent().unwrap_err()), words);
    };
    let key = a.pki_dir().join("agent.key");
    fs::set_permissions(&key, Permissions::from_mode(0o644)).unwrap();
    refuses(&["agent.key", "0644", "chmod 600"]);
    fs::remove_file(&key).unwrap();
    refuses(&["agent.key", "xferry pki issue", "insecure = true"]);
    a.renew_certificate().unwrap();
    a.start_agent().unwrap();
    a.kill_agent();
    let renamed = a.agent_config().unwrap().replace("name = \"host-a\"", "name = \"host-x\"");
    has(
        &format!("{:#}", a.start_agent_by(&renamed).unwrap_err()),
        &["agent.pem", "\"host-a\"", "\"host-x\""],
    );
}

/// Who speaks no TLS, or says nothing, learns nothing; and takes no place from a peer for long.
#[test]
fn prober_learns_nothing() {
    if skipped("prober_learns_nothing", GuestKind::Bare) {
        return;
    }
    let limits = vec![("hello", 2)];
    let lab = LabConfig { limits, ..LabConfig::for_test() };
    let scenario = Scenario::started(lab, bare(Workload::USUAL).unwrap()).unwrap();
    let huge = [0xff; 4096];
    for words in [&hello(2)[..], &hello(99), b"GET / HTTP/1.1\r\n\r\n", &[0, 0, 0, 2, 1, b'x'], &huge] {
        let answer = greet(&scenario.lab, Side::B, words).unwrap();
        // A TLS alert: seven bytes.
        assert!(answer.len() <= 16 && !answer.contains("host"), "{answer:?}");
    }
    let address = SocketAddr::from((Side::B.management_ip(), CONTROL_PORT));
    let connect = || netns::inside(&scenario.lab.a.namespace(), || Ok(TcpStream::connect(address)?)).unwrap();
    let mut silent: Vec<TcpStream> = (0..100).map(|_| connect()).collect();
    let begun = Instant::now();
    for stream in &mut silent {
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        // Hung up, in whichever way.
        assert!(!matches!(stream.read(&mut [0; 64]), Ok(1..)), "it says something");
    }
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    scenario.expect_migrates(Side::A, &["--verify"]).unwrap();
}
