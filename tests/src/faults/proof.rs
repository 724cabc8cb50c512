//! After a run: the VM is whole, nothing is in the way, and the next migration works.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::journal::Journal;
use super::judge::{Failure, Kind};
use super::site::Site;
use crate::guest::GuestReport;
use crate::lab::Side;
use crate::lab::plan::VM_NAME;

/// How long the guest may take to show that it goes on, on a busy machine.
const PROGRESS_LIMIT: Duration = Duration::from_secs(20);
/// How long it may take to verify all of its memory.
const SWEEP_LIMIT: Duration = Duration::from_secs(30);
/// So many more completed sweeps mean that every page was verified since: the first may have begun before.
const SWEEPS: u64 = 2;
/// How long an undisturbed migration may take.
const MIGRATION_LIMIT: Duration = Duration::from_secs(60);
/// How long restarted agents may take to settle what their journals say is open.
const RECOVERY_LIMIT: Duration = Duration::from_secs(10);
/// What follows from that may take a moment more.
const AFTERMATH: Duration = Duration::from_millis(200);
const INTERVAL: Duration = Duration::from_millis(20);

/// What the guest says now.
pub(super) fn guest_goes_on(site: &mut Site) -> Result<GuestReport, Failure> {
    site.serial.wait_progress(PROGRESS_LIMIT).map_err(|error| {
        Failure::new(Kind::IncompleteRam, format!("the VM runs and its guest does not: {error:#}"))
    })
}

/// Moves the VM away from `owner`, undisturbed, with all of its memory compared.
pub(super) fn next_migration(site: &Site, owner: Side) -> Result<(), Failure> {
    let leftover =
        |what: String| Failure::new(Kind::Leftovers, format!("the next migration does not work: {what}"));
    let command = ["migrate", VM_NAME, "--to", owner.other().name(), "--verify=full"];
    let output = site.host(owner).xferry(&command, MIGRATION_LIMIT);
    let output =
        output.map_err(|error| Failure::new(Kind::Hang, format!("the next migration: {error:#}")))?;
    if !output.status.success() {
        let said = format!("{}{}", output.stdout, output.stderr);
        let kind = if said.contains("differ") { Kind::IncompleteRam } else { Kind::Leftovers };
        return Err(Failure { kind, ..leftover(said) });
    }
    match site.runs(owner.other()) {
        Ok(true) => Ok(()),
        Ok(false) => Err(leftover("it says that it ended well, and the VM does not run there".to_owned())),
        Err(error) => Err(leftover(format!("{error:#}"))),
    }
}

/// Waits until the guest has verified every page since it had completed `sweeps`.
pub(super) fn whole(site: &mut Site, sweeps: u64) -> Result<(), Failure> {
    let deadline = Instant::now() + SWEEP_LIMIT;
    let report = loop {
        let latest = site.serial.latest();
        if let Some(report) = latest.filter(|report| report.sweeps >= sweeps + SWEEPS) {
            break report;
        }
        if Instant::now() > deadline {
            let what = format!("the guest did not get through its memory: {latest:?}");
            return Err(Failure::new(Kind::IncompleteRam, what));
        }
        thread::sleep(INTERVAL);
    };
    let seen = site.serial.errors_seen();
    if report.errors > 0 || !seen.is_empty() {
        return Err(Failure::new(Kind::GuestErrors, format!("{report:?} {seen:?}")));
    }
    Ok(())
}

/// Kills both idle agents and starts them again: the VM on `owner` must not notice, whatever their journals say about
/// migrations that are long over.
pub(super) fn restart_agents(site: &Site, owner: Side) -> Result<(), Failure> {
    let hang = |error: anyhow::Error| Failure::new(Kind::Hang, format!("restarting the agents: {error:#}"));
    for side in Side::BOTH {
        site.host(side).kill_agent();
    }
    for side in Side::BOTH {
        site.host(side).start_agent().map_err(hang)?;
    }
    let deadline = Instant::now() + RECOVERY_LIMIT;
    let open = |side: Side| {
        Journal::read(&site.host(side).state_dir()).is_ok_and(|journal| !journal.open().is_empty())
    };
    while Side::BOTH.into_iter().any(open) && Instant::now() < deadline {
        thread::sleep(INTERVAL);
    }
    thread::sleep(AFTERMATH);
    match site.runs(owner) {
        Ok(true) => Ok(()),
        other => Err(Failure::new(
            Kind::LostVm,
            format!(
                "both agents were restarted long after the migration, and the VM on {owner} does not run: {other:?}"
            ),
        )),
    }
}
