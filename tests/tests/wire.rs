//! A migration network that loses, repeats, reorders and corrupts, that is slow, or goes away: the VM moves and is equal,
//! or stays and is whole.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use xferry_lab::guest::GuestKind;
use xferry_lab::lab::{LabConfig, Process, Report, Side};
use xferry_lab::scenario::{Scenario, Workload, bare, skipped, status};
use xferry_lab::wire::{Burst, Faults, Tally, WireConfig};

const LOSSES: [f64; 4] = [0.0001, 0.001, 0.01, 0.05];
/// How long a command may take to end.
const END_LIMIT: Duration = Duration::from_secs(60);
/// Every page is compared before the VM runs at the other end; it may be stopped for as long as the wire makes it.
const OPTIONS: [&str; 3] = ["--verify=full", "--downtime-limit", "5000"];

fn scenario(wire: WireConfig) -> Scenario {
    let lab = LabConfig { wire: Some(wire), ..LabConfig::for_test() };
    Scenario::started(lab, bare(Workload { mib: 48, rate: 2000 }).unwrap()).unwrap()
}

/// The faults of a column of the matrix.
fn faults(column: &str, loss: f64) -> Faults {
    let faults = Faults { loss, ..Faults::default() };
    match column {
        "reorder" => Faults { reorder: 0.02, ..faults },
        "duplicate" => Faults { duplicate: 0.02, ..faults },
        "corrupt" => Faults { corrupt: 0.01, ..faults },
        "burst" => Faults { loss: 0.0, burst: Some(Burst { share: loss, length: 10.0 }), ..faults },
        _ => faults,
    }
}

/// Sum of a count over the report's lanes or queues.
fn sum(report: &Report, list: &str, name: &str) -> u64 {
    let list = report.get(&format!("/stream/{list}")).unwrap().as_array().unwrap();
    list.iter().map(|item| item[name].as_u64().unwrap()).sum()
}

fn since(now: Tally, before: Tally) -> Tally {
    Tally {
        taken: now.taken - before.taken,
        lost: now.lost - before.lost,
        overflowed: now.overflowed - before.overflowed,
        duplicated: now.duplicated - before.duplicated,
        reordered: now.reordered - before.reordered,
        corrupted: now.corrupted - before.corrupted,
    }
}

/// The command ended well, the VM has moved once and whole.
fn moved(scenario: &Scenario, source: Side, mut command: Process) -> Report {
    assert!(command.wait(END_LIMIT).unwrap().success(), "{}", command.output());
    let report = scenario.lab.host(source).report(None).unwrap();
    assert_eq!((report.status(), report.verified()), (Some("completed"), Some(true)), "{:#}", report.0);
    scenario.expect_moved(source).unwrap();
    report
}

/// One VM goes through all of it: every migration ends with equal digests.
#[test]
fn losses_by_kind_of_wire() {
    if skipped("losses_by_kind_of_wire", GuestKind::Bare) {
        return;
    }
    let scenario = scenario(WireConfig::default());
    let mut source = Side::A;
    let begun = Instant::now();
    for (number, &loss) in LOSSES.iter().enumerate() {
        for column in ["plain", "reorder", "duplicate", "corrupt", "burst"] {
            let wire = scenario.lab.wire().unwrap();
            let seed = number as u64;
            wire.set(&WireConfig { seed, ..WireConfig::both(faults(column, loss)) });
            let before = wire.counters(source).tally;
            let output = scenario.migrate(source, &OPTIONS).unwrap();
            let report = scenario.lab.host(source).report(None).unwrap();
            assert!(output.status.success(), "{column} {loss}: {}{}", output.stdout, output.stderr);
            assert_eq!(report.verified(), Some(true), "{column} {loss}: {:#}", report.0);
            // The guest verifies itself all the time; that all of it is looked at is awaited once a row.
            scenario.lab.host(source).wait_vm_gone(END_LIMIT).unwrap();
            scenario.expect_running(source.other()).unwrap();
            check_counters(&report, since(wire.counters(source).tally, before), column, loss);
            println!(
                "{column:>9} {:>5} %: {} lost, {} rounds, {:.0} ms, blackout {:.1} ms",
                loss * 100.0,
                sum(&report, "lanes", "lost"),
                report.rounds().len(),
                report.milliseconds("/total-time").unwrap(),
                report.milliseconds("/downtime").unwrap(),
            );
            source = source.other();
        }
        scenario.expect_whole(source).unwrap();
    }
    println!("the matrix took {:.0} s", begun.elapsed().as_secs_f64());
}

/// What the agents say they saw is what the wire did.
fn check_counters(report: &Report, wire: Tally, column: &str, loss: f64) {
    let lost = sum(report, "lanes", "lost");
    let told = format!("{column} {loss}: {wire:?} {:#}", report.get("/stream").unwrap());
    let rounds: u64 = report.rounds().iter().map(|round| round.lost_frames).sum();
    assert_eq!(lost, rounds, "{told}");
    // Probes and ARP are in the wire's count alone; frames that came too late are in the agents' alone.
    let bad = wire.lost + wire.corrupted;
    assert!(lost + 16 >= bad.saturating_sub(bad / 4), "{told}");
    let seen = |name: &str| sum(report, "queues", name);
    assert_eq!(seen("malformed"), 0, "{told}");
    match column {
        "duplicate" => assert!(seen("duplicates") + seen("stale") > wire.duplicated / 2, "{told}"),
        "reorder" => assert!(seen("reordered") > wire.reordered / 4, "{told}"),
        // The other half hits headers, where the XDP program or the kernel stops it.
        "corrupt" => assert!(seen("bad-tag") > wire.corrupted / 4, "{told}"),
        _ => assert_eq!((seen("duplicates"), seen("corrupt"), seen("bad-tag")), (0, 0, 0), "{told}"),
    }
}

#[test]
fn two_queues_are_counted_apart() {
    if skipped("two_queues_are_counted_apart", GuestKind::Bare) {
        return;
    }
    let faults = Faults { loss: 0.01, duplicate: 0.02, ..Faults::default() };
    let lab = LabConfig { wire: Some(WireConfig::both(faults)), queues: 2, ..LabConfig::for_test() };
    let scenario = Scenario::started(lab, bare(Workload { mib: 48, rate: 2000 }).unwrap()).unwrap();
    let report = scenario.expect_migrates(Side::A, &OPTIONS).unwrap();
    let count = |path: &str| report.count(path).unwrap();
    for lane in 0..2 {
        let sent = count(&format!("/stream/lanes/{lane}/sent"));
        assert!(count(&format!("/stream/lanes/{lane}/lost")) > 0 && sent > 1000, "{:#}", report.0);
    }
    let queues = report.get("/stream/queues").unwrap().as_array().unwrap();
    assert_eq!(queues.len(), 2, "{:#}", report.0);
    // The text for people says the same.
    let text = scenario.lab.a.xferry(&["report"], END_LIMIT).unwrap().stdout;
    assert!(text.contains("lane 1 ") && text.contains("queue 1 "), "{text}");
}

#[test]
fn slow_wire_with_a_short_queue() {
    if skipped("slow_wire_with_a_short_queue", GuestKind::Bare) {
        return;
    }
    let faults = Faults { rate: Some(60 << 20), queue: 24, ..Faults::default() };
    let scenario = scenario(WireConfig::both(faults));
    for source in Side::BOTH {
        let report = scenario.expect_migrates(source, &OPTIONS).unwrap();
        let (sent, lost) = (sum(&report, "lanes", "sent"), sum(&report, "lanes", "lost"));
        println!("{lost} of {sent} frames lost to a queue of 24");
        // A window that is not made smaller loses nine of ten.
        assert!(lost > 0 && lost < sent / 2, "{lost} of {sent}");
    }
}

#[test]
fn long_wire() {
    if skipped("long_wire", GuestKind::Bare) {
        return;
    }
    let faults = Faults { delay: Duration::from_millis(30), ..Faults::default() };
    let scenario = scenario(WireConfig::both(faults));
    let report = scenario.expect_migrates(Side::A, &OPTIONS).unwrap();
    // The word that a round was sent takes the fast network.
    assert_eq!(sum(&report, "lanes", "lost"), 0, "{:#}", report.0);
    // More was on its way than a window for queues alone allows in each way there and back, 60 ms.
    let first = &report.rounds()[0];
    let frames = first.bytes as f64 / (2 * 4096) as f64;
    let by_window = frames / 240.0 * 60.0;
    println!("round 0 took {:.0} ms, a window at a time {by_window:.0} ms", first.duration_ms);
    assert!(by_window > 1000.0 && first.duration_ms < by_window * 0.75, "{:#}", report.0);
}

#[test]
fn link_that_goes_away_for_a_moment() {
    if skipped("link_that_goes_away_for_a_moment", GuestKind::Bare) {
        return;
    }
    let scenario = scenario(WireConfig::default());
    let command = scenario.begin(Side::A, &[&OPTIONS[..], &["--bandwidth", "40"]].concat()).unwrap();
    scenario.lab.wire().unwrap().flap(Duration::from_millis(500)).unwrap();
    moved(&scenario, Side::A, command);
}

#[test]
fn frames_that_go_nowhere_for_a_moment() {
    if skipped("frames_that_go_nowhere_for_a_moment", GuestKind::Bare) {
        return;
    }
    let scenario = scenario(WireConfig::default());
    let command = scenario.begin(Side::A, &[&OPTIONS[..], &["--bandwidth", "40"]].concat()).unwrap();
    let wire = scenario.lab.wire().unwrap();
    wire.set(&WireConfig::both(Faults::cut()));
    thread::sleep(Duration::from_millis(500));
    wire.set(&WireConfig::default());
    let report = moved(&scenario, Side::A, command);
    assert!(sum(&report, "lanes", "lost") > 0, "{:#}", report.0);
}

/// Frames arrive, and nobody hears of it; or the other way round.
#[test]
fn one_direction_is_cut() {
    if skipped("one_direction_is_cut", GuestKind::Bare) {
        return;
    }
    let scenario = scenario(WireConfig::default());
    for direction in Side::BOTH {
        let slowly = [&OPTIONS[..], &["--bandwidth", "20"]].concat();
        let mut command = scenario.begin(Side::A, &slowly).unwrap();
        let wire = scenario.lab.wire().unwrap();
        wire.set_from(direction, Faults::cut(), 0);
        assert!(!command.wait(END_LIMIT).unwrap().success(), "{}", command.output());
        assert!(command.output().contains("migration network cut"), "{}", command.output());
        wire.set(&WireConfig::default());
        scenario.expect_undisturbed(Side::A).unwrap();
    }
    scenario.expect_migrates(Side::A, &OPTIONS).unwrap();
}

#[test]
fn stalled_receiver_only_delays() {
    if skipped("stalled_receiver_only_delays", GuestKind::Bare) {
        return;
    }
    let scenario = scenario(WireConfig::both(Faults { loss: 0.01, ..Faults::default() }));
    let command = scenario.begin(Side::A, &[&OPTIONS[..], &["--bandwidth", "40"]].concat()).unwrap();
    // While it is received, the destination counts.
    let sessions = status(&scenario.lab.b).unwrap()["port"]["sessions"].clone();
    assert!(sessions[0]["queues"][0]["frames"].as_u64().unwrap() > 0, "{sessions}");
    scenario.lab.b.signal_agent(Signal::STOP).unwrap();
    // The length of the fault, not a wait for anything.
    thread::sleep(Duration::from_secs(2));
    scenario.lab.b.signal_agent(Signal::CONT).unwrap();
    let report = moved(&scenario, Side::A, command);
    assert!(sum(&report, "lanes", "stalls") > 0, "{:#}", report.0);
}
