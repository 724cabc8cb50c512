//! Finds a page-stream frame inside an Ethernet frame.
//!
//! Written once for both users: the XDP program reads through bounds-checked packet pointers, userspace
//! through slices, both by way of [`Packet`]. Offsets are constants on every path, which is what lets the
//! kernel's verifier follow them.
//!
//! Refused as "not ours" (the kernel gets them): IPv4 with options or fragmented, IPv6 with extension
//! headers, more than one VLAN tag. A migration network needs none of these.

/// Access to a packet's first bytes.
pub trait Packet {
    /// The `N` bytes from `offset` on, or `None` where the packet ends before.
    fn bytes<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;
}

impl Packet for [u8] {
    fn bytes<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.get(offset..offset.checked_add(N)?)?.try_into().ok()
    }
}

/// Length of an Ethernet header without a VLAN tag, bytes.
pub const ETHERNET_LEN: usize = 14;
/// Length of one 802.1Q tag, bytes.
pub const VLAN_LEN: usize = 4;
/// Length of an IPv4 header without options, bytes (RFC 791).
pub const IPV4_LEN: usize = 20;
/// Length of the fixed IPv6 header, bytes (RFC 8200).
pub const IPV6_LEN: usize = 40;
/// Length of a UDP header, bytes (RFC 768).
pub const UDP_LEN: usize = 8;

const ETHERTYPE_VLAN: [u8; 2] = [0x81, 0x00];
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
const PROTOCOL_UDP: u8 = 17;

/// A UDP datagram found in an Ethernet frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Source address; IPv4 as IPv4-mapped IPv6 (RFC 4291 §2.5.5.2).
    pub source: [u8; 16],
    /// Offset of the UDP payload from the start of the Ethernet frame, bytes.
    pub payload_offset: usize,
    /// Length of the UDP payload as the UDP header tells it, bytes.
    pub payload_len: usize,
}

/// The UDP datagram to `port` in `packet`, or `None` when the frame is anything else.
#[inline(always)]
pub fn datagram<P: Packet + ?Sized>(packet: &P, port: u16) -> Option<Datagram> {
    let ethertype: [u8; 2] = packet.bytes(12)?;
    if ethertype == ETHERTYPE_VLAN {
        let inner: [u8; 2] = packet.bytes(ETHERNET_LEN + 2)?;
        by_ethertype(packet, inner, ETHERNET_LEN + VLAN_LEN, port)
    } else {
        by_ethertype(packet, ethertype, ETHERNET_LEN, port)
    }
}

#[inline(always)]
fn by_ethertype<P: Packet + ?Sized>(
    packet: &P,
    ethertype: [u8; 2],
    ip: usize,
    port: u16,
) -> Option<Datagram> {
    if ethertype == ETHERTYPE_IPV4 {
        let header: [u8; IPV4_LEN] = packet.bytes(ip)?;
        let fragmented = (header[6] & 0x3f) != 0 || header[7] != 0;
        if header[0] != 0x45 || fragmented || header[9] != PROTOCOL_UDP {
            return None;
        }
        let mut source = [0u8; 16];
        source[10] = 0xff;
        source[11] = 0xff;
        source[12] = header[12];
        source[13] = header[13];
        source[14] = header[14];
        source[15] = header[15];
        udp(packet, ip + IPV4_LEN, source, port)
    } else if ethertype == ETHERTYPE_IPV6 {
        let start: [u8; 8] = packet.bytes(ip)?;
        if start[0] >> 4 != 6 || start[6] != PROTOCOL_UDP {
            return None;
        }
        let source: [u8; 16] = packet.bytes(ip + 8)?;
        udp(packet, ip + IPV6_LEN, source, port)
    } else {
        None
    }
}

#[inline(always)]
fn udp<P: Packet + ?Sized>(packet: &P, at: usize, source: [u8; 16], port: u16) -> Option<Datagram> {
    let header: [u8; UDP_LEN] = packet.bytes(at)?;
    if u16::from_be_bytes([header[2], header[3]]) != port {
        return None;
    }
    let length = u16::from_be_bytes([header[4], header[5]]) as usize;
    Some(Datagram { source, payload_offset: at + UDP_LEN, payload_len: length.saturating_sub(UDP_LEN) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ipv4(port: u16) -> Vec<u8> {
        let mut frame = vec![0u8; 12];
        frame.extend(ETHERTYPE_IPV4);
        frame.extend([0x45, 0, 0, 32, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0x12, 0x34]);
        frame.extend(port.to_be_bytes());
        frame.extend([0, 12, 0, 0]);
        frame.extend(*b"XFRY");
        frame
    }

    #[test]
    fn finds_ipv4() {
        let found = datagram(&ipv4(4791)[..], 4791).unwrap();
        assert_eq!(found.payload_offset, 42);
        assert_eq!(found.payload_len, 4);
        assert_eq!(&found.source[10..], &[0xff, 0xff, 10, 0, 0, 1]);
    }

    #[test]
    fn finds_behind_one_vlan_tag() {
        let mut frame = ipv4(4791);
        frame.splice(12..12, [0x81, 0x00, 0x00, 0x05]);
        let found = datagram(&frame[..], 4791).unwrap();
        assert_eq!(&frame[found.payload_offset..], b"XFRY");
    }

    #[test]
    fn leaves_strangers_alone() {
        assert_eq!(datagram(&ipv4(80)[..], 4791), None);
        let mut options = ipv4(4791);
        options[14] = 0x46;
        assert_eq!(datagram(&options[..], 4791), None);
        let mut fragment = ipv4(4791);
        fragment[21] = 1;
        assert_eq!(datagram(&fragment[..], 4791), None);
        let mut first_fragment = ipv4(4791);
        first_fragment[20] = 0x20;
        assert_eq!(datagram(&first_fragment[..], 4791), None);
        let tcp = {
            let mut f = ipv4(4791);
            f[23] = 6;
            f
        };
        assert_eq!(datagram(&tcp[..], 4791), None);
    }

    #[test]
    fn every_truncation_is_none_or_in_bounds() {
        let whole = ipv4(4791);
        for end in 0..whole.len() {
            if let Some(found) = datagram(&whole[..end], 4791) {
                assert!(found.payload_offset <= end);
            }
        }
    }
}
