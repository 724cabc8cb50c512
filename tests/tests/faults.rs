//! Somebody stops, kills or disturbs a part of a migration that is under way: the VM runs on, on one side and whole.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use xferry_lab::guest::GuestKind;
use xferry_lab::lab::{LabConfig, Process, Side, wait_for};
use xferry_lab::scenario::{Junk, Scenario, Stranger, Workload, bare, skipped, status, tracked};

/// How long a command may take to end once its migration has.
const END_LIMIT: Duration = Duration::from_secs(60);
/// Slow enough that a test can do something in the middle of the first round.
const SLOW: [&str; 2] = ["--bandwidth", "10"];
/// Steps of [`agents_killed_at_any_moment`].
const MOMENTS: u32 = 8;
const BETWEEN_MOMENTS: Duration = Duration::from_millis(25);
/// As slow as can be waited for.
const UNHURRIED: [&str; 3] = ["--bandwidth", "40", "--verify"];

fn scenario() -> Scenario {
    Scenario::started(LabConfig::for_test(), bare(Workload::USUAL).unwrap()).unwrap()
}

/// A migration in its first round, which goes on for a while.
fn slowly_migrating() -> (Scenario, Process) {
    let scenario = scenario();
    let command = scenario.begin(Side::A, &SLOW).unwrap();
    // What the checks afterwards look for is there now.
    assert!(tracked(scenario.lab.a.qemu_pids().unwrap()[0]).unwrap());
    assert_eq!(scenario.lab.b.qemu_pids().unwrap().len(), 1);
    (scenario, command)
}

/// The command ends with an error that says this.
fn fails(command: &mut Process, words: &[&str]) {
    let status = command.wait(END_LIMIT).unwrap();
    let said = command.output();
    assert!(!status.success(), "{said}");
    assert!(words.iter().all(|word| said.contains(word)), "{words:?} in {said}");
}

/// Nothing came of it, and nothing is left of it: the next migration is as good as the first.
fn stays_and_can_leave(scenario: &Scenario) {
    scenario.expect_undisturbed(Side::A).unwrap();
    scenario.expect_migrates(Side::A, &["--verify=full"]).unwrap();
}

#[test]
fn interrupted_command_cancels() {
    if skipped("interrupted_command_cancels", GuestKind::Bare) {
        return;
    }
    let (scenario, mut command) = slowly_migrating();
    command.signal(Signal::INT).unwrap();
    fails(&mut command, &["cancel", "host-a"]);
    assert_eq!(scenario.lab.a.report(None).unwrap().status(), Some("cancelled"));
    stays_and_can_leave(&scenario);
}

#[test]
fn cancel_by_another_command() {
    if skipped("cancel_by_another_command", GuestKind::Bare) {
        return;
    }
    let (scenario, mut command) = slowly_migrating();
    let output = scenario.lab.a.xferry(&["cancel"], END_LIMIT).unwrap();
    assert!(output.status.success(), "{output:?}");
    fails(&mut command, &["cancelled"]);
    let report = scenario.lab.a.report(None).unwrap();
    assert_eq!((report.status(), report.text("/error-desc")), (Some("cancelled"), Some("cancelled")));
    stays_and_can_leave(&scenario);
}

#[test]
fn killed_command_does_not_matter() {
    if skipped("killed_command_does_not_matter", GuestKind::Bare) {
        return;
    }
    let scenario = scenario();
    let mut command = scenario.begin(Side::A, &UNHURRIED).unwrap();
    command.kill();
    let report = scenario.wait_ended(Side::A).unwrap();
    assert_eq!((report.status(), report.verified()), (Some("completed"), Some(true)), "{:#}", report.0);
    scenario.expect_moved(Side::A).unwrap();
}

#[test]
fn killed_source_agent() {
    if skipped("killed_source_agent", GuestKind::Bare) {
        return;
    }
    let (scenario, mut command) = slowly_migrating();
    scenario.lab.a.kill_agent();
    fails(&mut command, &["agent"]);
    scenario.expect_undisturbed(Side::A).unwrap();
    scenario.lab.a.start_agent().unwrap();
    stays_and_can_leave(&scenario);
}

#[test]
fn killed_destination_agent() {
    if skipped("killed_destination_agent", GuestKind::Bare) {
        return;
    }
    let (scenario, mut command) = slowly_migrating();
    scenario.lab.b.kill_agent();
    fails(&mut command, &["the other agent"]);
    scenario.expect_running(Side::A).unwrap();
    scenario.lab.b.start_agent().unwrap();
    stays_and_can_leave(&scenario);
}

/// An agent that dies while it makes ready, which takes a tenth of a second and has many steps.
#[test]
fn agents_killed_at_any_moment() {
    if skipped("agents_killed_at_any_moment", GuestKind::Bare) {
        return;
    }
    let scenario = scenario();
    for moment in 0..MOMENTS {
        for side in Side::BOTH {
            let migrate = ["migrate", "demo", "--to", "host-b", "--bandwidth", "10"];
            let mut command = scenario.lab.a.xferry_started(&migrate).unwrap();
            // The moment of the fault, not a wait for anything.
            thread::sleep(BETWEEN_MOMENTS * moment);
            scenario.lab.host(side).kill_agent();
            fails(&mut command, &[]);
            scenario.expect_running(Side::A).unwrap();
            scenario.lab.host(side).start_agent().unwrap();
            let check = scenario.lab.a.xferry(&["check", "demo", "--to", "host-b"], END_LIMIT).unwrap();
            assert!(check.status.success(), "agent of {side}, moment {moment}: {check:?}");
        }
    }
    stays_and_can_leave(&scenario);
}

#[test]
fn killed_destination_qemu() {
    if skipped("killed_destination_qemu", GuestKind::Bare) {
        return;
    }
    let scenario = scenario();
    let mut command = scenario.begin(Side::A, &UNHURRIED).unwrap();
    let pid = scenario.lab.b.qemu_pids().unwrap()[0];
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    fails(&mut command, &["host-b", "QEMU"]);
    stays_and_can_leave(&scenario);
}

/// The source's QEMU dies by itself: there is nothing left to move, and nothing may be left of the attempt.
#[test]
fn killed_source_qemu() {
    if skipped("killed_source_qemu", GuestKind::Bare) {
        return;
    }
    let scenario = scenario();
    let mut command = scenario.begin(Side::A, &UNHURRIED).unwrap();
    scenario.lab.a.kill_vm().unwrap();
    fails(&mut command, &["QEMU"]);
    scenario.lab.b.wait_vm_gone(END_LIMIT).unwrap();
    scenario.boot().unwrap();
    stays_and_can_leave(&scenario);
}

#[test]
fn stopped_destination_agent_only_delays() {
    if skipped("stopped_destination_agent_only_delays", GuestKind::Bare) {
        return;
    }
    let scenario = scenario();
    let mut command = scenario.begin(Side::A, &UNHURRIED).unwrap();
    scenario.lab.b.signal_agent(Signal::STOP).unwrap();
    // The length of the fault, not a wait for anything.
    thread::sleep(Duration::from_secs(2));
    scenario.lab.b.signal_agent(Signal::CONT).unwrap();
    assert!(command.wait(END_LIMIT).unwrap().success(), "{}", command.output());
    assert_eq!(scenario.lab.a.report(None).unwrap().verified(), Some(true));
    scenario.expect_moved(Side::A).unwrap();
}

#[test]
fn strangers_frames_are_counted_and_dropped() {
    if skipped("strangers_frames_are_counted_and_dropped", GuestKind::Bare) {
        return;
    }
    let scenario = scenario();
    let stranger = Stranger::start(&scenario.lab, Side::A).unwrap();
    let dropped = |reason: &str| {
        let drops = status(&scenario.lab.b).unwrap()["port"]["drops"].clone();
        let drop = drops.as_array().unwrap().iter().find(|drop| drop["reason"] == reason).cloned();
        drop.unwrap_or_else(|| panic!("no {reason} in {drops}"))["frames"].as_u64().unwrap()
    };
    let mut command = scenario.begin(Side::A, &UNHURRIED).unwrap();
    assert!(command.wait(END_LIMIT).unwrap().success(), "{}", command.output());
    assert_eq!(scenario.lab.a.report(None).unwrap().verified(), Some(true));
    scenario.expect_moved(Side::A).unwrap();
    // Some may get lost on a full link, but not most.
    let enough = stranger.sent() / 2;
    assert!(enough > 100, "{enough}");
    wait_for("the counters", END_LIMIT, || Ok((dropped("unknown-session") >= enough).then_some(()))).unwrap();
    for junk in Junk::ALL {
        assert!(dropped(junk.reason()) >= enough, "{junk:?}: {} of {enough}", dropped(junk.reason()));
    }
    assert_eq!(status(&scenario.lab.b).unwrap()["port"]["corrupt"], 0);
    drop(stranger);
    let before = Junk::ALL.map(|junk| dropped(junk.reason()));
    scenario.expect_migrates(Side::B, &["--verify"]).unwrap();
    assert_eq!(Junk::ALL.map(|junk| dropped(junk.reason())), before);
}
