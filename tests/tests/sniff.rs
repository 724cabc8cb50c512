//! Whoever records the migration network finds the guest's memory there when pages are not encrypted, and nothing of it when
//! they are; and cannot read what the agents say to each other.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use xferry_lab::guest::GuestKind;
use xferry_lab::intruder::capture::{self, Capture, Recorded};
use xferry_lab::lab::plan::{INTRUDER_NIC, MANAGEMENT_NIC, MIGRATION_PORT};
use xferry_lab::lab::{Encryption, LabConfig, Side};
use xferry_lab::scenario::{self, MEMORY_MIB, Planted, Scenario, Workload, bare};

/// What many pages of the guest hold.
const PATTERN: &[u8] = b"what the guest keeps to itself: 0123456789abcdef fedcba9876543210 ";
/// How many.
const PAGES: u64 = 2048;
/// A word of every migration's control channel.
const WORD: &[u8] = b"round-closed";

fn skipped(test: &str) -> bool {
    let reason =
        scenario::missing(GuestKind::Bare).or_else(xferry_lab::intruder::missing).or_else(capture::missing);
    if let Some(reason) = &reason {
        println!("skipped: {test}: {reason}");
    }
    reason.is_some()
}

/// What was recorded of a migration.
struct Tapes {
    migration: Recorded,
    control: Recorded,
    /// Frames that the lanes sent.
    sent: u64,
    /// Holds the recordings.
    _scenario: Scenario,
}

fn record(config: LabConfig) -> Tapes {
    let lab = LabConfig { intruder: true, ..config };
    let scenario = Scenario::started(lab, bare(Workload { mib: 16, rate: 500 }).unwrap()).unwrap();
    let secret = Planted::at_end(MEMORY_MIB, PAGES, PATTERN);
    secret.plant(&scenario.lab.a.vm_paths().ram).unwrap();
    // The intruder's port shows every frame of the migration network.
    let start = |namespace: &str, nic: &str| Capture::start(&scenario.lab, namespace, nic).unwrap();
    let migration = start(&scenario.lab.layout().intruder(), INTRUDER_NIC);
    let control = start(&scenario.lab.a.namespace(), MANAGEMENT_NIC);
    // Slow enough for tshark to write everything down beside it.
    let report =
        scenario.expect_migrates(Side::A, &["--verify", "--bandwidth", "40", "--compression=none"]).unwrap();
    let (migration, control) = (migration.finish().unwrap(), control.finish().unwrap());
    assert_eq!(secret.spoiled(&scenario.lab.b.vm_paths().ram).unwrap(), [0; 0]);
    let lanes = report.get("/stream/lanes").unwrap().as_array().unwrap();
    let sent = lanes.iter().map(|lane| lane["sent"].as_u64().unwrap()).sum();
    Tapes { migration, control, sent, _scenario: scenario }
}

impl Tapes {
    /// What is looked for can only be found in what was recorded.
    fn expect_complete(&self) {
        let frames = self.migration.count(&format!("udp.dstport == {MIGRATION_PORT}")).unwrap();
        println!("{frames} frames recorded, {} sent", self.sent);
        assert!(self.sent > PAGES / 4 && frames >= self.sent, "{frames} of {}", self.sent);
        assert!(self.control.count("tcp").unwrap() > 10);
    }
}

#[test]
fn without_certificates_all_can_be_read() {
    if skipped("without_certificates_all_can_be_read") {
        return;
    }
    let tapes = record(LabConfig::insecure());
    tapes.expect_complete();
    // Two pages in a frame at MTU 9000, as many with the pattern as not.
    assert!(tapes.migration.containing(PATTERN).unwrap() >= PAGES / 4);
    assert!(tapes.control.containing(WORD).unwrap() > 0);
}

#[test]
fn pages_that_are_not_encrypted_can_be_read() {
    if skipped("pages_that_are_not_encrypted_can_be_read") {
        return;
    }
    let tapes = record(LabConfig::for_test().encryption(Encryption::Off));
    tapes.expect_complete();
    assert!(tapes.migration.containing(PATTERN).unwrap() >= PAGES / 4);
    assert_eq!(tapes.control.containing(WORD).unwrap(), 0);
}

#[test]
fn encrypted_pages_cannot_be_read() {
    if skipped("encrypted_pages_cannot_be_read") {
        return;
    }
    let tapes = record(LabConfig::for_test().encryption(Encryption::Required));
    tapes.expect_complete();
    // Parts of the pattern too: whatever is cut out of it.
    for bytes in [PATTERN, &PATTERN[..16], &PATTERN[32..48], WORD] {
        assert_eq!(tapes.migration.containing(bytes).unwrap(), 0);
        assert_eq!(tapes.control.containing(bytes).unwrap(), 0);
    }
}
