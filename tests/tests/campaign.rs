//! A fault campaign short enough for every day: the same faults at the same moments each time.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use xferry_lab::faults::Campaign;
use xferry_lab::guest::GuestKind;
use xferry_lab::scenario::skipped;

/// As many runs as begin within this time.
const TIME: Duration = Duration::from_secs(75);
/// Its first 30 runs have every fault, and none that takes long.
const SEED: u64 = 316;

#[test]
fn one_fault_in_each_migration() {
    if skipped("one_fault_in_each_migration", GuestKind::Bare) {
        return;
    }
    let mut campaign = Campaign::new(SEED);
    let begun = Instant::now();
    while begun.elapsed() < TIME {
        campaign.run_next().unwrap();
    }
    println!("{}", campaign.tally);
    assert!(campaign.tally.holds(), "{}", campaign.tally);
}
