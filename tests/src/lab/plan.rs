//! The lab's address plan: what is called how, and who has which address.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

/// One of the two hosts between which the VM moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// `host-a`, where the VM is started.
    A,
    /// `host-b`.
    B,
}

impl Side {
    /// Both hosts.
    pub const BOTH: [Self; 2] = [Self::A, Self::B];

    /// The host's name, also the one its peer knows it by (`--to host-b`).
    pub const fn name(self) -> &'static str {
        match self {
            Self::A => "host-a",
            Self::B => "host-b",
        }
    }

    /// The other host.
    pub const fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// The switch's port to which this host's [`UPLINK`] is cabled.
    pub const fn switch_port(self) -> &'static str {
        match self {
            Self::A => "port-a",
            Self::B => "port-b",
        }
    }

    /// The switch's port to this host's [`MIGRATION_NIC`], where the migration network has a switch.
    pub const fn migration_port(self) -> &'static str {
        match self {
            Self::A => "mig-a",
            Self::B => "mig-b",
        }
    }

    /// Address of [`MIGRATION_NIC`].
    pub const fn migration_ip(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, self.number())
    }

    /// Address of [`MIGRATION_NIC`] where that has one of IPv6 (a unique local one, RFC 4193).
    pub const fn migration_ip6(self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, self.number() as u16)
    }

    /// Address of [`MANAGEMENT_NIC`].
    pub const fn management_ip(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 78, 0, self.number())
    }

    const fn number(self) -> u8 {
        match self {
            Self::A => 1,
            Self::B => 2,
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The dedicated migration NIC of each host: one veth pair, nothing else on it.
pub const MIGRATION_NIC: &str = "mig0";
/// The NIC of each host for the agents' control channel.
pub const MANAGEMENT_NIC: &str = "mgmt0";
/// The bridge of each host for VM traffic.
pub const BRIDGE: &str = "br0";
/// The bridge's port towards the switch; the announcements leave here.
pub const UPLINK: &str = "uplink0";
/// The VM's tap on each host.
pub const TAP: &str = "vmtap0";
/// The bridge that plays the physical switch.
pub const SWITCH_BRIDGE: &str = "sw0";
/// The bridge that plays the migration network's switch, where it has one.
pub const MIGRATION_BRIDGE: &str = "sw1";
/// The migration network's switch's port to the intruder, where there is one.
pub const INTRUDER_PORT: &str = "mig-x";
/// The intruder's NIC.
pub const INTRUDER_NIC: &str = "eth0";
/// The switch's port to the client.
pub const CLIENT_PORT: &str = "port-client";
/// The client's NIC.
pub const CLIENT_NIC: &str = "eth0";

/// Length of every network prefix in the lab.
pub const PREFIX_LEN: u8 = 24;
/// The client's address on the VM network.
pub const CLIENT_IP: Ipv4Addr = Ipv4Addr::new(10, 79, 0, 2);
/// The intruder's own address on the migration network.
pub const INTRUDER_IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 66);
/// The VM's address.
pub const VM_IP: Ipv4Addr = Ipv4Addr::new(10, 79, 0, 10);
/// The VM's MAC address (locally administered, QEMU's prefix).
pub const VM_MAC: &str = "52:54:00:78:66:01";
/// [`VM_MAC`] in bytes.
pub const VM_MAC_BYTES: [u8; 6] = [0x52, 0x54, 0x00, 0x78, 0x66, 0x01];
/// The VM's name, in its definition and for `xferry migrate`.
pub const VM_NAME: &str = "demo";
/// Port of the guest's TCP echo service.
pub const ECHO_PORT: u16 = 7000;

/// Port of the agents' control channel.
pub const CONTROL_PORT: u16 = 4790;
/// UDP port of the page stream.
pub const MIGRATION_PORT: u16 = 4791;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_is_written_the_same_twice() {
        let text: Vec<String> = VM_MAC_BYTES.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(text.join(":"), VM_MAC);
    }

    #[test]
    fn sides_are_each_others_peer() {
        for side in Side::BOTH {
            assert_eq!(side.other().other(), side);
            assert_ne!(side.migration_ip(), side.other().migration_ip());
        }
    }
}
