//! Every row of the failure table (docs/architecture.md) between the source's commit and its confirmation: the
//! destination's journal stands on a disk that is made to wait there, so that each fault hits that very moment.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};
use xferry_lab::guest::GuestKind;
use xferry_lab::lab::plan::{MANAGEMENT_NIC, MIGRATION_NIC};
use xferry_lab::lab::{Filler, Held, HoldableDisk, LabConfig, Output, Process, Side, wait_for};
use xferry_lab::probe::qemu_status;
use xferry_lab::scenario::{self, Scenario, Workload, bare, status};

/// How long a migration or a settlement may take.
const LIMIT: Duration = Duration::from_secs(60);
/// Slow enough that a test can do something in the middle of the first round.
const UNHURRIED: [&str; 2] = ["--bandwidth", "60"];
/// Seconds that a source asks before a migration ends as unsettled.
const SETTLE: u64 = 2;
/// Seconds that a disk may take for a record.
const JOURNAL: u64 = 3;
/// Longer than any test: what waits for the disk is disturbed before.
const PATIENT: u64 = 50;

/// Says that a test cannot run here, and why, if so.
fn skipped(test: &str, guest: GuestKind) -> bool {
    let loops = Path::new("/dev/loop-control").exists();
    if !loops {
        println!("skipped: {test}: there are no loop devices (modprobe loop)");
    }
    !loops || scenario::skipped(test, guest)
}

/// A lab whose host-b keeps its journal on a disk that can be made to wait.
fn scenario(journal: u64) -> (Scenario, HoldableDisk) {
    let limits = vec![("settle", SETTLE), ("journal", journal)];
    let lab = LabConfig { limits, ..LabConfig::for_test() };
    let scenario = Scenario::new(lab, bare(Workload::USUAL).unwrap()).unwrap();
    let disk = scenario.lab.b.holdable_state_disk().unwrap();
    scenario.start_agents().unwrap();
    scenario.boot().unwrap();
    (scenario, disk)
}

/// A migration to host-b whose commit was sent, and which host-b cannot write down.
fn committing(journal: u64) -> (Scenario, Process, Held) {
    let (scenario, disk) = scenario(journal);
    let command = scenario.begin(Side::A, &UNHURRIED).unwrap();
    let held = disk.hold().unwrap();
    wait_for("the commit", LIMIT, || {
        let status = status(&scenario.lab.a)?;
        Ok((status["leaving"][0]["phase"] == "commit").then_some(()))
    })
    .unwrap();
    assert_eq!(run_state(&scenario, Side::A).as_deref(), Some("postmigrate"));
    assert_eq!(run_state(&scenario, Side::B).as_deref(), Some("paused"));
    (scenario, command, held)
}

/// The same, and host-b's agent died after it had written that it takes the VM, and before the VM ran: a fraction of a
/// millisecond that no signal hits. It dies before the write, and its last record is added.
fn accepted_and_dead() -> (Scenario, Process) {
    let (scenario, command, held) = committing(PATIENT);
    let host = &scenario.lab.b;
    // A process that waits for a disk ends when the disk answers.
    host.signal_agent(Signal::KILL).unwrap();
    drop(held);
    host.kill_agent();
    let journal = std::fs::read_to_string(host.journal()).unwrap();
    let record: Value =
        serde_json::from_str(journal.lines().last().unwrap().split_once(' ').unwrap().1).unwrap();
    assert_eq!(record["record"], "waiting", "{journal}");
    let accepted = json!({"record": "decided", "session": record["session"], "verdict": "accepted"});
    host.append_record(&accepted.to_string()).unwrap();
    assert_eq!(run_state(&scenario, Side::B).as_deref(), Some("paused"), "it never ran");
    (scenario, command)
}

fn run_state(scenario: &Scenario, side: Side) -> Option<String> {
    // One that is just ending does not answer.
    qemu_status(&scenario.lab.host(side).vm_paths().lab_qmp).ok().flatten()
}

fn wait_running(scenario: &Scenario, side: Side) {
    wait_for(&format!("the VM to run on {side}"), LIMIT, || {
        Ok((run_state(scenario, side).as_deref() == Some("running")).then_some(()))
    })
    .unwrap();
}

/// What `xferry status` says is not settled on a host, once a human can decide it.
fn undecided(scenario: &Scenario, side: Side) -> Value {
    wait_for("a session that a human can decide", LIMIT, || {
        let unsettled = status(scenario.lab.host(side))?["unsettled"][0].clone();
        Ok((!unsettled["choice"].is_null()).then_some(unsettled))
    })
    .unwrap()
}

fn resolve(scenario: &Scenario, side: Side, decision: &str) -> Output {
    let id = undecided(scenario, side)["id"].as_str().unwrap().to_owned();
    scenario.lab.host(side).xferry(&["resolve", &id, decision, "--yes"], LIMIT).unwrap()
}

fn expect_owner(scenario: &Scenario, owner: Side) {
    assert_eq!(scenario.wait_settled().unwrap(), owner);
    for side in Side::BOTH.into_iter().filter(|&side| scenario.lab.host(side).agent_pid().is_some()) {
        wait_for("nothing unsettled", LIMIT, || {
            let unsettled = status(scenario.lab.host(side))?["unsettled"].clone();
            Ok((unsettled == Value::Array(Vec::new())).then_some(()))
        })
        .unwrap();
    }
    scenario.expect_whole(owner).unwrap();
    scenario.expect_migrates(owner, &["--verify=full"]).unwrap();
}

#[test]
fn a_disk_that_does_not_answer_at_the_commit_keeps_the_vm_at_the_source() {
    if skipped("a_disk_that_does_not_answer_at_the_commit_keeps_the_vm_at_the_source", GuestKind::Bare) {
        return;
    }
    let (scenario, mut command, held) = committing(JOURNAL);
    // Until the disk answers, host-b cannot even say no for good.
    wait_for("host-b to give up", LIMIT, || Ok(run_state(&scenario, Side::B).is_none().then_some(())))
        .unwrap();
    drop(held);
    command.wait(LIMIT).unwrap();
    expect_owner(&scenario, Side::A);
}

#[test]
fn destination_agent_dies_between_accepting_and_running() {
    if skipped("destination_agent_dies_between_accepting_and_running", GuestKind::Bare) {
        return;
    }
    let (scenario, mut command) = accepted_and_dead();
    scenario.lab.b.start_agent().unwrap();
    expect_owner(&scenario, Side::B);
    command.wait(LIMIT).unwrap();
}

#[test]
fn both_agents_die_between_accepting_and_running() {
    if skipped("both_agents_die_between_accepting_and_running", GuestKind::Bare) {
        return;
    }
    let (scenario, _command) = accepted_and_dead();
    scenario.lab.a.kill_agent();
    scenario.lab.b.start_agent().unwrap();
    // It may not run before the source says that it did not keep it.
    let open = undecided(&scenario, Side::B);
    assert_eq!((open["role"].as_str(), open["vm"].as_str()), (Some("destination"), Some("demo")), "{open:#}");
    assert_eq!(run_state(&scenario, Side::B).as_deref(), Some("paused"));
    scenario.lab.a.start_agent().unwrap();
    expect_owner(&scenario, Side::B);
    // What died with its agent is in the history nevertheless.
    let report = scenario.lab.a.report(Some("host-a-1")).unwrap();
    assert_eq!(report.status(), Some("completed"), "{:#}", report.0);
    assert!(report.0["notes"].to_string().contains("settled later"), "{:#}", report.0);
}

#[test]
fn source_agent_dies_with_the_commit_on_its_way() {
    if skipped("source_agent_dies_with_the_commit_on_its_way", GuestKind::Bare) {
        return;
    }
    let (scenario, _command, held) = committing(PATIENT);
    scenario.lab.a.kill_agent();
    drop(held);
    wait_running(&scenario, Side::B);
    assert_eq!(run_state(&scenario, Side::A).as_deref(), Some("postmigrate"), "nobody has asked yet");
    scenario.lab.a.start_agent().unwrap();
    expect_owner(&scenario, Side::B);
}

#[test]
fn source_qemu_dies_after_the_commit() {
    if skipped("source_qemu_dies_after_the_commit", GuestKind::Bare) {
        return;
    }
    let (scenario, mut command, held) = committing(PATIENT);
    scenario.lab.a.kill_vm().unwrap();
    drop(held);
    assert!(command.wait(LIMIT).unwrap().success(), "{}", command.output());
    expect_owner(&scenario, Side::B);
}

#[test]
fn destination_qemu_dies_before_it_is_accepted() {
    if skipped("destination_qemu_dies_before_it_is_accepted", GuestKind::Bare) {
        return;
    }
    let (scenario, mut command, held) = committing(PATIENT);
    scenario.lab.b.kill_vm().unwrap();
    drop(held);
    assert!(!command.wait(LIMIT).unwrap().success(), "{}", command.output());
    assert!(command.output().contains("QEMU"), "{}", command.output());
    expect_owner(&scenario, Side::A);
}

#[test]
fn both_networks_are_cut_with_the_commit_on_its_way() {
    if skipped("both_networks_are_cut_with_the_commit_on_its_way", GuestKind::Bare) {
        return;
    }
    let (scenario, mut command, held) = committing(PATIENT);
    let mut ip = scenario.lab.a.ready_ip().unwrap();
    for nic in [MANAGEMENT_NIC, MIGRATION_NIC] {
        ip.say(&format!("link set {nic} down")).unwrap();
    }
    drop(held);
    // The commit had arrived, the confirmation does not.
    assert!(!command.wait(LIMIT).unwrap().success());
    let said = command.output();
    assert!(said.contains("UNSETTLED") && said.contains("xferry resolve host-a-1"), "{said}");
    assert_eq!(run_state(&scenario, Side::A).as_deref(), Some("postmigrate"));
    assert_eq!(run_state(&scenario, Side::B).as_deref(), Some("running"));
    for nic in [MANAGEMENT_NIC, MIGRATION_NIC] {
        ip.say(&format!("link set {nic} up")).unwrap();
    }
    expect_owner(&scenario, Side::B);
    let report = scenario.lab.a.report(Some("host-a-1")).unwrap();
    assert_eq!(report.status(), Some("completed"), "{:#}", report.0);
}

/// Host-b is gone for good and took nothing: a human keeps the VM on host-a. And host-b comes back all the same.
#[test]
fn a_human_keeps_the_vm_at_the_source() {
    if skipped("a_human_keeps_the_vm_at_the_source", GuestKind::Bare) {
        return;
    }
    let (scenario, mut command) = accepted_and_dead();
    assert!(!command.wait(LIMIT).unwrap().success(), "{}", command.output());
    let refused = scenario.lab.a.xferry(&["migrate", "demo", "--to", "host-b"], LIMIT).unwrap();
    assert!(refused.stderr.contains("not settled yet"), "{refused:?}");
    let asked = scenario.lab.a.xferry(&["resolve", "host-a-1", "--keep-here"], LIMIT).unwrap();
    assert!(asked.stderr.contains("--yes") && asked.stdout.contains("WARNING"), "{asked:?}");
    let resolved = resolve(&scenario, Side::A, "--keep-here");
    assert!(resolved.status.success() && resolved.stdout.contains("never have run"), "{resolved:?}");
    wait_running(&scenario, Side::A);
    // It had taken the VM, and is told that this does not count any more.
    scenario.lab.b.start_agent().unwrap();
    expect_owner(&scenario, Side::A);
}

/// Host-a is gone for good: a human lets the VM run on host-b. And host-a comes back all the same.
#[test]
fn a_human_keeps_the_vm_at_the_destination() {
    if skipped("a_human_keeps_the_vm_at_the_destination", GuestKind::Bare) {
        return;
    }
    let (scenario, _command) = accepted_and_dead();
    scenario.lab.a.kill_agent();
    scenario.lab.b.start_agent().unwrap();
    assert!(resolve(&scenario, Side::B, "--keep-here").status.success());
    wait_running(&scenario, Side::B);
    scenario.lab.a.start_agent().unwrap();
    expect_owner(&scenario, Side::B);
}

/// Host-b took the VM and died with it, and nobody knows whether it ran: nothing is thrown away on a guess.
#[test]
fn a_vm_that_was_taken_and_is_gone_waits_for_a_human() {
    if skipped("a_vm_that_was_taken_and_is_gone_waits_for_a_human", GuestKind::Bare) {
        return;
    }
    let (scenario, mut command) = accepted_and_dead();
    scenario.lab.b.kill_vm().unwrap();
    scenario.lab.b.start_agent().unwrap();
    let open = undecided(&scenario, Side::B);
    assert!(open["state"].as_str().unwrap().contains("whether it ever ran here"), "{open:#}");
    assert!(!command.wait(LIMIT).unwrap().success());
    assert_eq!(run_state(&scenario, Side::A).as_deref(), Some("postmigrate"), "the last copy is kept");
    assert!(resolve(&scenario, Side::B, "--give-up").status.success());
    expect_owner(&scenario, Side::A);
}

#[test]
fn kept_source_stays_paused_and_is_named_when_it_is_in_the_way() {
    if skipped("kept_source_stays_paused_and_is_named_when_it_is_in_the_way", GuestKind::Bare) {
        return;
    }
    let scenario = Scenario::started(LabConfig::for_test(), bare(Workload::USUAL).unwrap()).unwrap();
    let output = scenario.migrate(Side::A, &["--keep-source", "--verify"]).unwrap();
    assert!(output.status.success() && output.stdout.contains("--keep-source"), "{output:?}");
    assert_eq!(run_state(&scenario, Side::A).as_deref(), Some("postmigrate"));
    scenario.expect_whole(Side::B).unwrap();
    let back = scenario.migrate(Side::B, &[]).unwrap();
    assert!(back.stderr.contains("QMP `quit`") || back.stdout.contains("QMP `quit`"), "{back:?}");
    scenario.expect_whole(Side::B).unwrap();
    scenario.lab.a.kill_vm().unwrap();
    scenario.expect_migrates(Side::B, &["--verify=full"]).unwrap();
}

/// Room for the journal is wanted before anything is touched.
#[test]
fn full_disk_refuses_to_start_a_migration() {
    if skipped("full_disk_refuses_to_start_a_migration", GuestKind::Bare) {
        return;
    }
    let lab = LabConfig { state_disk: Some(1 << 20), ..LabConfig::for_test() };
    let scenario = Scenario::started(lab, bare(Workload::USUAL).unwrap()).unwrap();
    for side in Side::BOTH {
        let full = filled(&scenario, side);
        let output = scenario.migrate(Side::A, &[]).unwrap();
        let said = format!("{}{}", output.stdout, output.stderr);
        assert!(
            !output.status.success() && said.contains("handover.journal takes no record"),
            "{side}: {said}"
        );
        let report = scenario.lab.a.report(None).unwrap();
        assert_eq!(report.milliseconds("/downtime-phases/stop"), Some(0.0), "the VM was not touched");
        drop(full);
        scenario.expect_undisturbed(Side::A).unwrap();
    }
    scenario.expect_migrates(Side::A, &["--verify=full"]).unwrap();
}

/// The disk of a host has no byte left for its journal.
fn filled(scenario: &Scenario, side: Side) -> Filler {
    let host = scenario.lab.host(side);
    let mut filler = host.fill_state_disk(0).unwrap();
    filler.fill_up().unwrap();
    host.pad_journal(0).unwrap();
    filler
}

#[test]
fn source_host_reboots_with_the_commit_on_its_way() {
    if skipped("source_host_reboots_with_the_commit_on_its_way", GuestKind::Bare) {
        return;
    }
    let (scenario, _command, held) = committing(PATIENT);
    scenario.lab.a.crash(|| scenario.lab.a.kill_vm()).unwrap();
    drop(held);
    wait_running(&scenario, Side::B);
    scenario.lab.a.start_agent().unwrap();
    expect_owner(&scenario, Side::B);
}

/// What was not written is not sent.
#[test]
fn a_disk_that_does_not_answer_at_the_source_keeps_the_vm_there() {
    if skipped("a_disk_that_does_not_answer_at_the_source_keeps_the_vm_there", GuestKind::Bare) {
        return;
    }
    let lab = LabConfig { limits: vec![("journal", JOURNAL)], ..LabConfig::for_test() };
    let scenario = Scenario::new(lab, bare(Workload::USUAL).unwrap()).unwrap();
    let disk = scenario.lab.a.holdable_state_disk().unwrap();
    scenario.start_agents().unwrap();
    scenario.boot().unwrap();
    let mut command = scenario.begin(Side::A, &UNHURRIED).unwrap();
    let held = disk.hold().unwrap();
    wait_for("the VM to run on", LIMIT, || {
        // The end is written when the disk answers again; the VM does not wait for that.
        let failed = status(&scenario.lab.a)?["leaving"][0]["downtime-phases"]["state"].as_f64();
        Ok((failed > Some(0.0) && run_state(&scenario, Side::A).as_deref() == Some("running")).then_some(()))
    })
    .unwrap();
    drop(held);
    assert!(!command.wait(LIMIT).unwrap().success(), "{}", command.output());
    assert!(command.output().contains("did not answer within 3 s"), "{}", command.output());
    expect_owner(&scenario, Side::A);
}
