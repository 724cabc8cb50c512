//! Writing and checking whole frames.

use std::net::IpAddr;

use migrate_common::{
    locate::{ETHERNET_LEN, IPV4_LEN, IPV6_LEN, UDP_LEN, datagram},
    wire::{CHECKSUM_OFFSET, DESCRIPTOR_LEN, FrameHeader, HEADER_LEN, WireError},
};

use crate::xsk::Packet;

/// Where the header has the session, bytes.
const SESSION_OFFSET: usize = 8;

/// One end of the migration network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Ethernet address to put into frames.
    pub mac: [u8; 6],
    /// IP address.
    pub ip: IpAddr,
}

/// Ethernet, IP and UDP headers of one direction, made once; lengths are filled in per frame.
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

    /// Length of the headers, bytes.
    pub fn len(&self) -> usize {
        self.template.len()
    }

    /// Never: there is always an Ethernet header.
    pub fn is_empty(&self) -> bool {
        self.template.is_empty()
    }

    /// Whether the network layer is IPv6.
    pub fn is_ipv6(&self) -> bool {
        self.ipv6
    }

    fn write(&self, buffer: &mut [u8], payload: usize) {
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

/// Completes a frame whose descriptors and payload are already in `buffer`, behind the headers. Returns its
/// length, Ethernet header included, bytes. `header.checksum` is computed here.
pub fn write_frame(buffer: &mut [u8], path: &FramePath, mut header: FrameHeader) -> usize {
    header.checksum = 0;
    let start = path.len();
    let end = start + header.frame_len();
    path.write(buffer, header.frame_len());
    buffer[start..start + HEADER_LEN].copy_from_slice(&header.to_bytes());
    let checksum = crc32c::crc32c(&buffer[start..end]);
    buffer[start + CHECKSUM_OFFSET..start + CHECKSUM_OFFSET + 4].copy_from_slice(&checksum.to_le_bytes());
    end
}

/// Why a received frame is not used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// Not UDP to the data port, or cut off.
    #[error("not a frame of the page stream")]
    NotOurs,
    /// The header does not hold.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Changed on the way.
    #[error("checksum does not match")]
    Corrupt,
}

/// A received frame that is whole and unchanged: header, descriptor bytes, and the pieces of its payload.
pub struct CheckedFrame<'a> {
    /// The header.
    pub header: FrameHeader,
    /// Bytes of all descriptors.
    descriptors: Vec<[u8; DESCRIPTOR_LEN]>,
    pieces: &'a [&'a [u8]],
    /// Offset of the payload from the start of the frame, bytes.
    payload_at: usize,
}

/// Finds, parses and checks the frame in `packet`.
///
/// # Errors
/// [`FrameError`]; the packet is then dropped whole.
pub fn checked_frame<'a>(packet: &Packet<'a>, port: u16) -> Result<CheckedFrame<'a>, FrameError> {
    let pieces = packet.pieces();
    let first = *pieces.first().ok_or(FrameError::NotOurs)?;
    let found = datagram(first, port).ok_or(FrameError::NotOurs)?;
    let start = found.payload_offset;
    let bytes: [u8; HEADER_LEN] =
        first.get(start..start + HEADER_LEN).and_then(|b| b.try_into().ok()).ok_or(WireError::Truncated)?;
    let header = FrameHeader::parse(&bytes)?;
    let total: usize = pieces.iter().map(|piece| piece.len()).sum();
    if header.frame_len() != found.payload_len || start + header.frame_len() > total {
        return Err(WireError::Truncated.into());
    }
    let mut zeroed = bytes;
    zeroed[CHECKSUM_OFFSET..CHECKSUM_OFFSET + 4].fill(0);
    let mut checksum = crc32c::crc32c(&zeroed);
    for piece in Pieces::new(pieces, start + HEADER_LEN, header.frame_len() - HEADER_LEN) {
        checksum = crc32c::crc32c_append(checksum, piece);
    }
    if checksum != header.checksum {
        return Err(FrameError::Corrupt);
    }
    let count = usize::from(header.descriptors);
    let mut descriptors = vec![[0; DESCRIPTOR_LEN]; count];
    let mut flat = descriptors.as_flattened_mut();
    for piece in Pieces::new(pieces, start + HEADER_LEN, count * DESCRIPTOR_LEN) {
        let (now, rest) = flat.split_at_mut(piece.len());
        now.copy_from_slice(piece);
        flat = rest;
    }
    Ok(CheckedFrame { header, descriptors, pieces, payload_at: start + HEADER_LEN + count * DESCRIPTOR_LEN })
}

/// The migration that a frame which does not hold says it belongs to.
pub fn claimed_session(packet: &Packet<'_>, port: u16) -> Option<u64> {
    let first = *packet.pieces().first()?;
    let start = datagram(first, port)?.payload_offset;
    let bytes = first.get(start + SESSION_OFFSET..start + SESSION_OFFSET + 8)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

impl<'a> CheckedFrame<'a> {
    /// The descriptors' bytes, in order.
    pub fn descriptors(&self) -> &[[u8; DESCRIPTOR_LEN]] {
        &self.descriptors
    }

    /// `len` bytes of payload from `at` on, in the pieces they arrived in.
    pub fn payload(&self, at: usize, len: usize) -> Pieces<'a> {
        Pieces::new(self.pieces, self.payload_at + at, len)
    }
}

/// The bytes `start..start + len` of a packet, piece by piece.
pub struct Pieces<'a> {
    pieces: &'a [&'a [u8]],
    skip: usize,
    left: usize,
}

impl<'a> Pieces<'a> {
    fn new(pieces: &'a [&'a [u8]], start: usize, len: usize) -> Self {
        Self { pieces, skip: start, left: len }
    }
}

impl<'a> Iterator for Pieces<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        while self.left > 0 {
            let (piece, rest) = self.pieces.split_first()?;
            self.pieces = rest;
            if self.skip >= piece.len() {
                self.skip -= piece.len();
                continue;
            }
            let piece = &piece[self.skip..];
            self.skip = 0;
            let piece = &piece[..piece.len().min(self.left)];
            self.left -= piece.len();
            return Some(piece);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use migrate_common::wire::{FrameKind, PageDescriptor};
    use proptest::prelude::*;

    fn path(ipv6: bool) -> FramePath {
        let ip = |n: u8| -> IpAddr {
            if ipv6 { format!("fd00::{n}").parse().unwrap() } else { format!("10.0.0.{n}").parse().unwrap() }
        };
        FramePath::new(
            Endpoint { mac: [2, 0, 0, 0, 0, 1], ip: ip(1) },
            Endpoint { mac: [2, 0, 0, 0, 0, 2], ip: ip(2) },
            50_000,
            4791,
        )
    }

    fn frame(ipv6: bool, payload: &[u8]) -> Vec<u8> {
        let path = path(ipv6);
        let descriptor =
            PageDescriptor::Data { backend: 0, page: 5, offset: 0, length: payload.len() as u16 };
        let mut buffer = vec![0; path.len()];
        buffer.extend([0; HEADER_LEN]);
        buffer.extend(descriptor.to_bytes());
        buffer.extend(payload);
        let header = FrameHeader {
            kind: FrameKind::Pages,
            descriptors: 1,
            session: 1,
            epoch: 2,
            lane: 3,
            sequence: 4,
            payload: payload.len() as u32,
            checksum: 0,
        };
        let len = write_frame(&mut buffer, &path, header);
        assert_eq!(len, buffer.len());
        buffer
    }

    #[test]
    fn ipv4_header_checks_out() {
        let frame = frame(false, &[1; 100]);
        assert_eq!(ipv4_checksum(&frame[14..34]), 0, "a header with its checksum sums to zero");
        assert_eq!(u16::from_be_bytes([frame[16], frame[17]]) as usize, frame.len() - 14);
    }

    proptest! {
        /// However the kernel cuts a frame into buffers, the same comes out.
        #[test]
        fn frames_survive_any_cut(ipv6: bool, payload in proptest::collection::vec(any::<u8>(), 1..4096), cuts in proptest::collection::vec(0usize..4300, 0..6)) {
            let frame = frame(ipv6, &payload);
            // Headers lie in the first buffer: the kernel's is 3840 bytes.
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| (cut + 200).min(frame.len())).collect();
            cuts.sort_unstable();
            let mut pieces = Vec::new();
            let mut at = 0;
            for cut in cuts { pieces.push(&frame[at..cut]); at = cut; }
            pieces.push(&frame[at..]);
            let checked = checked_frame(&Packet::new(&pieces), 4791).unwrap();
            let got: Vec<u8> = checked.payload(0, payload.len()).flatten().copied().collect();
            prop_assert_eq!(got, payload);
            prop_assert_eq!(checked.header.sequence, 4);
            prop_assert_eq!(PageDescriptor::parse(&checked.descriptors()[0]).unwrap().payload_len(), checked.header.payload as usize);
        }

        #[test]
        fn every_flipped_bit_behind_the_headers_is_found(payload in proptest::collection::vec(any::<u8>(), 1..300), at: prop::sample::Index, bit in 0u8..8) {
            let mut frame = frame(false, &payload);
            let at = 42 + at.index(frame.len() - 42);
            frame[at] ^= 1 << bit;
            prop_assert!(checked_frame(&Packet::new(&[&frame]), 4791).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = checked_frame(&Packet::new(&[&bytes]), 4791);
        }

        #[test]
        fn truncation_is_an_error(len in 0usize..150) {
            let frame = frame(false, &[9; 150]);
            prop_assert!(checked_frame(&Packet::new(&[&frame[..len]]), 4791).is_err());
        }
    }
}
