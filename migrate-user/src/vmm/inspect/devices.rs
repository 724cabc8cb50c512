//! Plugged devices: those that forbid a migration, and NICs.

use serde::{Deserialize, Serialize};

use super::{Qmp, QmpError, child, human, qom_get, qom_list};
use crate::network::{Mac, tap_bridge};

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

/// A NIC of the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VmNic {
    /// Ethernet address.
    pub mac: Mac,
    /// Bridge that its tap is a port of, when that can be seen.
    pub bridge: Option<String>,
}

/// Devices, as they were found.
pub(super) struct Devices {
    /// Types, sorted.
    pub types: Vec<String>,
    pub nics: Vec<VmNic>,
    pub unsafe_ones: Vec<String>,
}

pub(super) async fn ask(qmp: &Qmp) -> Result<Devices, QmpError> {
    let devices = plugged(qmp).await?;
    let mut unsafe_ones = Vec::new();
    for (path, kind) in &devices {
        if let Some((_, why)) = FORBIDDEN.iter().find(|(prefix, _)| kind.starts_with(prefix)) {
            let name = path.rsplit('/').next().unwrap_or(path);
            unsafe_ones.push(format!("device {name} ({kind}): {why}"));
        }
    }
    let network = human(qmp, "info network").await?;
    if network.contains("type=vhost-user") {
        unsafe_ones.push(format!("a network backend is vhost-user: {}", FORBIDDEN[3].1));
    }
    let nics = nics(qmp, &devices, &network).await?;
    let mut types: Vec<String> = devices.into_iter().map(|(_, kind)| kind).collect();
    types.sort();
    Ok(Devices { types, nics, unsafe_ones })
}

/// `(path, type)` of every device that was plugged in.
async fn plugged(qmp: &Qmp) -> Result<Vec<(String, String)>, QmpError> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taps_are_found_in_qemus_prose() {
        let text = "virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:78:66:01\r\n \\ n0: index=0,type=tap,ifname=vmtap0,script=no,downscript=no\r\n";
        assert_eq!(tap_of(text, "n0").as_deref(), Some("vmtap0"));
        assert_eq!(tap_of(text, "n1"), None);
    }
}
