//! Two hosts with their agents, the VM that goes back and forth between them, and who watches it.

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::guest::SerialLog;
use crate::lab::{Host, LabConfig, Side, last_lines};
use crate::probe::VmWatch;
use crate::scenario::{Scenario, Workload, bare};

/// What the guest does: little enough to be moved and verified in a moment, and enough for several rounds.
const WORKLOAD: Workload = Workload { mib: 32, rate: 4000 };
/// RAM of the VM in MiB.
const MEMORY_MIB: u64 = 128;
/// The file system of each agent's state directory. A report takes two pages.
const STATE_DISK: u64 = 48 << 20;
/// Lines of an agent's log that are shown of a run that failed.
const AGENT_LINES: usize = 25;
/// Lines of the guest's console: one is like the other, unless it found an error.
const GUEST_LINES: usize = 3;
/// How long an idle agent may take to answer.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// What is reused from run to run.
pub(super) struct Site {
    pub scenario: Scenario,
    watches: [Arc<VmWatch>; 2],
    /// What the guest said, wherever it ran.
    pub serial: SerialLog,
    /// Descriptors of an agent, by its process id, when it was idle for the first time.
    pub descriptors: HashMap<u32, usize>,
}

impl Site {
    /// Builds the lab, starts both agents and boots the VM on host-a.
    pub fn new() -> Result<Self> {
        let mut vm = bare(WORKLOAD)?;
        vm.memory_mib = MEMORY_MIB;
        let lab = LabConfig { state_disk: Some(STATE_DISK), ..LabConfig::for_test() };
        let scenario = Scenario::started(lab, vm)?;
        let watch =
            |side| -> Result<_> { Ok(Arc::new(VmWatch::start(scenario.lab.host(side).vm_paths().lab_qmp)?)) };
        let watches = [watch(Side::A)?, watch(Side::B)?];
        let serial = serial(&scenario);
        Ok(Self { scenario, watches, serial, descriptors: HashMap::new() })
    }

    pub fn host(&self, side: Side) -> &Host {
        self.scenario.lab.host(side)
    }

    pub fn watch(&self, side: Side) -> &Arc<VmWatch> {
        match side {
            Side::A => &self.watches[0],
            Side::B => &self.watches[1],
        }
    }

    /// Whether the VM runs on a host now.
    pub fn runs(&self, side: Side) -> Result<bool> {
        Ok(self.watch(side).status()?.as_deref() == Some("running"))
    }

    /// What the agent of a host says about itself.
    pub fn status(&self, side: Side) -> Result<Value> {
        self.host(side).get("/v1/status", ANSWER_LIMIT)
    }

    /// Starts the VM on host-a again after it has died.
    pub fn reboot(&mut self) -> Result<()> {
        for side in Side::BOTH {
            let host = self.host(side);
            host.kill_vm()?;
            host.discard_ram()?;
            // What the dead guest said must not be taken for the new one's.
            match fs::remove_file(host.vm_paths().serial) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).context("removing the dead guest's console");
                }
                _ => {}
            }
        }
        self.scenario.boot()?;
        self.serial = serial(&self.scenario);
        Ok(())
    }

    /// The ends of all logs, for a run that failed.
    pub fn tails(&self) -> String {
        let of = |side: Side| {
            let host = self.host(side);
            let agent = last_lines(&format!("the agent of {side}"), &host.agent_log(), AGENT_LINES);
            format!("{agent}\n{}", last_lines("the guest", &host.vm_paths().serial, GUEST_LINES))
        };
        Side::BOTH.map(of).join("\n")
    }
}

fn serial(scenario: &Scenario) -> SerialLog {
    let mut log = scenario.serial(Side::A);
    log.add(scenario.lab.b.vm_paths().serial);
    log
}
