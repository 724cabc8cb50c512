//! UDP sockets as link.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use crate::{
    agent::config::MigrationConfig,
    cpus,
    datapath::{FrameLayout, Gate, UdpGroup, UdpSource},
    migration::MigrationError,
    network::{DropCount, Nic},
};

/// Lanes of a NIC with fewer queues, where the configuration does not say fewer still: one sender packs and encrypts, and one
/// receiver decrypts, unpacks and places, less than a fast NIC carries.
const LANES: usize = 4;

/// The sockets on the data port and who may send to them.
pub(in crate::agent) struct UdpLink {
    group: UdpGroup,
    gate: Arc<Gate>,
    address: IpAddr,
}

impl UdpLink {
    /// One socket for each lane, and the source that takes what comes to it.
    ///
    /// # Errors
    /// When the port cannot be had.
    pub fn open(nic: &Nic, config: &MigrationConfig) -> Result<(Self, Vec<UdpSource>), MigrationError> {
        let lanes = lanes(config.queues_of(nic) as usize, config.queues, cpus::usable());
        let address = nic.address();
        let group = UdpGroup::open(&nic.name, SocketAddr::new(address, config.port), lanes)?;
        let gate = Arc::new(Gate::default());
        let source = |end: &Arc<_>| UdpSource::new(Arc::clone(end), Arc::clone(&gate));
        let sources = group.ends().iter().map(source).collect();
        Ok((Self { group, gate, address }, sources))
    }

    /// Lanes of a migration from here, and workers that receive.
    pub fn lanes(&self) -> usize {
        self.group.ends().len()
    }

    pub fn room(&self, frames: &FrameLayout) -> usize {
        self.group.frames(frames)
    }

    pub fn still_on(&self, nic: &Nic) -> Result<(), MigrationError> {
        if nic.address() == self.address {
            return Ok(());
        }
        Err(MigrationError::Host(format!(
            "the address of {} was changed from {} to {} since the agent started: restart the agent",
            nic.name,
            self.address,
            nic.address()
        )))
    }

    pub fn admit(&self, session: u64, peer: IpAddr) -> Result<(), MigrationError> {
        self.gate.admit(session, peer).map_err(|full| MigrationError::Host(full.to_string()))
    }

    pub fn dismiss(&self, session: u64) {
        self.gate.dismiss(session);
    }

    pub fn drops(&self) -> Vec<DropCount> {
        let counts = self.gate.drops().into_iter();
        counts.map(|(reason, frames)| DropCount { reason: reason.name(), frames }).collect()
    }

    pub fn no_buffer(&self) -> u64 {
        self.group.drops()
    }
}

/// How many lanes there are on a NIC of which `queues` may be used, at most `limit` of them: a socket needs no queue of its own.
fn lanes(queues: usize, limit: Option<u32>, processors: usize) -> usize {
    let wanted = queues.max(LANES).min(limit.map_or(usize::MAX, |limit| limit as usize));
    // More threads than processors take turns and nothing else.
    wanted.clamp(1, processors.max(1))
}

#[cfg(test)]
mod tests {
    use super::lanes;

    #[test]
    fn a_nic_of_one_queue_has_several_lanes_where_there_are_processors() {
        assert_eq!([1, 2, 3, 4, 64].map(|processors| lanes(1, None, processors)), [1, 2, 3, 4, 4]);
        assert_eq!([1, 8, 64].map(|processors| lanes(16, None, processors)), [1, 8, 16]);
    }

    #[test]
    fn the_configuration_limits_them() {
        assert_eq!([1, 2, 3, 9].map(|limit| lanes(limit.min(2), Some(limit as u32), 8)), [1, 2, 3, 4]);
        assert_eq!(lanes(16, Some(0), 8), 1);
    }
}
