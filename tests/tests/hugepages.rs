//! Guests whose RAM is in huge pages, of hugetlbfs or tmpfs.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;

use xferry_lab::guest::GuestKind;
use xferry_lab::lab::{LabConfig, Report, Side};
use xferry_lab::scenario::{Scenario, Workload, bare, skipped};

/// Huge pages of 2 MiB for the same guest on both hosts, and some.
const PAGES: u64 = 320;

/// A line of `/proc/meminfo`.
fn meminfo(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Huge pages of this machine that nobody uses.
fn free() -> u64 {
    meminfo("HugePages_Free:")
}

/// The VM's command on a host, with its RAM in `directory`.
fn command(scenario: &Scenario, side: Side, directory: &Path) -> Vec<String> {
    let ram = scenario.lab.host(side).vm_paths().ram.display().to_string();
    let huge = directory.join(side.name()).display().to_string();
    scenario.command(side).iter().map(|argument| argument.replace(&ram, &huge)).collect()
}

/// Of huge pages that are dirty again only the changed pages of 4 KiB travel.
fn only_what_changed(report: &Report) {
    let again = &report.rounds()[1..];
    let dirty: u64 = again.iter().map(|round| round.pages * 4096).sum();
    let sent: u64 = again.iter().map(|round| round.bytes).sum();
    assert!(dirty > 0 && sent < dirty / 2, "{sent} of {dirty} bytes were sent: {:#}", report.0["rounds"]);
    assert!(report.count("/unchanged/pages").unwrap() * 4096 >= dirty / 2);
    assert!(report.count("/unchanged/looked-at").unwrap() >= report.count("/unchanged/pages").unwrap());
}

#[test]
fn guest_in_huge_pages_moves_and_gives_them_back() {
    if skipped("guest_in_huge_pages_moves_and_gives_them_back", GuestKind::Bare) {
        return;
    }
    let scenario = Scenario::new(LabConfig::for_test(), bare(Workload::USUAL).unwrap()).unwrap();
    let Some(directory) = scenario.lab.take_huge_pages(PAGES).unwrap() else {
        println!(
            "skipped: guest_in_huge_pages_moves_and_gives_them_back: no {PAGES} huge pages can be had here"
        );
        return;
    };
    let before = free();
    for side in Side::BOTH {
        let host = scenario.lab.host(side);
        host.write_vm_command(Some(&command(&scenario, side, &directory))).unwrap();
    }
    scenario.start_agents().unwrap();
    scenario.boot_by(&command(&scenario, Side::A, &directory)).unwrap();
    let report = scenario.expect_migrates(Side::A, &["--verify=full"]).unwrap();
    println!("{:#}", report.0["rounds"]);
    only_what_changed(&report);
    let report = scenario.expect_migrates(Side::B, &["--verify=full"]).unwrap();
    only_what_changed(&report);
    // The old host keeps none of them.
    let used = before - free();
    let whole = scenario.vm.memory_mib / 2;
    assert!(used <= whole, "{used} huge pages are in use, the VM has {whole}");
}

/// Huge pages of tmpfs are tracked by 4 KiB: whoever writes a few thousand pages does not dirty all of RAM.
#[test]
fn guest_in_huge_pages_of_tmpfs_dirties_what_it_writes() {
    if skipped("guest_in_huge_pages_of_tmpfs_dirties_what_it_writes", GuestKind::Bare) {
        return;
    }
    let config = LabConfig { huge_tmpfs: true, ..LabConfig::for_test() };
    let scenario = Scenario::new(config, bare(Workload::USUAL).unwrap()).unwrap();
    scenario.start_agents().unwrap();
    let before = meminfo("ShmemHugePages:");
    scenario.boot().unwrap();
    for side in Side::BOTH {
        // Else it is a guest like any other that is tested here.
        let huge = meminfo("ShmemHugePages:").saturating_sub(before);
        assert!(huge > 64 << 10, "{huge} KiB of the guest are in huge pages");
        let report = scenario.expect_migrates(side, &["--verify=full"]).unwrap();
        let dirtied = report.0["rounds"][0]["dirtied-pages"].as_u64().unwrap();
        let pages = scenario.vm.memory_mib << 8;
        assert!(0 < dirtied && dirtied < pages / 10, "{dirtied} of {pages} pages dirtied in round 0");
    }
}
