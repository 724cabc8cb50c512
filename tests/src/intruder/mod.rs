//! A third host on the migration network that means harm: it sees every frame of both directions, and sends what it likes in
//! whose name it likes.
//!
//! ```text
//!  host-a                   switch                   host-b
//!  mig0 ═══ veth ═══ mig-a ─ sw1 ─ mig-b ═══ veth ═══ mig0
//!                             │
//!                           mig-x ═══ veth ═══ eth0 intruder
//! ```
//!
//! * [`Sniffer`] keeps what it sees of page frames and feedback.
//! * [`Envelope`] puts bytes into frames of every form there is: with tags, options, extension headers, forged addresses.
//! * [`Stream`] forges frames and feedback of a migration that was sniffed.
//! * [`capture`] records what a NIC sees, and looks for bytes in it.
//! * [`Replay`] is a way to send again what was sniffed.
//! * [`Kind`] is a frame that the bouncer must not let in, with the reason under which it is to be counted.
//! * [`Flood`] sends one frame over and over, at a pace.
//! * [`Drops`] is what the agents counted, and what did not even get to them.

pub(crate) mod bench;
pub mod capture;
mod drops;
mod envelope;
mod flood;
mod forge;
mod kind;
mod program;
mod replay;
mod sniff;

use std::net::{IpAddr, Ipv6Addr};

use anyhow::Result;

pub use drops::Drops;
pub use envelope::{End, Envelope, Form};
pub use flood::Flood;
pub use forge::Stream;
pub use kind::{Kind, not_ours};
pub use replay::Replay;
pub use sniff::{Sniffed, Sniffer};

use crate::lab::plan::{INTRUDER_IP, INTRUDER_NIC, MIGRATION_NIC, Side};
use crate::lab::{Lab, run_tool};
use crate::scenario::mac;
use crate::wire::{Frame, PacketNic};

/// Why a test with an intruder cannot run here; `None` if it can.
pub fn missing() -> Option<String> {
    run_tool("ethtool", &["--version"])
        .is_err()
        .then(|| "there is no program `ethtool`: install the package ethtool".to_owned())
}

/// The third host.
pub struct Intruder {
    namespace: String,
    nic: PacketNic,
    own: End,
    hosts: [End; 2],
}

impl Intruder {
    /// Takes its place in a lab that has one for it.
    ///
    /// # Errors
    /// If the lab has none: see [`LabConfig::intruder`](crate::lab::LabConfig::intruder).
    pub fn enter(lab: &Lab) -> Result<Self> {
        let namespace = lab.layout().intruder();
        let host = |side: Side| -> Result<End> {
            let mac = mac(&lab.host(side).namespace(), MIGRATION_NIC)?;
            Ok(End { mac, ip: side.migration_ip().into() })
        };
        Ok(Self {
            nic: PacketNic::deaf(&namespace, INTRUDER_NIC)?,
            own: End { mac: mac(&namespace, INTRUDER_NIC)?, ip: INTRUDER_IP.into() },
            hosts: [host(Side::A)?, host(Side::B)?],
            namespace,
        })
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Its own addresses.
    pub fn own(&self) -> End {
        self.own
    }

    /// Its own Ethernet address with an IPv6 address (RFC 3849) that nobody has.
    pub fn own_ipv6(&self) -> End {
        End { ip: IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x66)), ..self.own }
    }

    /// A host's addresses.
    pub fn host(&self, side: Side) -> End {
        match side {
            Side::A => self.hosts[0],
            Side::B => self.hosts[1],
        }
    }

    /// Begins to sniff.
    ///
    /// # Errors
    /// If the NIC cannot be listened to.
    pub fn sniff(&self) -> Result<Sniffer> {
        Sniffer::start(&self.namespace)
    }

    /// Begins to flood with `frame`, so many a second; without a pace as fast as it goes.
    ///
    /// # Errors
    /// If the NIC cannot be used.
    pub fn flood(&self, frame: &[u8], pace: Option<u64>) -> Result<Flood> {
        Flood::start(&self.namespace, frame, pace)
    }

    /// Sends frames as they are, in order. Returns how many left.
    pub fn send<'a>(&self, frames: impl IntoIterator<Item = &'a [u8]>) -> u64 {
        let frames: Vec<Frame> =
            frames.into_iter().map(|bytes| Frame { buffer: bytes.to_vec(), len: bytes.len() }).collect();
        frames.len() as u64 - self.nic.send(&frames)
    }
}
