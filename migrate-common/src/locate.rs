//! Finds a page-stream frame inside an Ethernet frame.
//!
//! Written once for both users: the XDP program reads through bounds-checked packet pointers, userspace
//! through slices, both by way of [`Packet`]. Offsets are constants on every path, which is what lets the
//! kernel's verifier follow them.
//!
//! A migration network needs neither IPv4 options nor fragments, neither IPv6 extension headers nor more than one VLAN
//! tag. Frames with these that go to the data port all the same are recognised ([`claim`]), so that they can be counted and
//! dropped, but never used. Not recognised, because nothing in them names a port or looking for it has no bound: fragments
//! after the first, more than [`MAX_TAGS`] tags, more than [`MAX_EXTENSIONS`] extension headers or other kinds of them,
//! headers that do not end within the packet's first buffer.

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

/// Most VLAN tags behind which a datagram is looked for: a service provider's and a customer's (IEEE 802.1Q).
pub const MAX_TAGS: usize = 2;
/// Most IPv6 extension headers behind which a datagram is looked for. RFC 8200 §4.1 recommends an order in which those
/// known here occur five times.
pub const MAX_EXTENSIONS: usize = 6;

const ETHERTYPE_VLAN: [u8; 2] = [0x81, 0x00];
/// Service tag of 802.1ad.
const ETHERTYPE_SERVICE_VLAN: [u8; 2] = [0x88, 0xa8];
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
const PROTOCOL_UDP: u8 = 17;
/// IPv6 extension headers whose second byte is their length: hop-by-hop options, routing, destination options.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION: u8 = 60;
/// The one of 8 bytes.
const FRAGMENT: u8 = 44;

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

/// What a frame that goes to the data port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// A datagram that can be used.
    Plain(Datagram),
    /// One behind headers that the page stream never has.
    Unsupported,
}

/// What `packet` claims of `port`, or `None` when it is nobody's but the kernel's.
#[inline(always)]
pub fn claim<P: Packet + ?Sized>(packet: &P, port: u16) -> Option<Claim> {
    if let Some(found) = datagram(packet, port) {
        return Some(Claim::Plain(found));
    }
    let (ethertype, ip) = behind_tags(packet)?;
    let udp = if ethertype == ETHERTYPE_IPV4 {
        behind_options(packet, ip)?
    } else if ethertype == ETHERTYPE_IPV6 {
        behind_extensions(packet, ip)?
    } else {
        return None;
    };
    let [high, low] = packet.bytes(udp + 2)?;
    (u16::from_be_bytes([high, low]) == port).then_some(Claim::Unsupported)
}

/// EtherType and offset of what lies behind all tags.
#[inline(always)]
fn behind_tags<P: Packet + ?Sized>(packet: &P) -> Option<([u8; 2], usize)> {
    let mut at = ETHERNET_LEN;
    for _ in 0..MAX_TAGS {
        let ethertype = packet.bytes(at - 2)?;
        if ethertype != ETHERTYPE_VLAN && ethertype != ETHERTYPE_SERVICE_VLAN {
            return Some((ethertype, at));
        }
        at += VLAN_LEN;
    }
    Some((packet.bytes(at - 2)?, at))
}

/// Offset of the UDP header in an IPv4 packet, if it has one: later fragments have none.
#[inline(always)]
fn behind_options<P: Packet + ?Sized>(packet: &P, ip: usize) -> Option<usize> {
    let header: [u8; IPV4_LEN] = packet.bytes(ip)?;
    let len = ((header[0] & 0x0f) as usize) * 4;
    let later = (header[6] & 0x1f) != 0 || header[7] != 0;
    if header[0] >> 4 != 4 || len < IPV4_LEN || later || header[9] != PROTOCOL_UDP {
        return None;
    }
    Some(ip + len)
}

/// The same in an IPv6 packet.
#[inline(always)]
fn behind_extensions<P: Packet + ?Sized>(packet: &P, ip: usize) -> Option<usize> {
    let start: [u8; 8] = packet.bytes(ip)?;
    if start[0] >> 4 != 6 {
        return None;
    }
    let mut next = start[6];
    let mut at = ip + IPV6_LEN;
    for _ in 0..MAX_EXTENSIONS {
        if next == PROTOCOL_UDP {
            return Some(at);
        }
        let header: [u8; 4] = packet.bytes(at)?;
        match next {
            HOP_BY_HOP | ROUTING | DESTINATION => at += (header[1] as usize + 1) * 8,
            FRAGMENT if header[2] == 0 && header[3] & 0xf8 == 0 => at += 8,
            _ => return None,
        }
        next = header[0];
    }
    (next == PROTOCOL_UDP).then_some(at)
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

    /// An IPv6 packet to `port` behind extension headers: kind, and bytes with the first left out.
    fn ipv6(port: u16, extensions: &[(u8, &[u8])]) -> Vec<u8> {
        let mut frame = vec![0u8; 12];
        frame.extend(ETHERTYPE_IPV6);
        let next = |index: usize| extensions.get(index).map_or(PROTOCOL_UDP, |extension| extension.0);
        frame.extend([0x60, 0, 0, 0, 0, 0, next(0), 64]);
        frame.extend([0xfd; 32]);
        for (index, extension) in extensions.iter().enumerate() {
            frame.push(next(index + 1));
            frame.extend(extension.1);
        }
        frame.extend([0x12, 0x34]);
        frame.extend(port.to_be_bytes());
        frame.extend([0, 12, 0, 0]);
        frame.extend(*b"XFRY");
        frame
    }

    const OPTIONS: &[u8] = &[0, 1, 4, 0, 0, 0, 0];
    const LONG: &[u8] = &[1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    const FIRST: &[u8] = &[0, 0, 1, 0, 0, 0, 7];
    const LATER: &[u8] = &[0, 0, 9, 0, 0, 0, 7];

    #[test]
    fn plain_frames_are_claimed_as_they_are_found() {
        for frame in [ipv4(4791), ipv6(4791, &[])] {
            let found = datagram(&frame[..], 4791).unwrap();
            assert_eq!(claim(&frame[..], 4791), Some(Claim::Plain(found)));
            assert_eq!(claim(&frame[..], 4792), None);
        }
    }

    #[test]
    fn options_and_first_fragments_are_not_supported() {
        let mut options = ipv4(4791);
        options[14] = 0x46;
        options.splice(34..34, [1; 4]);
        let mut most = ipv4(4791);
        most[14] = 0x4f;
        most.splice(34..34, [1; 40]);
        let mut first = ipv4(4791);
        first[20] = 0x20;
        for mut frame in [options, most, first] {
            assert_eq!(claim(&frame[..], 4791), Some(Claim::Unsupported));
            assert_eq!(claim(&frame[..], 4792), None);
            assert_eq!(datagram(&frame[..], 4791), None);
            frame[23] = 6;
            assert_eq!(claim(&frame[..], 4791), None);
        }
        let mut later = ipv4(4791);
        later[21] = 1;
        assert_eq!(claim(&later[..], 4791), None);
    }

    #[test]
    fn extension_headers_are_not_supported() {
        let chains: [&[(u8, &[u8])]; 6] = [
            &[(HOP_BY_HOP, OPTIONS)],
            &[(DESTINATION, LONG)],
            &[(ROUTING, OPTIONS)],
            &[(FRAGMENT, FIRST)],
            &[(HOP_BY_HOP, LONG), (DESTINATION, OPTIONS), (ROUTING, LONG), (FRAGMENT, FIRST)],
            &[(DESTINATION, OPTIONS); MAX_EXTENSIONS],
        ];
        for chain in chains {
            let frame = ipv6(4791, chain);
            assert_eq!(claim(&frame[..], 4791), Some(Claim::Unsupported), "{chain:?}");
            assert_eq!(claim(&frame[..], 4792), None);
            assert_eq!(datagram(&frame[..], 4791), None);
        }
        let unknown: [&[(u8, &[u8])]; 3] =
            [&[(FRAGMENT, LATER)], &[(DESTINATION, OPTIONS); MAX_EXTENSIONS + 1], &[(50, OPTIONS)]];
        for chain in unknown {
            assert_eq!(claim(&ipv6(4791, chain)[..], 4791), None, "{chain:?}");
        }
    }

    #[test]
    fn more_tags_are_not_supported() {
        let tagged = |tags: &[u8]| {
            let mut frame = ipv4(4791);
            frame.splice(12..12, tags.iter().copied());
            frame
        };
        let (customer, service) = ([0x81, 0x00, 0, 5], [0x88, 0xa8, 0, 5]);
        assert!(matches!(claim(&tagged(&customer)[..], 4791), Some(Claim::Plain(_))));
        for tags in [service.to_vec(), [service, customer].concat(), [customer, customer].concat()] {
            assert_eq!(claim(&tagged(&tags)[..], 4791), Some(Claim::Unsupported), "{tags:x?}");
            assert_eq!(datagram(&tagged(&tags)[..], 4791), None);
        }
        assert_eq!(claim(&tagged(&customer.repeat(3))[..], 4791), None);
    }

    #[test]
    fn every_truncation_is_none_or_in_bounds() {
        let whole = ipv4(4791);
        for end in 0..whole.len() {
            if let Some(found) = datagram(&whole[..end], 4791) {
                assert!(found.payload_offset <= end);
            }
        }
        let chain = ipv6(4791, &[(HOP_BY_HOP, OPTIONS), (FRAGMENT, FIRST)]);
        // The port is the second half of the UDP header's first word.
        let told = chain.len() - 8;
        for end in 0..chain.len() {
            let expected = (end >= told).then_some(Claim::Unsupported);
            assert_eq!(claim(&chain[..end], 4791), expected, "{end}");
        }
    }
}
