//! Headers of link, network and transport in front of a frame.

use std::net::IpAddr;

use migrate_common::locate::{ETHERNET_LEN, IPV4_LEN, IPV6_LEN, UDP_LEN};

/// One end of the migration network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Ethernet address to put into frames.
    pub mac: [u8; 6],
    /// IP address.
    pub ip: IpAddr,
}

/// Ethernet, IP and UDP headers of one direction, made once; lengths are filled in per frame. Or none.
#[derive(Clone, Debug)]
pub struct FramePath {
    template: Vec<u8>,
    ipv6: bool,
}

const TTL: u8 = 64;

impl FramePath {
    /// Headers for frames `from` → `to`. `source_port` spreads flows over the receiver's queues; `port` is the
    /// data port.
    pub fn new(from: Endpoint, to: Endpoint, source_port: u16, port: u16) -> Self {
        let mut template = Vec::with_capacity(ETHERNET_LEN + IPV6_LEN + UDP_LEN);
        template.extend(to.mac);
        template.extend(from.mac);
        let ipv6 = match (from.ip, to.ip) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                template.extend([0x08, 0x00]);
                // Version and header length, no options; do not fragment.
                template.extend([0x45, 0, 0, 0, 0, 0, 0x40, 0, TTL, 17, 0, 0]);
                template.extend(source.octets());
                template.extend(destination.octets());
                false
            }
            (source, destination) => {
                let v6 = |ip: IpAddr| match ip {
                    IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                    IpAddr::V6(ip) => ip,
                };
                template.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, 17, TTL]);
                template.extend(v6(source).octets());
                template.extend(v6(destination).octets());
                true
            }
        };
        template.extend(source_port.to_be_bytes());
        template.extend(port.to_be_bytes());
        // UDP checksum 0, "none": our own CRC32C covers the frame (RFC 768; for IPv6 RFC 6935).
        template.extend([0, 0, 0, 0]);
        Self { template, ipv6 }
    }

    /// No headers: the kernel writes them.
    pub fn bare(to: IpAddr) -> Self {
        Self { template: Vec::new(), ipv6: to.is_ipv6() }
    }

    /// Length of the headers, bytes.
    pub fn len(&self) -> usize {
        self.template.len()
    }

    /// Whether the kernel writes the headers.
    pub fn is_empty(&self) -> bool {
        self.template.is_empty()
    }

    /// Writes the headers for `payload` bytes to the front of `buffer`, which holds them.
    pub(super) fn write(&self, buffer: &mut [u8], payload: usize) {
        if self.is_empty() {
            return;
        }
        buffer[..self.template.len()].copy_from_slice(&self.template);
        let udp_len = (UDP_LEN + payload) as u16;
        let ip = &mut buffer[ETHERNET_LEN..];
        let udp_at = if self.ipv6 {
            ip[4..6].copy_from_slice(&udp_len.to_be_bytes());
            IPV6_LEN
        } else {
            ip[2..4].copy_from_slice(&(IPV4_LEN as u16 + udp_len).to_be_bytes());
            let sum = ipv4_checksum(&ip[..IPV4_LEN]);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
            IPV4_LEN
        };
        ip[udp_at + 4..udp_at + 6].copy_from_slice(&udp_len.to_be_bytes());
    }
}

/// RFC 1071 over a header whose checksum field is zero.
fn ipv4_checksum(header: &[u8]) -> u16 {
    let sum: u32 = header.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !(((folded & 0xffff) + (folded >> 16)) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv4_header_checks_out() {
        let end = |n: u8| Endpoint { mac: [2, 0, 0, 0, 0, n], ip: [10, 0, 0, n].into() };
        let path = FramePath::new(end(1), end(2), 50_000, 4791);
        let mut frame = vec![0; path.len() + 100];
        path.write(&mut frame, 100);
        assert_eq!(ipv4_checksum(&frame[14..34]), 0, "a header with its checksum sums to zero");
        assert_eq!(u16::from_be_bytes([frame[16], frame[17]]) as usize, frame.len() - 14);
    }
}
