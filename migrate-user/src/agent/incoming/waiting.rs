//! The QEMU that waits for a VM's state.

use std::{fs::Metadata, os::unix::fs::MetadataExt, time::SystemTime};

use crate::{
    agent::{Agent, announcing},
    control::Prepare,
    memory::RamFile,
    preflight::{self, Admission, DestinationFacts, Finding, HostFacts},
    vmm::{QemuDestination, VmDefinition, VmFacts, inspect},
};

/// What is known of a VM that may come, before anything is started.
pub(super) struct Admitted {
    pub(super) definition: VmDefinition,
    pub(super) host: HostFacts,
    pub(super) admission: Admission,
    /// Bytes that each backend needs.
    pub(super) needed: Vec<u64>,
}

/// A QEMU that waits.
pub(super) struct Waiting {
    pub(super) vm: QemuDestination,
    pub(super) files: Vec<RamFile>,
    pub(super) uplinks: Vec<preflight::Uplink>,
    /// When it was not yet started.
    since: SystemTime,
}

impl Waiting {
    /// Removes the RAM files that QEMU made as it started. The next attempt may need another size, and with
    /// `prealloc=on` they hold memory. What was there before is not ours to remove.
    pub(super) fn forget_ram(&self) {
        for file in self.files.iter().filter(|_| self.vm.is_ours()) {
            // As QEMU sees it: it may have mounts of its own.
            let path = format!("/proc/{}/root{}", file.pid, file.path.display());
            let made_now = || -> Option<bool> {
                let mapped = file.open(false).ok()?.metadata().ok()?;
                let named = std::fs::symlink_metadata(&path).ok()?;
                let inode = |metadata: &Metadata| (metadata.dev(), metadata.ino());
                Some(
                    named.is_file() && inode(&mapped) == inode(&named) && named.created().ok()? >= self.since,
                )
            };
            if made_now() == Some(true)
                && let Err(error) = std::fs::remove_file(&path)
            {
                tracing::warn!(%path, %error, "the RAM file of a VM that does not come stays");
            }
        }
    }
}

/// A QEMU that waits, compared with the source's. `None` where there is none, with the finding that says why.
pub(super) async fn launch(
    agent: &Agent,
    admitted: Admitted,
    request: &Prepare,
    findings: &mut Vec<Finding>,
) -> Option<Waiting> {
    let config = &agent.config;
    let Admitted { definition, host, admission, needed } = admitted;
    let since = SystemTime::now();
    let launched = QemuDestination::launch(&definition, &config.state_dir, config.limits.vmm()).await;
    let vm = match launched {
        Ok(vm) => vm,
        Err(error) => {
            findings.extend(preflight::not_launched(&request.facts, &host.name, &error.to_string()));
            return None;
        }
    };
    match inspect(vm.qmp()).await {
        Ok(found) => {
            let facts = destination_facts(host, &found, &definition, request, needed).await;
            findings.extend(preflight::after_launch(&request.facts, &facts, &admission));
            let files = found.files.unwrap_or_default();
            Some(Waiting { vm, files, uplinks: facts.uplinks, since })
        }
        Err(error) => {
            findings.extend(preflight::not_launched(&request.facts, &host.name, &error.to_string()));
            Some(Waiting { vm, files: Vec::new(), uplinks: Vec::new(), since })
        }
    }
}

async fn destination_facts(
    host: HostFacts,
    found: &VmFacts,
    definition: &VmDefinition,
    request: &Prepare,
    needed: Vec<u64>,
) -> DestinationFacts {
    let images = Some(request.facts.images_for(&found.machine.disks));
    let macs: Vec<_> = request.facts.machine.nics.iter().map(|nic| nic.mac).collect();
    DestinationFacts {
        host,
        machine: found.machine.clone(),
        pid: found.pid,
        backing: preflight::backings(&found.files),
        reserved: found.reserved,
        needed,
        images: preflight::image_facts(found.pid, found.machine.disks.clone(), images).await,
        uplinks: announcing::uplinks(definition, &macs, found),
    }
}
