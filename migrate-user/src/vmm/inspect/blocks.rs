//! Disks and the block nodes beneath them.

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Qmp, QmpError, items, text};

/// Block drivers whose I/O goes past the kernel's page tables.
const FORBIDDEN: [&str; 4] =
    ["nvme", "virtio-blk-vhost-user", "virtio-blk-vhost-vdpa", "virtio-blk-vfio-pci"];

/// A disk with a medium.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Disk {
    /// The device's place in QEMU, which does not depend on the host when both are configured alike.
    pub device: String,
    /// Its image, as QEMU names it: a path, or a URL.
    pub image: String,
    /// Format of the image.
    pub format: String,
    /// Size that the guest sees, bytes.
    pub size: u64,
    /// Whether the guest can only read it.
    pub read_only: bool,
}

/// Block devices, as they were found.
pub(super) struct Blocks {
    pub disks: Vec<Disk>,
    pub direct_nodes: Vec<String>,
    pub unsafe_ones: Vec<String>,
}

pub(super) async fn ask(qmp: &Qmp) -> Result<Blocks, QmpError> {
    let nodes = qmp.execute("query-named-block-nodes", json!({ "flat": true })).await?;
    let mut direct_nodes = Vec::new();
    let mut unsafe_ones = Vec::new();
    for node in items(&nodes) {
        let name = text(&node["node-name"]);
        let driver = text(&node["drv"]);
        if FORBIDDEN.contains(&driver.as_str()) {
            unsafe_ones.push(format!(
                "block node {name} ({driver}) does its I/O by DMA past the kernel; use host_device or file"
            ));
        }
        if node["cache"]["direct"] == true {
            direct_nodes.push(name);
        }
    }
    let block = qmp.execute("query-block", json!({})).await?;
    let disks = items(&block)
        .filter(|device| device["inserted"].is_object())
        .map(|device| {
            let medium = &device["inserted"];
            let place = [&device["qdev"], &device["device"], &medium["node-name"]];
            Disk {
                device: place.into_iter().map(text).find(|name| !name.is_empty()).unwrap_or_default(),
                image: text(&medium["file"]),
                format: text(&medium["drv"]),
                size: medium["image"]["virtual-size"].as_u64().unwrap_or(0),
                read_only: medium["ro"] == true,
            }
        })
        .collect();
    Ok(Blocks { disks, direct_nodes, unsafe_ones })
}
