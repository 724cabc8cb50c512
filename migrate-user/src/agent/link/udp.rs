//! UDP sockets as link.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use crate::{
    agent::config::MigrationConfig,
    datapath::{FrameLayout, Gate, UdpGroup, UdpSource},
    migration::MigrationError,
    network::{DropCount, Nic},
};

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
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        // Without a queue's interrupts of its own, more threads than processors take turns and nothing else.
        let lanes = (config.queues_of(nic) as usize).min(cpus);
        let address = nic.address();
        let group = UdpGroup::open(&nic.name, SocketAddr::new(address, config.port), lanes)?;
        let gate = Arc::new(Gate::default());
        let source = |end: &Arc<_>| UdpSource::new(Arc::clone(end), Arc::clone(&gate));
        let sources = group.ends().iter().map(source).collect();
        Ok((Self { group, gate, address }, sources))
    }

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
