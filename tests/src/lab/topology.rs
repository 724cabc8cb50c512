//! Cables the lab: namespaces, veth pairs, bridges, taps, addresses.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::command::{ip, run};
use super::layout::Layout;
use super::netns;
use super::plan::{
    BRIDGE, CLIENT_IP, CLIENT_NIC, CLIENT_PORT, INTRUDER_IP, INTRUDER_NIC, INTRUDER_PORT, MANAGEMENT_NIC,
    MIGRATION_BRIDGE, MIGRATION_NIC, PREFIX_LEN, SWITCH_BRIDGE, Side, TAP, UPLINK,
};

/// A bridge that forwards at once and learns, and does nothing by itself.
const BRIDGE_OPTIONS: &str = "type bridge stp_state 0 forward_delay 0 mcast_snooping 0";

/// What the migration NICs are like.
#[derive(Clone, Copy)]
pub(super) struct MigrationNetwork {
    /// Bytes.
    pub mtu: u32,
    /// Receive and transmit queues of each.
    pub queues: u32,
    /// IPv6 addresses, and none of IPv4.
    pub ipv6: bool,
}

impl MigrationNetwork {
    /// Options of the cable, or of one of two.
    fn options(self) -> String {
        let Self { mtu, queues, .. } = self;
        format!("mtu {mtu} numrxqueues {queues} numtxqueues {queues}")
    }

    /// Gives a host's NIC its address.
    fn address(self, namespace: &str, side: Side) -> Result<()> {
        if !self.ipv6 {
            return address(namespace, MIGRATION_NIC, &side.migration_ip().to_string());
        }
        netns::inside(namespace, || {
            let path = format!("/proc/sys/net/ipv6/conf/{MIGRATION_NIC}/disable_ipv6");
            fs::write(&path, "0").with_context(|| format!("writing {path}"))
        })?;
        let ip6 = side.migration_ip6();
        ip(&format!("-n {namespace} address add {ip6}/64 dev {MIGRATION_NIC} nodad"))
    }
}

/// Makes everything. Whoever calls it removes it, also when only a part was made.
pub(super) fn build(layout: &Layout, migration: MigrationNetwork) -> Result<()> {
    for name in layout.namespaces().iter().filter(|&name| *name != layout.intruder()) {
        namespace(name)?;
    }
    let (a, b) = (layout.namespace(Side::A), layout.namespace(Side::B));
    cable((&a, MIGRATION_NIC), (&b, MIGRATION_NIC), &migration.options())?;
    cable((&a, MANAGEMENT_NIC), (&b, MANAGEMENT_NIC), "")?;

    let switch = layout.switch();
    ip(&format!("-n {switch} link add {SWITCH_BRIDGE} {BRIDGE_OPTIONS}"))?;
    for side in Side::BOTH {
        host(&layout.namespace(side), side, migration, &switch)?;
    }
    let client = layout.client();
    cable((&switch, CLIENT_PORT), (&client, CLIENT_NIC), "")?;
    attach(&switch, CLIENT_PORT, SWITCH_BRIDGE)?;
    address(&client, CLIENT_NIC, &CLIENT_IP.to_string())?;
    up(&switch, SWITCH_BRIDGE)
}

/// Puts a switch between the migration NICs, which so far are one cable's ends. Its port to host-b takes packets of
/// `path_mtu` at most, whatever the NICs' own MTU is.
pub(super) fn interpose_switch(layout: &Layout, migration: MigrationNetwork, path_mtu: u32) -> Result<()> {
    let switch = layout.switch();
    lead_through_switch(layout, migration)?;
    ip(&format!("-n {switch} link add {MIGRATION_BRIDGE} {BRIDGE_OPTIONS}"))?;
    for side in Side::BOTH {
        attach(&switch, side.migration_port(), MIGRATION_BRIDGE)?;
    }
    ip(&format!("-n {switch} link set {} mtu {path_mtu}", Side::B.migration_port()))?;
    up(&switch, MIGRATION_BRIDGE)
}

/// Joins the migration NICs by a switch that hands the intruder, at a port of its own, every frame of both directions, as
/// one does that somebody has taken over. It learns nothing, so that a forged source address turns nothing away.
pub(super) fn admit_intruder(layout: &Layout, migration: MigrationNetwork) -> Result<()> {
    let mtu = migration.mtu;
    let (switch, intruder) = (layout.switch(), layout.intruder());
    interpose_switch(layout, migration, mtu)?;
    namespace(&intruder)?;
    cable((&switch, INTRUDER_PORT), (&intruder, INTRUDER_NIC), &format!("mtu {mtu}"))?;
    attach(&switch, INTRUDER_PORT, MIGRATION_BRIDGE)?;
    address(&intruder, INTRUDER_NIC, &INTRUDER_IP.to_string())?;
    netns::inside(&switch, leave_packets_alone)?;
    for port in [Side::A.migration_port(), Side::B.migration_port(), INTRUDER_PORT] {
        run("bridge", &["-n", &switch, "link", "set", "dev", port, "learning", "off", "flood", "on"])?;
        // A veth hands VLAN tags on beside the frame, where a real NIC's XDP program would find them in it.
        let tags = ["tx-vlan-hw-insert", "off", "tx-vlan-stag-hw-insert", "off"];
        run("ip", &[&["netns", "exec", &switch, "ethtool", "-K", port][..], &tags].concat())?;
    }
    Ok(())
}

/// A namespace without IPv6's own traffic.
fn namespace(name: &str) -> Result<()> {
    netns::add(name)?;
    netns::inside(name, silence_ipv6).with_context(|| format!("preparing namespace {name}"))?;
    ip(&format!("-n {name} link set lo up"))
}

/// Replaces the cable between the migration NICs by one from each to a port of its own in the switch, where nothing
/// joins them yet.
pub(super) fn lead_through_switch(layout: &Layout, migration: MigrationNetwork) -> Result<()> {
    ip(&format!("-n {} link delete {MIGRATION_NIC}", layout.namespace(Side::A)))?;
    for side in Side::BOTH {
        let namespace = layout.namespace(side);
        cable((&namespace, MIGRATION_NIC), (&layout.switch(), side.migration_port()), &migration.options())?;
        migration.address(&namespace, side)?;
    }
    Ok(())
}

/// A host's own part: addresses, its bridge with the VM's tap, and the uplink to the switch.
fn host(namespace: &str, side: Side, migration: MigrationNetwork, switch: &str) -> Result<()> {
    migration.address(namespace, side)?;
    address(namespace, MANAGEMENT_NIC, &side.management_ip().to_string())?;
    ip(&format!("-n {namespace} link add {BRIDGE} {BRIDGE_OPTIONS}"))?;
    cable((namespace, UPLINK), (switch, side.switch_port()), "")?;
    attach(namespace, UPLINK, BRIDGE)?;
    attach(switch, side.switch_port(), SWITCH_BRIDGE)?;
    ip(&format!("-n {namespace} tuntap add dev {TAP} mode tap"))?;
    attach(namespace, TAP, BRIDGE)?;
    up(namespace, BRIDGE)
}

/// A veth pair between two namespaces, both ends with the same `options`, both up.
fn cable(one: (&str, &str), other: (&str, &str), options: &str) -> Result<()> {
    ip(&format!(
        "link add {} {options} netns {} type veth peer name {} {options} netns {}",
        one.1, one.0, other.1, other.0
    ))?;
    up(one.0, one.1)?;
    up(other.0, other.1)
}

fn attach(namespace: &str, nic: &str, bridge: &str) -> Result<()> {
    ip(&format!("-n {namespace} link set {nic} master {bridge} up"))
}

fn address(namespace: &str, nic: &str, address: &str) -> Result<()> {
    ip(&format!("-n {namespace} address add {address}/{PREFIX_LEN} dev {nic}"))
}

fn up(namespace: &str, nic: &str) -> Result<()> {
    ip(&format!("-n {namespace} link set {nic} up"))
}

/// No firewall of this machine looks into what the bridges of the calling thread's namespace forward, as none does in a
/// switch. Nothing to do on a kernel without that.
fn leave_packets_alone() -> Result<()> {
    for family in ["iptables", "ip6tables", "arptables"] {
        let path = format!("/proc/sys/net/bridge/bridge-nf-call-{family}");
        if Path::new(&path).exists() {
            fs::write(&path, "0").with_context(|| format!("writing {path}"))?;
        }
    }
    Ok(())
}

/// No router solicitations, DAD or MLD on any NIC made later in the calling thread's namespace: they
/// would teach the switch, and show up in captures and counters. Nothing to do on a kernel without IPv6.
fn silence_ipv6() -> Result<()> {
    for scope in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
        if Path::new(&path).exists() {
            fs::write(&path, "1").with_context(|| format!("writing {path}"))?;
        }
    }
    Ok(())
}
