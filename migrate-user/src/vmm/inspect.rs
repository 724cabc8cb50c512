//! What a QEMU consists of, as far as a migration must know: asked over QMP, nothing configured.

use serde_json::{Value, json};

use super::{Qmp, QmpError, VmmError};
use crate::{
    memory::{Backend, RamFile, find_ram_files},
    network::{Mac, tap_bridge},
};

/// Devices that write guest memory past our tracker, or keep state outside QEMU.
const FORBIDDEN: [(&str, &str); 8] = [
    ("virtio-balloon", "the balloon punches holes into RAM unseen; start the VM without it"),
    ("virtio-mem", "virtio-mem plugs and unplugs RAM unseen; start the VM without it"),
    ("virtio-pmem", "its memory is written from outside; start the VM without it"),
    ("vhost-user", "its backend writes guest memory from another process; use an in-kernel or QEMU backend"),
    ("vfio", "a passed-through device writes guest memory by DMA; unplug it (device_del) and use virtio"),
    ("vhost-vdpa", "the device writes guest memory by DMA; use a tap backend"),
    ("ivshmem", "other processes write its memory; unplug it (device_del)"),
    ("nvdimm", "its file is written from outside the RAM that is moved; start the VM without it"),
];

/// Block drivers whose I/O goes past the kernel's page tables.
const FORBIDDEN_BLOCK: [&str; 4] =
    ["nvme", "virtio-blk-vhost-user", "virtio-blk-vhost-vdpa", "virtio-blk-vfio-pci"];

/// A NIC of the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmNic {
    /// Ethernet address.
    pub mac: Mac,
    /// Bridge that its tap is a port of, when that can be seen.
    pub bridge: Option<String>,
}

/// Facts about one QEMU.
#[derive(Debug)]
pub struct VmFacts {
    /// Process.
    pub pid: u32,
    /// QEMU's version.
    pub version: String,
    /// Machine type, with its version.
    pub machine: String,
    /// Run state in QEMU's words: running, paused, inmigrate …
    pub status: String,
    /// Memory backends in an order that does not depend on the host.
    pub backends: Vec<Backend>,
    /// Their files, same order.
    pub files: Vec<RamFile>,
    /// NICs.
    pub nics: Vec<VmNic>,
    /// Block nodes that bypass the page cache (O_DIRECT): their DMA evades the live scan.
    pub direct_nodes: Vec<String>,
    /// Reasons against migrating, each with a remedy.
    pub obstacles: Vec<String>,
}

/// Asks QEMU for everything.
///
/// # Errors
/// [`VmmError`]; [`crate::memory::MemoryError::NotShared`] when RAM is not in a shared file.
pub async fn inspect(qmp: &Qmp) -> Result<VmFacts, VmmError> {
    let status = qmp.execute("query-status", json!({})).await?;
    let machine = qom_get(qmp, "/machine", "type").await?;
    let ram = ram_backends(qmp).await?;
    let files = find_ram_files(qmp.pid(), &ram)?;
    let mut obstacles = Vec::new();
    let devices = devices(qmp).await?;
    for (path, kind) in &devices {
        if let Some((_, why)) = FORBIDDEN.iter().find(|(prefix, _)| kind.starts_with(prefix)) {
            let name = path.rsplit('/').next().unwrap_or(path);
            obstacles.push(format!("device {name} ({kind}): {why}"));
        }
    }
    let network = human(qmp, "info network").await?;
    if network.contains("type=vhost-user") {
        obstacles.push(format!("a network backend is vhost-user: {}", FORBIDDEN[3].1));
    }
    let blocked = qmp.execute("query-migrate", json!({})).await?;
    for reason in blocked["blocked-reasons"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        obstacles.push(format!("QEMU says: {reason}"));
    }
    let (direct_nodes, block_obstacles) = block_nodes(qmp).await?;
    obstacles.extend(block_obstacles);
    Ok(VmFacts {
        pid: qmp.pid(),
        version: qmp.version().to_owned(),
        machine: machine.as_str().unwrap_or_default().trim_end_matches("-machine").to_owned(),
        status: status["status"].as_str().unwrap_or_default().to_owned(),
        backends: ram.into_iter().map(|(id, _, size)| Backend { id, size }).collect(),
        files,
        nics: nics(qmp, &devices, &network).await?,
        direct_nodes,
        obstacles,
    })
}

async fn qom_get(qmp: &Qmp, path: &str, property: &str) -> Result<Value, QmpError> {
    qmp.execute("qom-get", json!({ "path": path, "property": property })).await
}

async fn qom_list(qmp: &Qmp, path: &str) -> Result<Vec<(String, String)>, QmpError> {
    let list = qmp.execute("qom-list", json!({ "path": path })).await?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok(list.as_array().into_iter().flatten().map(|item| (text(&item["name"]), text(&item["type"]))).collect())
}

/// `child<TYPE>` → TYPE.
fn child(kind: &str) -> Option<&str> {
    kind.strip_prefix("child<")?.strip_suffix('>')
}

async fn human(qmp: &Qmp, command: &str) -> Result<String, QmpError> {
    let text = qmp.execute("human-monitor-command", json!({ "command-line": command })).await?;
    Ok(text.as_str().unwrap_or_default().to_owned())
}

/// `(id, mem-path, bytes)` of every memory backend, sorted by id: both hosts must come to the same order.
async fn ram_backends(qmp: &Qmp) -> Result<Vec<(String, String, u64)>, VmmError> {
    let kinds = qom_list(qmp, "/objects").await?;
    let list = qmp.execute("query-memdev", json!({})).await?;
    let mut backends = Vec::new();
    for memdev in list.as_array().into_iter().flatten() {
        let id = memdev["id"].as_str().unwrap_or_default().to_owned();
        let size = memdev["size"].as_u64().unwrap_or(0);
        let kind =
            kinds.iter().find(|(name, _)| *name == id).and_then(|(_, kind)| child(kind)).unwrap_or("unknown");
        let not_shared = |found: String| crate::memory::MemoryError::NotShared {
            backend: if id.is_empty() { "ram".into() } else { id.clone() },
            pid: qmp.pid(),
            found,
        };
        if kind != "memory-backend-file" {
            return Err(not_shared(format!("a {kind}, not a memory-backend-file")).into());
        }
        let path = qom_get(qmp, &format!("/objects/{id}"), "mem-path").await?;
        let path = path.as_str().unwrap_or_default().to_owned();
        backends.push((id, path, size));
    }
    if backends.is_empty() {
        return Err(crate::memory::MemoryError::NotShared {
            backend: "ram".into(),
            pid: qmp.pid(),
            found: "not made of memory backends".into(),
        }
        .into());
    }
    backends.sort();
    Ok(backends)
}

/// `(path, type)` of every device that was plugged in.
async fn devices(qmp: &Qmp) -> Result<Vec<(String, String)>, QmpError> {
    let mut devices = Vec::new();
    for container in ["/machine/peripheral", "/machine/peripheral-anon"] {
        for (name, kind) in qom_list(qmp, container).await? {
            if let Some(kind) = child(&kind) {
                devices.push((format!("{container}/{name}"), kind.to_owned()));
            }
        }
    }
    Ok(devices)
}

async fn nics(qmp: &Qmp, devices: &[(String, String)], network: &str) -> Result<Vec<VmNic>, QmpError> {
    let mut nics = Vec::new();
    for (path, _) in devices {
        let properties = qom_list(qmp, path).await?;
        if !["mac", "netdev"].iter().all(|wanted| properties.iter().any(|(name, _)| name == wanted)) {
            continue;
        }
        let mac = qom_get(qmp, path, "mac").await?;
        let Some(mac) = mac.as_str().and_then(|text| text.parse().ok()) else { continue };
        let netdev = qom_get(qmp, path, "netdev").await?;
        let tap = netdev.as_str().and_then(|id| tap_of(network, id));
        nics.push(VmNic { mac, bridge: tap.and_then(|tap| tap_bridge(&tap)) });
    }
    Ok(nics)
}

/// The tap of netdev `id` in the answer to "info network".
fn tap_of(network: &str, id: &str) -> Option<String> {
    let line = network.lines().find(|line| {
        line.trim_start_matches([' ', '\\']).strip_prefix(id).is_some_and(|rest| rest.starts_with(':'))
    })?;
    let name = line.split("ifname=").nth(1)?;
    Some(name.split([',', ' ']).next()?.trim().to_owned())
}

/// Nodes that use O_DIRECT, and obstacles.
async fn block_nodes(qmp: &Qmp) -> Result<(Vec<String>, Vec<String>), QmpError> {
    let nodes = qmp.execute("query-named-block-nodes", json!({ "flat": true })).await?;
    let mut direct = Vec::new();
    let mut obstacles = Vec::new();
    for node in nodes.as_array().into_iter().flatten() {
        let name = node["node-name"].as_str().unwrap_or("?").to_owned();
        let driver = node["drv"].as_str().unwrap_or_default();
        if FORBIDDEN_BLOCK.contains(&driver) {
            obstacles.push(format!(
                "block node {name} ({driver}) does its I/O by DMA past the kernel; use host_device or file"
            ));
        }
        if node["cache"]["direct"].as_bool().unwrap_or(false) {
            direct.push(name);
        }
    }
    Ok((direct, obstacles))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taps_are_found_in_qemus_prose() {
        let text = "virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:78:66:01\r\n \\ n0: index=0,type=tap,ifname=vmtap0,script=no,downscript=no\r\n";
        assert_eq!(tap_of(text, "n0").as_deref(), Some("vmtap0"));
        assert_eq!(tap_of(text, "n1"), None);
        assert_eq!(child("child<virtio-balloon-pci>"), Some("virtio-balloon-pci"));
        assert_eq!(child("string"), None);
    }
}
