//! Where on this host the network is told of a VM.

use crate::{
    migration::MigrationError,
    network::{Announcer, Mac, find_uplink},
    vmm::{VmDefinition, VmFacts},
};

/// An announcer for every one of `macs`, and how many that are. Made before the VM runs: announcing must not fail when
/// it is too late.
///
/// # Errors
/// When it cannot be told from which interface to announce one.
pub(super) fn open(
    definition: &VmDefinition,
    macs: &[Mac],
    facts: &VmFacts,
) -> Result<(Announcer, u32), MigrationError> {
    let mut uplinks: Vec<(Mac, String)> = Vec::new();
    for &mac in macs {
        let defined =
            definition.nics.iter().find(|nic| nic.mac == mac).and_then(|nic| nic.announce_on.clone());
        let found = || {
            let nic = facts.nics.iter().find(|nic| nic.mac == mac)?;
            find_uplink(nic.bridge.as_deref()?)
        };
        let uplink = defined.or_else(found).ok_or_else(|| {
            MigrationError::Host(format!(
                "cannot tell on which interface of this host to announce {mac}: add nics = [{{ mac = \"{mac}\", announce-on = \
                 \"…\" }}] with the uplink's bridge port to the definition of {}",
                definition.name
            ))
        })?;
        uplinks.push((mac, uplink));
    }
    let announcer = Announcer::open(&uplinks)?;
    Ok((announcer, uplinks.len() as u32))
}
