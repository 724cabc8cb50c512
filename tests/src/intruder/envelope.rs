//! Headers around bytes, as honest or as odd as wanted. Made here and not by the product, which knows only the honest ones.

use std::net::{IpAddr, Ipv6Addr};

/// Shortest frame on an Ethernet, without its checksum, bytes (IEEE 802.3).
pub const SHORTEST: usize = 60;
/// Ethernet header, bytes.
const ETHERNET: usize = 14;
const UDP: u8 = 17;
/// IPv6 extension headers (RFC 8200, section 4).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;
/// Eight bytes of options that say nothing: a length of 0 more, and padding.
const PADDING: [u8; 6] = [1, 4, 0, 0, 0, 0];

/// Who sends, or who is sent to, or in whose name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Ethernet address.
    pub mac: [u8; 6],
    /// IP address.
    pub ip: IpAddr,
}

/// What lies between Ethernet header and UDP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// IP of the ends' family, without anything else.
    Plain,
    /// The same behind an 802.1Q tag.
    Tagged,
    /// Behind an 802.1ad service tag.
    ServiceTagged,
    /// Behind a service tag and a customer tag.
    DoublyTagged,
    /// IPv4 with four bytes of options.
    Options,
    /// IPv4 with the most options there can be, 40 bytes.
    MostOptions,
    /// The first of several IPv4 fragments.
    FirstFragment,
    /// A later one: nothing in it names a port.
    LaterFragment,
    /// IPv6 with the ends' IPv4 addresses mapped (RFC 4291, section 2.5.5.2).
    Mapped,
    /// The same with hop-by-hop options.
    HopByHop,
    /// With a routing header.
    Routing,
    /// With destination options.
    DestinationOptions,
    /// The first of several IPv6 fragments.
    Ipv6Fragment,
    /// With three of these.
    Chain,
}

impl Form {
    /// Those to the data port that the bouncer is to refuse for themselves.
    pub const UNSUPPORTED: [Self; 10] = [
        Self::ServiceTagged,
        Self::DoublyTagged,
        Self::Options,
        Self::MostOptions,
        Self::FirstFragment,
        Self::HopByHop,
        Self::Routing,
        Self::DestinationOptions,
        Self::Ipv6Fragment,
        Self::Chain,
    ];

    /// Tags, each with its EtherType.
    fn tags(self) -> &'static [[u8; 4]] {
        const CUSTOMER: [u8; 4] = [0x81, 0x00, 0, 5];
        const SERVICE: [u8; 4] = [0x88, 0xa8, 0, 7];
        match self {
            Self::Tagged => &[CUSTOMER],
            Self::ServiceTagged => &[SERVICE],
            Self::DoublyTagged => &[SERVICE, CUSTOMER],
            _ => &[],
        }
    }

    /// Kinds of the IPv6 extension headers.
    fn extensions(self) -> &'static [u8] {
        match self {
            Self::HopByHop => &[HOP_BY_HOP],
            Self::Routing => &[ROUTING],
            Self::DestinationOptions => &[DESTINATION],
            Self::Ipv6Fragment => &[FRAGMENT],
            Self::Chain => &[HOP_BY_HOP, DESTINATION, FRAGMENT],
            _ => &[],
        }
    }

    /// Whether it is IPv6 whatever the ends' addresses are.
    fn maps(self) -> bool {
        self == Self::Mapped || !self.extensions().is_empty()
    }
}

/// What is written on a frame.
#[derive(Clone, Copy, Debug)]
pub struct Envelope {
    /// In whose name.
    pub from: End,
    /// To whom.
    pub to: End,
    /// UDP ports.
    pub ports: (u16, u16),
    /// How.
    pub form: Form,
}

impl Envelope {
    /// A frame with `payload` in a UDP datagram.
    pub fn wrap(&self, payload: &[u8]) -> Vec<u8> {
        let mut udp = [self.ports.0.to_be_bytes(), self.ports.1.to_be_bytes()].concat();
        udp.extend((payload.len() as u16 + 8).to_be_bytes());
        // No checksum, as the page stream has none.
        udp.extend([0, 0]);
        udp.extend(payload);
        self.wrap_ip(UDP, &udp)
    }

    /// A frame with an IP packet of another protocol.
    pub fn wrap_ip(&self, protocol: u8, body: &[u8]) -> Vec<u8> {
        let mut frame = [self.to.mac, self.from.mac].concat();
        self.form.tags().iter().for_each(|tag| frame.extend(tag));
        match (self.from.ip, self.to.ip) {
            (IpAddr::V4(from), IpAddr::V4(to)) if !self.form.maps() => {
                frame.extend([0x08, 0x00]);
                frame.extend(self.ipv4(protocol, from.octets(), to.octets(), body.len()));
            }
            (from, to) => {
                frame.extend([0x86, 0xdd]);
                frame.extend(self.ipv6(protocol, mapped(from), mapped(to), body.len()));
            }
        }
        frame.extend(body);
        frame.resize(frame.len().max(SHORTEST), 0);
        frame
    }

    fn ipv4(&self, protocol: u8, from: [u8; 4], to: [u8; 4], body: usize) -> Vec<u8> {
        let options = match self.form {
            Form::Options => 4,
            Form::MostOptions => 40,
            _ => 0,
        };
        // Do not fragment; or that more follow, and behind how many times 8 bytes.
        let fragment = match self.form {
            Form::FirstFragment => [0x20, 0],
            Form::LaterFragment => [0, 8],
            _ => [0x40, 0],
        };
        let words = (20 + options) as u8 / 4;
        let mut header = vec![0x40 | words, 0];
        header.extend(((20 + options + body) as u16).to_be_bytes());
        header.extend([0, 7, fragment[0], fragment[1], 64, protocol, 0, 0]);
        header.extend(from);
        header.extend(to);
        // Each a "no operation".
        header.extend(std::iter::repeat_n(1, options));
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        header
    }

    fn ipv6(&self, protocol: u8, from: Ipv6Addr, to: Ipv6Addr, body: usize) -> Vec<u8> {
        let kinds = self.form.extensions();
        let mut header = vec![0x60, 0, 0, 0];
        header.extend(((kinds.len() * 8 + body) as u16).to_be_bytes());
        header.extend([kinds.first().copied().unwrap_or(protocol), 64]);
        header.extend(from.octets());
        header.extend(to.octets());
        for (index, &kind) in kinds.iter().enumerate() {
            let next = kinds.get(index + 1).copied().unwrap_or(protocol);
            match kind {
                // At offset 0, more follow.
                FRAGMENT => header.extend([next, 0, 0, 1, 0, 0, 0, 7]),
                // Of an unknown type and with no segments left, which a host skips.
                ROUTING => header.extend([next, 0, 253, 0, 0, 0, 0, 0]),
                _ => {
                    header.extend([next, 0]);
                    header.extend(PADDING);
                }
            }
        }
        header
    }
}

fn mapped(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

/// RFC 1071.
pub fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| u32::from(low));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Writes other Ethernet and IPv4 source addresses over those of a plain IPv4 frame.
pub fn redress(frame: &mut [u8], from: End, to: End) {
    frame[..6].copy_from_slice(&to.mac);
    frame[6..12].copy_from_slice(&from.mac);
    let (IpAddr::V4(source), IpAddr::V4(target)) = (from.ip, to.ip) else { return };
    let ip = &mut frame[ETHERNET..ETHERNET + 20];
    ip[12..16].copy_from_slice(&source.octets());
    ip[16..20].copy_from_slice(&target.octets());
    ip[10..12].fill(0);
    let sum = checksum(ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use migrate_common::locate::{Claim, claim};

    use super::*;

    fn envelope(form: Form) -> Envelope {
        let end = |last: u8| End { mac: [2, 0, 0, 0, 0, last], ip: [10, 77, 0, last].into() };
        Envelope { from: end(1), to: end(2), ports: (50_000, 4791), form }
    }

    #[test]
    fn forms_are_what_they_are_called() {
        for form in [Form::Plain, Form::Tagged, Form::Mapped] {
            let frame = envelope(form).wrap(b"payload");
            let Some(Claim::Plain(found)) = claim(&frame[..], 4791) else { panic!("{form:?}") };
            assert_eq!(&frame[found.payload_offset..][..found.payload_len], b"payload");
        }
        for form in Form::UNSUPPORTED {
            let frame = envelope(form).wrap(b"payload");
            assert_eq!(claim(&frame[..], 4791), Some(Claim::Unsupported), "{form:?}");
        }
        assert_eq!(claim(&envelope(Form::LaterFragment).wrap(b"payload")[..], 4791), None);
    }

    #[test]
    fn redressed_frames_keep_their_checksum_right() {
        let mut frame = envelope(Form::Plain).wrap(b"payload");
        let end = End { mac: [9; 6], ip: [192, 0, 2, 1].into() };
        redress(&mut frame, end, envelope(Form::Plain).from);
        assert_eq!(checksum(&frame[14..34]), 0);
        assert_eq!(frame[26..30], [192, 0, 2, 1]);
    }
}
