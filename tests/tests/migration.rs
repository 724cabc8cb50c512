//! A running VM changes hosts: whatever the guest, the MTU and the load, nobody notices but the switch.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::{Duration, SystemTime};

use xferry_lab::demo::{Guest, Migration, PINGS_LOST, Verdict, Watch};
use xferry_lab::guest::GuestKind;
use xferry_lab::lab::{Disk, Host, LabConfig, Output, Report, Side, VmConfig};
use xferry_lab::probe::VmWatch;
use xferry_lab::scenario::{Scenario, Workload, bare, linux, skipped, status};

/// How long something may take that takes a moment.
const LIMIT: Duration = Duration::from_secs(30);

/// Migrates there and back under the eyes of all probes. Returns the reports.
fn there_and_back(guest: Guest, lab: LabConfig, vm: VmConfig, options: &[&str]) -> [Report; 2] {
    let scenario = Scenario::started(lab, vm).unwrap();
    let watch = Watch::start(&scenario.lab, guest).unwrap();
    Side::BOTH.map(|source| arrives(&watch.migrate(source, options).unwrap()))
}

/// Everything that must hold does.
fn arrives(migration: &Migration) -> Report {
    let broken = broken(migration);
    assert!(broken.is_empty(), "{broken:#?}\n{:#}", migration.report.0);
    migration.report.clone()
}

/// What must hold and does not.
fn broken(migration: &Migration) -> Vec<Verdict> {
    let mut verdicts = migration.checks.verdicts(&migration.report, migration.source);
    verdicts.retain(|verdict| !verdict.holds);
    verdicts
}

#[test]
fn bare_guest_there_and_back() {
    if skipped("bare_guest_there_and_back", GuestKind::Bare) {
        return;
    }
    let vm = bare(Workload::USUAL).unwrap();
    for report in there_and_back(Guest::Bare, LabConfig::for_test(), vm, &["--verify=full"]) {
        assert_eq!(report.text("/scan-mode"), Some("live"));
        assert!(report.milliseconds("/downtime-phases/verify").is_some_and(|ms| ms > 0.0));
    }
}

/// Issue 2, point 10.
#[test]
fn report_has_every_field() {
    if skipped("report_has_every_field", GuestKind::Bare) {
        return;
    }
    let scenario = Scenario::started(LabConfig::for_test(), bare(Workload::USUAL).unwrap()).unwrap();
    let report = scenario.expect_migrates(Side::A, &["--verify"]).unwrap();
    for pointer in ["/id", "/scan-mode", "/transport/mode", "/transport/xdp-mode"] {
        assert!(report.text(pointer).is_some_and(|text| !text.is_empty()), "{pointer}: {:#}", report.0);
    }
    let fixed = [
        ("/vm", "demo"),
        ("/source", "host-a"),
        ("/destination", "host-b"),
        ("/status", "completed"),
        ("/transport/xdp-mode", "driver"),
    ];
    for (pointer, text) in fixed {
        assert_eq!(report.text(pointer), Some(text));
    }
    for pointer in ["/error-desc", "/transport/zero-copy", "/verified"] {
        assert!(report.get(pointer).is_some(), "{pointer}");
    }
    for pointer in ["/total-time", "/setup-time", "/downtime"] {
        assert!(report.milliseconds(pointer).is_some_and(|ms| ms > 0.0), "{pointer}: {:#}", report.0);
    }
    for phase in ["stop", "last-pages", "state", "load", "resume"] {
        assert!(report.milliseconds(&format!("/downtime-phases/{phase}")).is_some(), "{phase}");
    }
    let parts: f64 = report.downtime_phases().iter().map(|(_, ms)| ms).sum();
    let downtime = report.milliseconds("/downtime").unwrap();
    assert!((parts - downtime).abs() <= 0.1 * downtime + 2.0, "{parts} of {downtime} ms");
    let ram = |name: &str| report.count(&format!("/ram/{name}")).unwrap();
    let working_set = Workload::USUAL.mib << 20;
    assert_eq!((ram("total"), ram("page-size")), (scenario.vm.memory_mib << 20, 4096));
    assert_eq!(ram("normal-bytes"), ram("normal") * 4096);
    assert!(ram("normal-bytes") >= working_set && ram("transferred") > ram("normal-bytes"), "{:#}", report.0);
    assert!(report.count("/ram/duplicate").is_some());
    assert_eq!(report.count("/transport/mtu"), Some(9000));
    assert!(report.count("/announce/rarp-sent").is_some_and(|frames| frames >= 5));

    let rounds = report.rounds();
    assert_eq!(ram("dirty-sync-count"), rounds.len() as u64);
    assert!(rounds.len() >= 2 && rounds.iter().map(|round| round.round).eq(0..rounds.len() as u64));
    let fields = ["round", "pages", "bytes", "duration-ms", "dirtied-pages", "lost-frames"];
    let listed = report.get("/rounds").unwrap().as_array().unwrap();
    assert!(listed.iter().all(|round| fields.iter().all(|field| round.get(field).is_some())));
    assert!(rounds[0].bytes >= working_set && rounds[0].dirtied_pages > 0, "{rounds:?}");
}

#[test]
fn linux_guest_keeps_its_connections() {
    if skipped("linux_guest_keeps_its_connections", GuestKind::Linux) {
        return;
    }
    // A busy machine may take 30 ms from anybody; not from three of four.
    let mut noticed = Vec::new();
    for _ in 0..2 {
        let vm = linux(Workload { mib: 32, rate: 2000 }, Disk::Cached).unwrap();
        let scenario = Scenario::started(LabConfig::for_test(), vm).unwrap();
        let watch = Watch::start(&scenario.lab, Guest::Linux).unwrap();
        for source in Side::BOTH {
            let mut broken = broken(&watch.migrate(source, &["--verify"]).unwrap());
            noticed.extend(broken.extract_if(.., |verdict| verdict.what == PINGS_LOST));
            assert!(broken.is_empty(), "{broken:#?}");
        }
        if noticed.is_empty() {
            break;
        }
    }
    assert!(noticed.len() < 3, "{noticed:#?}");
}

#[test]
fn every_mtu() {
    if skipped("every_mtu", GuestKind::Bare) {
        return;
    }
    for mtu in [1500, 65535] {
        let lab = LabConfig { mtu, ..LabConfig::for_test() };
        let scenario = Scenario::started(lab, bare(Workload::USUAL).unwrap()).unwrap();
        for source in Side::BOTH {
            let report = scenario.expect_migrates(source, &["--verify=full"]).unwrap();
            assert_eq!(report.count("/transport/mtu"), Some(mtu.into()));
        }
    }
}

#[test]
fn two_queues() {
    if skipped("two_queues", GuestKind::Bare) {
        return;
    }
    let lab = LabConfig { queues: 2, ..LabConfig::for_test() };
    let scenario = Scenario::started(lab, bare(Workload::USUAL).unwrap()).unwrap();
    for source in Side::BOTH {
        let report = scenario.expect_migrates(source, &["--verify=full"]).unwrap();
        assert_eq!(report.count("/transport/lanes"), Some(2));
        assert!(report.text("/transport/receiver").is_some_and(|text| text.contains("2 queue(s)")));
    }
}

/// The DMA of such a disk can evade a scan while it runs: the VM rests for every one.
#[test]
fn direct_disk_read_hard() {
    if skipped("direct_disk_read_hard", GuestKind::Linux) {
        return;
    }
    let vm = linux(Workload { mib: 32, rate: 500 }, Disk::Direct).unwrap();
    let scenario = Scenario::started(LabConfig::for_test(), vm).unwrap();
    let mut read = 0;
    for source in Side::BOTH {
        let begin = SystemTime::now();
        let watch = VmWatch::start(scenario.lab.host(source).vm_paths().lab_qmp).unwrap();
        let output = scenario.migrate(source, &["--verify=full", "--downtime-limit", "2000"]).unwrap();
        assert!(output.status.success(), "{}{}", output.stdout, output.stderr);
        let report = scenario.lab.host(source).report(None).unwrap();
        assert_eq!(report.verified(), Some(true));
        let mode = report.text("/scan-mode").unwrap();
        assert!(mode.starts_with("quiesced") && mode.contains("O_DIRECT"), "{mode}");
        let events = watch.events_since(begin);
        let count = |name: &str| events.iter().filter(|event| event.name == name).count();
        // The last round's scan comes after the last stop.
        assert!(count("STOP") >= report.rounds().len(), "{events:?}\n{:#}", report.0);
        assert!(count("RESUME") + 1 >= count("STOP"), "{events:?}");
        drop(watch);
        scenario.expect_moved(source).unwrap();
        let blocks = scenario.serial(source.other()).latest().unwrap().disk;
        assert!(blocks > read, "{blocks} blocks read, {read} before");
        read = blocks;
    }
}

#[test]
fn guest_that_writes_fast() {
    if skipped("guest_that_writes_fast", GuestKind::Bare) {
        return;
    }
    let vm = bare(Workload { mib: 128, rate: 100_000 }).unwrap();
    let scenario = Scenario::started(LabConfig::for_test(), vm).unwrap();
    for source in Side::BOTH {
        let report =
            scenario.expect_migrates(source, &["--verify=full", "--downtime-limit", "1000"]).unwrap();
        assert!(report.rounds()[0].dirtied_pages > 1000, "{:#}", report.0);
    }
}

#[test]
fn bandwidth_is_kept_to() {
    const LIMIT_MIB: u64 = 50;
    if skipped("bandwidth_is_kept_to", GuestKind::Bare) {
        return;
    }
    let scenario = Scenario::started(LabConfig::for_test(), bare(Workload::USUAL).unwrap()).unwrap();
    let options = ["--verify", "--bandwidth", &LIMIT_MIB.to_string(), "--downtime-limit", "2000"];
    let report = scenario.expect_migrates(Side::A, &options).unwrap();
    let round = &report.rounds()[0];
    let rate = round.bytes as f64 / (1 << 20) as f64 / (round.duration_ms / 1000.0);
    assert!(rate <= LIMIT_MIB as f64 * 1.2, "{rate:.1} MiB/s in {round:?}");
    limit_changes_while_it_is_kept_to(&scenario);
}

/// A first round of 64 MiB that would take a minute, let go in its middle.
fn limit_changes_while_it_is_kept_to(scenario: &Scenario) {
    let host = &scenario.lab.b;
    let mut command = scenario.begin(Side::B, &["--bandwidth", "1"]).unwrap();
    let id = status(host).unwrap()["leaving"][0]["id"].as_str().unwrap().to_owned();
    let set = |host: &Host, id: &str| host.xferry(&["set", id, "--bandwidth", "0"], LIMIT).unwrap();
    let refused = |output: Output, reason: &str| {
        assert!(!output.status.success() && output.stderr.contains(reason), "{}", output.stderr);
    };
    refused(set(host, "host-b-4711"), "there is no migration");
    refused(set(&scenario.lab.a, &id), "by the agent of host-b");
    let output = set(host, &id);
    assert!(output.status.success(), "{}", output.stderr);
    assert!(command.wait(LIMIT).unwrap().success());
    scenario.expect_moved(Side::B).unwrap();
    refused(set(host, &id), "is over");
    let report = host.report(Some(&id)).unwrap();
    let round = &report.rounds()[0];
    assert!(round.bytes as f64 > round.duration_ms / 1000.0 * f64::from(2 << 20), "{round:?}");
    assert_eq!(report.count("/max-bandwidth"), Some(0));
}

#[test]
fn waiting_qemu_is_attached_to() {
    if skipped("waiting_qemu_is_attached_to", GuestKind::Bare) {
        return;
    }
    let scenario = Scenario::new(LabConfig::for_test(), bare(Workload::USUAL).unwrap()).unwrap();
    scenario.lab.b.write_vm_command(None).unwrap();
    let waiting = ["-incoming", "defer", "-S"].map(str::to_owned);
    scenario.lab.b.start_qemu(&[scenario.command(Side::B), waiting.to_vec()].concat()).unwrap();
    let pids = scenario.lab.b.qemu_pids().unwrap();
    scenario.start_agents().unwrap();
    scenario.boot().unwrap();
    scenario.expect_migrates(Side::A, &["--verify=full"]).unwrap();
    assert_eq!(scenario.lab.b.qemu_pids().unwrap(), pids);
}

/// QEMU makes an unlinked file in it.
#[test]
fn memory_in_a_directory() {
    if skipped("memory_in_a_directory", GuestKind::Bare) {
        return;
    }
    let scenario = Scenario::new(LabConfig::for_test(), bare(Workload::USUAL).unwrap()).unwrap();
    let command = |side: Side| -> Vec<String> {
        let file = format!("mem-path={}", scenario.lab.host(side).vm_paths().ram.display());
        let directory = file.strip_suffix("/ram").unwrap();
        scenario.command(side).iter().map(|argument| argument.replace(&file, directory)).collect()
    };
    for side in Side::BOTH {
        scenario.lab.host(side).write_vm_command(Some(&command(side))).unwrap();
    }
    scenario.start_agents().unwrap();
    scenario.boot_by(&command(Side::A)).unwrap();
    for source in Side::BOTH {
        scenario.expect_migrates(source, &["--verify=full"]).unwrap();
        assert!(!scenario.lab.host(source.other()).vm_paths().ram.exists());
    }
}

/// The guest writes everywhere alike, for as long as a round takes. What it wrote to a page before that was read has been sent;
/// what it wrote to other pages meanwhile must be sent yet, though their dirty bits were taken within the round.
#[test]
fn what_is_written_during_a_round_is_sent_once_and_not_forgotten() {
    const TEST: &str = "what_is_written_during_a_round_is_sent_once_and_not_forgotten";
    if skipped(TEST, GuestKind::Bare) {
        return;
    }
    let workload = Workload { mib: 200, rate: 20_000 };
    let scenario = Scenario::new(LabConfig::for_test(), bare(workload).unwrap()).unwrap();
    scenario.start_agents().unwrap();
    scenario.boot().unwrap();
    let options = ["--verify=full", "--bandwidth", "60", "--downtime-limit", "5000"];
    let report = scenario.expect_migrates(Side::A, &options).unwrap();
    let rounds = report.get("/rounds").unwrap().as_array().unwrap();
    let figure = |round: usize, name: &str| rounds[round][name].as_f64().unwrap();
    let pages = (workload.mib * 256) as f64;
    // How often each page is written in round 0, if nothing holds the guest back.
    let writes = workload.rate as f64 * figure(0, "duration-ms") / 1e3 / pages;
    let [all, behind] =
        [1.0 - (-writes).exp(), 1.0 - (1.0 - (-writes).exp()) / writes].map(|part| part * pages);
    let dirtied = figure(0, "dirtied-pages");
    println!(
        "{dirtied:.0} pages dirtied in round 0; {all:.0} written, {behind:.0} of them after they were sent"
    );
    assert!(dirtied < f64::midpoint(all, behind), "{:#}", rounds[0]);
    // Else nothing was asked meanwhile in a round of some pages.
    assert!(figure(1, "pages") > 16_384.0, "{:#}", rounds[1]);
}
