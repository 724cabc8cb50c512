//! Pages that travel packed.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use xferry_lab::guest::GuestKind;
use xferry_lab::lab::{LabConfig, Report, Side};
use xferry_lab::scenario::{Scenario, Workload, bare, skipped};

/// Pages sent packed, and by how much they became smaller.
fn packed(report: &Report) -> (u64, f64) {
    let rate = report.get("/compression/compression-rate").and_then(|rate| rate.as_f64());
    (report.count("/compression/pages").unwrap(), rate.unwrap())
}

#[test]
fn a_guest_that_packs_well_moves_in_fewer_bytes_and_in_one_piece() {
    if skipped("a_guest_that_packs_well_moves_in_fewer_bytes_and_in_one_piece", GuestKind::Bare) {
        return;
    }
    let mut vm = bare(Workload::USUAL).unwrap();
    // Pages of which only some words are not zero.
    vm.append = vm.append.replace("fill=random", "fill=none");
    let scenario = Scenario::started(LabConfig::for_test(), vm).unwrap();
    for (from, codec) in [(Side::A, "zstd"), (Side::B, "lz4")] {
        let option = format!("--compression={codec}");
        let report = scenario.expect_migrates(from, &[&option, "--bandwidth=50", "--verify=full"]).unwrap();
        assert_eq!(report.text("/compression/mode"), Some(codec));
        let (pages, rate) = packed(&report);
        assert!(pages > 100 && rate > 4.0, "{:#}", report.0["compression"]);
        assert!(report.count("/ram/transferred").unwrap() < report.count("/ram/normal-bytes").unwrap() / 2);
    }
    let report = scenario.expect_migrates(Side::A, &["--compression=none", "--verify"]).unwrap();
    assert_eq!(packed(&report).0, 0);
}
