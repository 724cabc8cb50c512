//! What a QEMU consists of, as far as a migration must know: asked over QMP, nothing configured.
//!
//! Asking and judging are apart: what is found here goes, as [`MachineFacts`], also to the other host, and
//! [`crate::preflight`] compares both sides.

mod blocks;
mod cpu;
mod devices;
mod memory;

pub use blocks::Disk;
pub use cpu::{CpuFacts, FeatureWord};
pub use devices::VmNic;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Qmp, QmpError, VmmError};
use crate::memory::{Backend, MemoryError, RamFile};

/// What a guest can notice of its machine, and what of it this host provides: the same questions to the QEMU
/// that runs the VM and to the one that waits for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MachineFacts {
    /// QEMU's version.
    pub version: String,
    /// Machine type, with its version.
    pub machine: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// What the first vCPU is; QEMU makes all of them alike.
    pub cpu: CpuFacts,
    /// Places of the vCPUs in the topology, in QEMU's words, in QEMU's order.
    pub vcpus: Vec<String>,
    /// Memory backends in an order that does not depend on the host.
    pub backends: Vec<Backend>,
    /// NUMA nodes of the guest, one line each in QEMU's words; empty without NUMA.
    pub numa: Vec<String>,
    /// Types of all plugged devices, sorted.
    pub devices: Vec<String>,
    /// NICs.
    pub nics: Vec<VmNic>,
    /// Disks with a medium.
    pub disks: Vec<Disk>,
}

/// Facts about one QEMU.
#[derive(Debug)]
pub struct VmFacts {
    /// Process.
    pub pid: u32,
    /// Run state in QEMU's words: running, paused, inmigrate …
    pub status: String,
    /// What can be compared with another host's.
    pub machine: MachineFacts,
    /// Files of the memory backends, same order; or why RAM cannot be moved.
    pub files: Result<Vec<RamFile>, MemoryError>,
    /// Whether QEMU has claimed huge pages for every backend (`reserve=on`, the default).
    pub reserved: bool,
    /// Block nodes that bypass the page cache (O_DIRECT): their DMA evades the live scan.
    pub direct_nodes: Vec<String>,
    /// Devices that forbid a migration, each with the reason and what to do.
    pub unsafe_devices: Vec<String>,
    /// What QEMU itself says against a migration.
    pub blockers: Vec<String>,
}

/// Asks QEMU for everything.
///
/// # Errors
/// When its monitor does not answer. RAM that cannot be moved is no error but a fact.
pub async fn inspect(qmp: &Qmp) -> Result<VmFacts, VmmError> {
    let status = qmp.execute("query-status", json!({})).await?;
    let machine = qom_get(qmp, "/machine", "type").await?;
    let kvm = qmp.execute("query-kvm", json!({})).await?;
    let memory = memory::ask(qmp).await?;
    let devices = devices::ask(qmp).await?;
    let blocks = blocks::ask(qmp).await?;
    let (cpu, vcpus) = cpu::ask(qmp).await?;
    let blocked = qmp.execute("query-migrate", json!({})).await?;
    let mut unsafe_devices = devices.unsafe_ones;
    unsafe_devices.extend(blocks.unsafe_ones);
    Ok(VmFacts {
        pid: qmp.pid(),
        status: text(&status["status"]),
        machine: MachineFacts {
            version: qmp.version().to_owned(),
            machine: text(&machine).trim_end_matches("-machine").to_owned(),
            accelerator: if kvm["enabled"] == true { "kvm" } else { "tcg" }.into(),
            cpu,
            vcpus,
            backends: memory.backends,
            numa: memory.numa,
            devices: devices.types,
            nics: devices.nics,
            disks: blocks.disks,
        },
        files: memory.files,
        reserved: memory.reserved,
        direct_nodes: blocks.direct_nodes,
        unsafe_devices,
        blockers: items(&blocked["blocked-reasons"]).filter_map(Value::as_str).map(str::to_owned).collect(),
    })
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

async fn qom_get(qmp: &Qmp, path: &str, property: &str) -> Result<Value, QmpError> {
    qmp.execute("qom-get", json!({ "path": path, "property": property })).await
}

/// `(name, type)` of all properties of an object.
async fn qom_list(qmp: &Qmp, path: &str) -> Result<Vec<(String, String)>, QmpError> {
    let list = qmp.execute("qom-list", json!({ "path": path })).await?;
    Ok(items(&list).map(|item| (text(&item["name"]), text(&item["type"]))).collect())
}

/// `child<TYPE>` → TYPE.
fn child(kind: &str) -> Option<&str> {
    kind.strip_prefix("child<")?.strip_suffix('>')
}

async fn human(qmp: &Qmp, command: &str) -> Result<String, QmpError> {
    let answer = qmp.execute("human-monitor-command", json!({ "command-line": command })).await?;
    Ok(text(&answer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_of_children() {
        assert_eq!(child("child<virtio-balloon-pci>"), Some("virtio-balloon-pci"));
        assert_eq!(child("string"), None);
    }
}
