//! Where on this host the network is told of a VM.

use std::path::Path;

use crate::{
    network::{Announcer, Mac, NetworkError, find_uplink},
    preflight::Uplink,
    vmm::{VmDefinition, VmFacts},
};

/// Where to announce each of `macs`: as the definition says, or out of the bridge that its tap is in.
pub(super) fn uplinks(definition: &VmDefinition, macs: &[Mac], facts: &VmFacts) -> Vec<Uplink> {
    let uplink = |&mac: &Mac| {
        let defined =
            definition.nics.iter().find(|nic| nic.mac == mac).and_then(|nic| nic.announce_on.clone());
        let through_bridge = || {
            let nic = facts.machine.nics.iter().find(|nic| nic.mac == mac)?;
            find_uplink(nic.bridge.as_deref()?)
        };
        let interface = defined.or_else(through_bridge);
        let exists = interface.as_ref().is_some_and(|name| Path::new("/sys/class/net").join(name).exists());
        Uplink { mac, interface, exists }
    };
    macs.iter().map(uplink).collect()
}

/// An announcer for all of them that are there, and how many that are. Made before the VM runs: announcing must not
/// fail when it is too late.
///
/// # Errors
/// When an interface cannot be sent on.
pub(super) fn open(uplinks: &[Uplink]) -> Result<(Announcer, u32), NetworkError> {
    let mut there: Vec<(Mac, String)> = Vec::new();
    for uplink in uplinks {
        match &uplink.interface {
            Some(interface) if uplink.exists => there.push((uplink.mac, interface.clone())),
            // The preflight found it too, and it was overridden.
            other => tracing::warn!(mac = %uplink.mac, uplink = ?other, "no uplink, so it is not announced"),
        }
    }
    let announcer = Announcer::open(&there)?;
    Ok((announcer, there.len() as u32))
}
