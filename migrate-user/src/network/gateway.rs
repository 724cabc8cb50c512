//! The next hop on a routed migration network.

use std::net::{IpAddr, Ipv4Addr};

use super::Mac;
use crate::files::{self, MAX_PROC};

/// Ethernet address of the gateway towards `peer` on `interface`, from the kernel's IPv4 routes and ARP table
/// (`/proc/net/route`, `/proc/net/arp`). `None` when there is no route, or the gateway has not answered yet.
pub fn gateway_mac(interface: &str, peer: IpAddr) -> Option<[u8; 6]> {
    let IpAddr::V4(peer) = peer else { return None };
    let routes = files::read_lossy("/proc/net/route", MAX_PROC).ok()?;
    let neighbours = files::read_lossy("/proc/net/arp", MAX_PROC).ok()?;
    let gateway = gateway(&routes, interface, peer)?;
    neighbour(&neighbours, interface, gateway)
}

/// The gateway of the most specific route.
fn gateway(routes: &str, interface: &str, peer: Ipv4Addr) -> Option<Ipv4Addr> {
    // Iface Destination Gateway Flags RefCnt Use Metric Mask …; addresses as little-endian hexadecimal.
    let address = |text: &str| u32::from_str_radix(text, 16).ok().map(u32::swap_bytes);
    routes
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            if fields.first() != Some(&interface) {
                return None;
            }
            let (destination, gateway, mask) =
                (address(fields.get(1)?)?, address(fields.get(2)?)?, address(fields.get(7)?)?);
            (gateway != 0 && peer.to_bits() & mask == destination).then_some((mask, gateway))
        })
        .max()
        .map(|(_, gateway)| Ipv4Addr::from_bits(gateway))
}

fn neighbour(table: &str, interface: &str, ip: Ipv4Addr) -> Option<[u8; 6]> {
    // IP address, HW type, Flags, HW address, Mask, Device; flag 2 is "complete".
    table.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [address, _, flags, mac, _, device] = fields[..] else { return None };
        let complete = u32::from_str_radix(flags.trim_start_matches("0x"), 16).ok()? & 2 != 0;
        if address.parse() != Ok(ip) || device != interface || !complete {
            return None;
        }
        mac.parse::<Mac>().ok().map(|mac| mac.0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTES: &str = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
mig0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0
mig0\t0000000A\t0201A8C0\t0003\t0\t0\t0\t000000FF\t0\t0\t0
mig0\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
";
    const ARP: &str = "\
IP address       HW type     Flags       HW address            Mask     Device
192.168.1.2      0x1         0x2         52:54:00:00:00:02     *        mig0
192.168.1.1      0x1         0x0         00:00:00:00:00:00     *        mig0
";

    #[test]
    fn the_most_specific_route_wins() {
        assert_eq!(gateway(ROUTES, "mig0", Ipv4Addr::new(10, 9, 8, 7)), Some(Ipv4Addr::new(192, 168, 1, 2)));
        assert_eq!(gateway(ROUTES, "mig0", Ipv4Addr::new(11, 0, 0, 1)), Some(Ipv4Addr::new(192, 168, 1, 1)));
        assert_eq!(gateway(ROUTES, "eth0", Ipv4Addr::new(11, 0, 0, 1)), None);
    }

    #[test]
    fn only_complete_neighbours_count() {
        assert_eq!(neighbour(ARP, "mig0", Ipv4Addr::new(192, 168, 1, 2)), Some([0x52, 0x54, 0, 0, 0, 2]));
        assert_eq!(neighbour(ARP, "mig0", Ipv4Addr::new(192, 168, 1, 1)), None);
    }
}
