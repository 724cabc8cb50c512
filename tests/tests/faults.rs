//! Somebody stops, kills or disturbs a part of a migration that is under way: the VM runs on, on one side and whole.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rustix::process::{Pid, Signal, kill_process};
use xferry_lab::guest::GuestKind;
use xferry_lab::lab::plan::{MANAGEMENT_NIC, MIGRATION_NIC};
use xferry_lab::lab::{LabConfig, Process, Side, wait_for};
use xferry_lab::probe::{VmEvent, VmWatch, qemu_status};
use xferry_lab::scenario::{Junk, Scenario, Stranger, Workload, bare, skipped, status, tracked};

/// How long a command may take to end once its migration has.
const END_LIMIT: Duration = Duration::from_secs(60);
/// How long an agent may take to see that the other one is gone: it has a connection to it.
const NOTICE_LIMIT: Duration = Duration::from_secs(10);
/// Slow enough that a test can do something in the middle of the first round.
const SLOW: [&str; 2] = ["--bandwidth", "10"];
/// Steps of [`agents_killed_at_any_moment`].
const MOMENTS: u32 = 6;
const BETWEEN_MOMENTS: Duration = Duration::from_millis(35);
/// Steps of [`agents_killed_around_the_switchover`], which takes ten to twenty milliseconds.
const STEPS: u32 = 8;
const BETWEEN_STEPS: Duration = Duration::from_millis(2);
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
    let status = command.wait(NOTICE_LIMIT).unwrap();
    let said = command.output();
    assert!(!status.success(), "{said}");
    assert!(words.iter().all(|word| said.contains(word)), "{words:?} in {said}");
}

/// Nothing came of it, and nothing is left of it: the next migration is as good as the first.
fn stays_and_can_leave(scenario: &Scenario, side: Side) {
    scenario.expect_undisturbed(side).unwrap();
    scenario.expect_migrates(side, &["--verify=full"]).unwrap();
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
    stays_and_can_leave(&scenario, Side::A);
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
    stays_and_can_leave(&scenario, Side::A);
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
    stays_and_can_leave(&scenario, Side::A);
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
    stays_and_can_leave(&scenario, Side::A);
}

/// While everything is made ready and pages cross: an agent dies, comes back, and the VM is on one side.
#[test]
fn agents_killed_at_any_moment() {
    if skipped("agents_killed_at_any_moment", GuestKind::Bare) {
        return;
    }
    let scenario = scenario();
    let mut owner = Side::A;
    for moment in 0..MOMENTS {
        owner = agents_killed(&scenario, owner, || thread::sleep(BETWEEN_MOMENTS * moment));
    }
    stays_and_can_leave(&scenario, owner);
}

/// While ownership changes hands.
#[test]
fn agents_killed_around_the_switchover() {
    if skipped("agents_killed_around_the_switchover", GuestKind::Bare) {
        return;
    }
    let scenario = scenario();
    let mut owner = Side::A;
    for step in 0..STEPS {
        owner = agents_killed(&scenario, owner, || {
            let watches =
                Side::BOTH.map(|side| VmWatch::start(scenario.lab.host(side).vm_paths().lab_qmp).unwrap());
            let begin = SystemTime::now();
            let stopped = |event: &VmEvent| event.name == "STOP";
            let deadline = Instant::now() + END_LIMIT;
            while !watches.iter().any(|watch| watch.events_since(begin).iter().any(stopped)) {
                assert!(Instant::now() < deadline, "the VM is not stopped");
                thread::sleep(Duration::from_micros(200));
            }
            thread::sleep(BETWEEN_STEPS * step);
        });
    }
    stays_and_can_leave(&scenario, owner);
}

/// Either agent is killed in its turn after the VM began to leave and `fault` returned. Returns who has the VM.
fn agents_killed(scenario: &Scenario, mut owner: Side, fault: impl Fn()) -> Side {
    for victim in Side::BOTH {
        let migrate = ["migrate", "demo", "--to", owner.other().name()];
        let mut command = scenario.lab.host(owner).xferry_started(&migrate).unwrap();
        fault();
        scenario.lab.host(victim).kill_agent();
        scenario.lab.host(victim).start_agent().unwrap();
        command.wait(END_LIMIT).unwrap();
        owner = scenario.wait_settled().unwrap();
    }
    owner
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
    let report = scenario.lab.a.report(None).unwrap();
    // It was seen at once, not after the VM had been stopped in vain.
    assert_eq!(report.milliseconds("/downtime-phases/stop"), Some(0.0));
    stays_and_can_leave(&scenario, Side::A);
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
    stays_and_can_leave(&scenario, Side::A);
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

/// A lab whose agents do not wait long for each other.
fn hasty() -> (Scenario, Process) {
    let limits = vec![("dead-peer", 3), ("round", 2), ("silence", 2), ("hello", 2), ("switchover", 2)];
    let lab = LabConfig { limits, ..LabConfig::for_test() };
    let scenario = Scenario::started(lab, bare(Workload::USUAL).unwrap()).unwrap();
    let command = scenario.begin(Side::A, &SLOW).unwrap();
    (scenario, command)
}

/// Cuts `nic` of host-a until the migration has failed, and expects that nothing came of it.
fn cut_before_the_commit(nic: &str, silently: bool) {
    let (scenario, mut command) = hasty();
    let mut ip = scenario.lab.a.ready_ip().unwrap();
    let nobody = format!("{} lladdr 02:00:00:00:00:01 dev {nic} nud permanent", Side::B.management_ip());
    let (cut, mend) = if silently {
        (format!("neigh replace {nobody}"), format!("neigh delete {nobody}"))
    } else {
        (format!("link set {nic} down"), format!("link set {nic} up"))
    };
    ip.say(&cut).unwrap();
    assert!(!command.wait(END_LIMIT).unwrap().success(), "{}", command.output());
    scenario.expect_running(Side::A).unwrap();
    ip.say(&mend).unwrap();
    stays_and_can_leave(&scenario, Side::A);
}

#[test]
fn control_network_cut_before_the_commit() {
    if skipped("control_network_cut_before_the_commit", GuestKind::Bare) {
        return;
    }
    cut_before_the_commit(MANAGEMENT_NIC, false);
}

#[test]
fn control_network_silent_before_the_commit() {
    if skipped("control_network_silent_before_the_commit", GuestKind::Bare) {
        return;
    }
    cut_before_the_commit(MANAGEMENT_NIC, true);
}

#[test]
fn migration_network_cut_before_the_commit() {
    if skipped("migration_network_cut_before_the_commit", GuestKind::Bare) {
        return;
    }
    cut_before_the_commit(MIGRATION_NIC, false);
}

/// For longer than the other one waits: that one gives up, and the stopped one finds it so.
#[test]
fn agents_that_hang_are_given_up() {
    if skipped("agents_that_hang_are_given_up", GuestKind::Bare) {
        return;
    }
    for hung in Side::BOTH {
        let (scenario, mut command) = hasty();
        scenario.lab.host(hung).signal_agent(Signal::STOP).unwrap();
        match hung {
            // Nobody is there to say so.
            Side::A => scenario.lab.b.wait_vm_gone(END_LIMIT).unwrap(),
            Side::B => assert!(!command.wait(END_LIMIT).unwrap().success(), "{}", command.output()),
        }
        assert_eq!(qemu_status(&scenario.lab.a.vm_paths().lab_qmp).unwrap().as_deref(), Some("running"));
        scenario.lab.host(hung).signal_agent(Signal::CONT).unwrap();
        command.wait(END_LIMIT).unwrap();
        stays_and_can_leave(&scenario, Side::A);
    }
}

#[test]
fn hosts_that_reboot_before_the_commit() {
    if skipped("hosts_that_reboot_before_the_commit", GuestKind::Bare) {
        return;
    }
    let (scenario, mut command) = slowly_migrating();
    scenario.lab.b.crash(|| scenario.lab.b.kill_vm()).unwrap();
    fails(&mut command, &["host-a"]);
    scenario.lab.b.start_agent().unwrap();
    stays_and_can_leave(&scenario, Side::A);
    // It runs on host-b now, whose end is its own; host-a keeps nothing of what was to come.
    let mut command = scenario.begin(Side::B, &SLOW).unwrap();
    scenario.lab.b.crash(|| scenario.lab.b.kill_vm()).unwrap();
    command.wait(END_LIMIT).unwrap();
    scenario.lab.a.wait_vm_gone(END_LIMIT).unwrap();
    scenario.lab.b.start_agent().unwrap();
    scenario.boot().unwrap();
    scenario.expect_migrates(Side::A, &["--verify=full"]).unwrap();
}

#[test]
fn strangers_frames_are_counted_and_dropped() {
    if skipped("strangers_frames_are_counted_and_dropped", GuestKind::Bare) {
        return;
    }
    // By the XDP program, and by what stands in for it.
    for transport in ["af-xdp", "udp"] {
        let lab = LabConfig { transport: [transport; 2], ..LabConfig::for_test() };
        keeps_strangers_out(&Scenario::started(lab, bare(Workload::USUAL).unwrap()).unwrap());
    }
}

fn keeps_strangers_out(scenario: &Scenario) {
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
