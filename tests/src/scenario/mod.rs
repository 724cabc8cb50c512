//! A VM in a lab, ready to be migrated, and what must hold whatever happens to it.
//!
//! A test makes a [`Scenario`], disturbs it, and asks whether the VM noticed: either it runs where it was
//! ([`Scenario::expect_undisturbed`]) or it has moved ([`Scenario::expect_moved`]), in one piece and once.

mod cgroup;
mod fake_peer;
pub mod hostile;
mod link;
mod machine;
mod planted;
mod stranger;
mod tracking;

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

pub use cgroup::{throttled, with_cgroups};
pub use fake_peer::{FakePeer, greet, hello};
pub use hostile::GuestRam;
pub use link::{bytes_sent, ip, link, mac};
pub use machine::{MEMORY_MIB, Workload, bare, flat_out, linux};
pub use planted::Planted;
pub use stranger::{Junk, Stranger};
pub use tracking::tracked;

use crate::guest::{GuestKind, SerialLog, write_disk_pattern};
use crate::lab::plan::{MIGRATION_NIC, VM_NAME};
use crate::lab::{self, Host, Lab, LabConfig, Output, Process, Report, Side, VmConfig, tail, wait_for};
use crate::probe::qemu_status;

/// How long a guest may take until it works. A Linux takes ten seconds where it is translated.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// How long a migration may take.
const MIGRATION_LIMIT: Duration = Duration::from_secs(120);
/// How long a question to an agent may take.
const QUERY_LIMIT: Duration = Duration::from_secs(20);
/// How long a guest may take to show that it goes on, on a busy machine.
const PROGRESS_LIMIT: Duration = Duration::from_secs(20);
/// How long it may take to verify all of its memory twice.
const SWEEP_LIMIT: Duration = Duration::from_secs(60);
/// So many more completed sweeps mean that every page was verified since: the first may have begun before.
const SWEEPS: u64 = 2;
/// How long processes and traces of a migration may take to be gone.
const CLEANUP_LIMIT: Duration = Duration::from_secs(20);
/// Length of the shared disk.
const DISK_BYTES: u64 = 64 << 20;
/// So much on the wire shows that a round is under way.
const UNDER_WAY: u64 = 2 << 20;

/// Why a test with this guest cannot run here; `None` if it can.
pub fn missing(guest: GuestKind) -> Option<String> {
    let found = |tool: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|dir| dir.join(tool).is_file())
    };
    let qemu = || (!found(machine::QEMU)).then(|| format!("there is no program `{}`", machine::QEMU));
    let kvm = || {
        let needed = guest == GuestKind::Bare && !std::path::Path::new("/dev/kvm").exists();
        needed.then(|| "the bare-metal guest needs /dev/kvm".to_owned())
    };
    lab::missing().or_else(qemu).or_else(kvm)
}

/// Says that a test cannot run here, and why, if so.
pub fn skipped(test: &str, guest: GuestKind) -> bool {
    let reason = missing(guest);
    if let Some(reason) = &reason {
        println!("skipped: {test}: {reason}");
    }
    reason.is_some()
}

/// A lab and the VM that is to run in it. Nothing runs until it is started.
pub struct Scenario {
    /// The lab.
    pub lab: Lab,
    /// The VM as both hosts define it.
    pub vm: VmConfig,
}

impl Scenario {
    /// Builds the lab and writes the VM's definition on both hosts.
    ///
    /// # Errors
    /// If the lab cannot be made.
    pub fn new(lab: LabConfig, vm: VmConfig) -> Result<Self> {
        let lab = Lab::new(lab)?;
        for side in Side::BOTH {
            lab.host(side).write_vm_definition(&vm)?;
        }
        if vm.disk.is_some() {
            write_disk_pattern(lab.layout().disk(), DISK_BYTES)?;
        }
        Ok(Self { lab, vm })
    }

    /// As [`Self::new`], with both agents and the VM on host-a up.
    ///
    /// # Errors
    /// If something does not start.
    pub fn started(lab: LabConfig, vm: VmConfig) -> Result<Self> {
        let scenario = Self::new(lab, vm)?;
        scenario.start_agents()?;
        scenario.boot()?;
        Ok(scenario)
    }

    /// Starts both agents.
    ///
    /// # Errors
    /// If one does not come up.
    pub fn start_agents(&self) -> Result<()> {
        Side::BOTH.into_iter().try_for_each(|side| self.lab.host(side).start_agent())
    }

    /// The command by which a host runs the VM.
    pub fn command(&self, side: Side) -> Vec<String> {
        self.vm.command(&self.lab.host(side).vm_paths())
    }

    /// Starts the VM on host-a and waits until the guest works.
    ///
    /// # Errors
    /// If it does not.
    pub fn boot(&self) -> Result<()> {
        self.boot_by(&self.command(Side::A))
    }

    /// The same by another command.
    ///
    /// # Errors
    /// If the guest does not come up.
    pub fn boot_by(&self, command: &[String]) -> Result<()> {
        self.lab.a.start_qemu(command)?;
        self.serial(Side::A)
            .wait_ready(BOOT_LIMIT)
            .with_context(|| format!("the guest does not come up\n{}", tail("QEMU", &self.lab.a.qemu_log())))
    }

    /// What the guest prints on a host.
    pub fn serial(&self, side: Side) -> SerialLog {
        SerialLog::new(self.lab.host(side).vm_paths().serial)
    }

    /// Runs `xferry migrate` away from `source` to its end, whatever that is.
    ///
    /// # Errors
    /// If the command does not end.
    pub fn migrate(&self, source: Side, options: &[&str]) -> Result<Output> {
        self.lab.host(source).xferry(&migrate(source, options), MIGRATION_LIMIT)
    }

    /// Starts `xferry migrate` away from `source` and returns while its first round is under way.
    ///
    /// # Errors
    /// If it does not get that far.
    pub fn begin(&self, source: Side, options: &[&str]) -> Result<Process> {
        let host = self.lab.host(source);
        let before = bytes_sent(&host.namespace(), MIGRATION_NIC)?;
        let mut command = host.xferry_started(&migrate(source, options))?;
        wait_for("the first round", MIGRATION_LIMIT, || {
            command.expect_running()?;
            let sent = bytes_sent(&host.namespace(), MIGRATION_NIC)?.saturating_sub(before);
            Ok((phase(host)?.as_deref() == Some("pre-copy") && sent > UNDER_WAY).then_some(()))
        })?;
        Ok(command)
    }

    /// Migrates away from `source` and expects that all goes well.
    ///
    /// # Errors
    /// What does not.
    pub fn expect_migrates(&self, source: Side, options: &[&str]) -> Result<Report> {
        let output = self.migrate(source, options)?;
        let host = self.lab.host(source);
        ensure!(
            output.status.success(),
            "{}{}\n{}\n{}",
            output.stdout,
            output.stderr,
            host.agent_tail(),
            self.lab.host(source.other()).agent_tail()
        );
        let report = host.report(None)?;
        ensure!(report.status() == Some("completed"), "the report says {:?}", report.0);
        ensure!(report.verified() == Some(true), "not verified: {:?}", report.0);
        self.expect_moved(source)?;
        Ok(report)
    }

    /// The VM runs on `source`'s peer and nowhere else, and every page of it is as it was.
    ///
    /// # Errors
    /// What is wrong.
    pub fn expect_moved(&self, source: Side) -> Result<()> {
        self.lab.host(source).wait_vm_gone(CLEANUP_LIMIT)?;
        self.expect_whole(source.other())
    }

    /// The VM runs on `side` and nowhere else, nothing of a migration is left in its QEMU or on the other host,
    /// and every page of it is as it was.
    ///
    /// # Errors
    /// What is wrong.
    pub fn expect_undisturbed(&self, side: Side) -> Result<()> {
        self.lab.host(side.other()).wait_vm_gone(CLEANUP_LIMIT)?;
        self.expect_whole(side)
    }

    /// The VM runs on `side`, untracked, and verifies its memory without finding an error.
    ///
    /// # Errors
    /// What is wrong.
    pub fn expect_whole(&self, side: Side) -> Result<()> {
        self.expect_running(side)?;
        let mut serial = self.serial(side);
        let sweeps = serial.wait_progress(PROGRESS_LIMIT)?.sweeps;
        let report = wait_for("the guest to verify all its memory", SWEEP_LIMIT, || {
            Ok(serial.latest().filter(|report| report.sweeps >= sweeps + SWEEPS))
        })?;
        ensure!(report.errors == 0, "the guest found errors: {report:?} {:?}", serial.errors_seen());
        Ok(())
    }

    /// The VM runs on `side`, untracked, its guest writes, and found no error so far.
    ///
    /// # Errors
    /// What is wrong.
    pub fn expect_running(&self, side: Side) -> Result<()> {
        let host = self.lab.host(side);
        let status = qemu_status(&host.vm_paths().lab_qmp)?;
        ensure!(status.as_deref() == Some("running"), "QEMU on {side} is {status:?}");
        let pids = host.qemu_pids()?;
        let [pid] = pids[..] else { anyhow::bail!("on {side} there are QEMU processes {pids:?}") };
        wait_for(
            "QEMU to be rid of the dirty tracker",
            CLEANUP_LIMIT,
            || Ok((!tracked(pid)?).then_some(())),
        )?;
        let mut serial = self.serial(side);
        // What was read at first may be old; what comes then is not.
        let report =
            serial.wait_progress(PROGRESS_LIMIT).and_then(|_| serial.wait_progress(PROGRESS_LIMIT))?;
        ensure!(report.errors == 0, "the guest found errors: {report:?} {:?}", serial.errors_seen());
        Ok(())
    }

    /// Waits until one side runs the VM and nothing of it is left on the other. Returns which.
    ///
    /// # Errors
    /// If both run it at any time, or neither does in the end.
    pub fn wait_settled(&self) -> Result<Side> {
        let mut seen = [None, None];
        let settled = wait_for("one side to have the VM", MIGRATION_LIMIT, || {
            for (side, seen) in Side::BOTH.into_iter().zip(&mut seen) {
                // One that is just ending does not answer any more.
                let Ok(status) = qemu_status(&self.lab.host(side).vm_paths().lab_qmp) else {
                    return Ok(None);
                };
                *seen = status;
            }
            let runs = seen.each_ref().map(|status| status.as_deref() == Some("running"));
            ensure!(runs != [true, true], "both hosts run the VM");
            let [a, b] = &seen;
            Ok(match (runs, a, b) {
                ([true, _], _, None) => Some(Side::A),
                ([_, true], None, _) => Some(Side::B),
                _ => None,
            })
        });
        let side = settled.with_context(|| format!("QEMU on host-a and host-b: {seen:?}"))?;
        self.expect_running(side)?;
        Ok(side)
    }

    /// Waits until no migration leaves `source` any more and returns the report of the last.
    ///
    /// # Errors
    /// If it goes on, or there is none.
    pub fn wait_ended(&self, source: Side) -> Result<Report> {
        let host = self.lab.host(source);
        wait_for("the migration to end", MIGRATION_LIMIT, || Ok(phase(host)?.is_none().then_some(())))?;
        host.report(None)
    }
}

impl Drop for Scenario {
    fn drop(&mut self) {
        if thread::panicking() {
            for side in Side::BOTH {
                let host = self.lab.host(side);
                eprintln!("{}\n{}", host.agent_tail(), tail("the guest", &host.vm_paths().serial));
            }
        }
    }
}

fn migrate<'a>(source: Side, options: &[&'a str]) -> Vec<&'a str> {
    let fixed = ["migrate", VM_NAME, "--to", source.other().name()];
    fixed.into_iter().chain(options.iter().copied()).collect()
}

/// What `xferry status --json` says on a host.
///
/// # Errors
/// If its agent does not answer.
pub fn status(host: &Host) -> Result<Value> {
    let output = host.xferry(&["status", "--json"], QUERY_LIMIT)?;
    ensure!(output.status.success(), "`xferry status` on {}: {}", host.side(), output.stderr);
    serde_json::from_str(&output.stdout).context("the agent's status is not JSON")
}

/// The phase of the migration that leaves a host, if one does.
fn phase(host: &Host) -> Result<Option<String>> {
    Ok(status(host)?["leaving"][0]["phase"].as_str().map(ToOwned::to_owned))
}
