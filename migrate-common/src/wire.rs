//! Wire format of the page stream: one fixed header, then page descriptors, then payload.
//!
//! ```text
//!  0        4    5    6      8         16      20     22   23   24         28        32         36       40
//!  | "XFRY" | v  | k  | ndesc| session | epoch | lane | g  | p  | sequence | payload | checksum | rsvd   |
//!  | descriptor 0 (16 bytes) | … | descriptor ndesc-1 | payload of descriptor 0 | … | tag (16 bytes) |
//! ```
//! All integers are little-endian. Reserved fields are zero and are refused when they are not, so that a
//! later version can give them a meaning. `g` says what [guards](Guard) the frame: `checksum`, which is CRC32C over the
//! whole of header (with the field itself zero), descriptors and payload; or the tag, and then descriptors and payload are
//! encrypted, `checksum` is zero, and the header is the tag's associated data. `p` says how the payload is [packed](Packing):
//! as it is, or all of it as one compressed block, which unpacks to the payloads of the descriptors.

use crate::PAGE_SIZE;

/// First four bytes of every frame.
pub const MAGIC: [u8; 4] = *b"XFRY";
/// Version of this format. Peers agree on it in the control channel's hello; frames of another are dropped.
pub const VERSION: u8 = 3;
/// Length of [`FrameHeader`] on the wire, bytes.
pub const HEADER_LEN: usize = 40;
/// Length of [`PageDescriptor`] on the wire, bytes.
pub const DESCRIPTOR_LEN: usize = 16;
/// Where the session lies within the header, bytes.
pub const SESSION_OFFSET: usize = 8;
/// Where the lane lies within the header, bytes.
pub const LANE_OFFSET: usize = 20;
/// Where the checksum lies within the header, bytes.
pub const CHECKSUM_OFFSET: usize = 32;
/// Length of the tag behind a sealed frame, bytes: that of AES-GCM (NIST SP 800-38D) and ChaCha20-Poly1305 (RFC 8439).
pub const TAG_LEN: usize = 16;
/// Most descriptors one frame may carry: what fits the largest IP packet when all are zero runs.
pub const MAX_DESCRIPTORS: usize = 1024;

/// Most bytes that a packed payload unpacks to: 64 pages. A small frame cannot ask for endless memory.
pub const MAX_UNPACKED: usize = 64 * PAGE_SIZE;

/// What a frame is for. Zero is reserved: an all-zero buffer is never a valid frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// Pages, fragments of pages or runs of zero pages.
    Pages = 1,
    /// Padding only: proves that frames of this size cross the path (`sequence` numbers the probe).
    Probe = 2,
}

impl FrameKind {
    /// The kind behind a wire byte, or `None` for one this version does not know.
    #[inline(always)]
    pub const fn from_wire(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Pages),
            2 => Some(Self::Probe),
            _ => None,
        }
    }
}

/// What tells that a frame is as it was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Guard {
    /// CRC32C in the header: damage, but not malice. Anybody on the way can read the frame.
    Checksum = 0,
    /// Descriptors and payload are encrypted and a tag follows them, made with a key that only the two hosts have.
    Sealed = 1,
}

impl Guard {
    /// The guard behind a wire byte, or `None` for one this version does not know.
    #[inline(always)]
    pub const fn from_wire(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Checksum),
            1 => Some(Self::Sealed),
            _ => None,
        }
    }

    /// Bytes that it adds behind the payload.
    #[inline(always)]
    pub const fn trailer_len(self) -> usize {
        match self {
            Self::Checksum => 0,
            Self::Sealed => TAG_LEN,
        }
    }
}

/// How the payload of a frame is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Packing {
    /// Not at all.
    Plain = 0,
    /// As one block of LZ4 (`doc/lz4_Block_format.md` of LZ4).
    Lz4 = 1,
    /// As one frame of Zstandard (RFC 8878).
    Zstd = 2,
}

impl Packing {
    /// The packing behind a wire byte, or `None` for one this version does not know.
    #[inline(always)]
    pub const fn from_wire(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Plain),
            1 => Some(Self::Lz4),
            2 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// Why bytes are not a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireError {
    /// Fewer bytes than header, descriptors and payload need.
    Truncated,
    /// Not `XFRY`.
    BadMagic,
    /// A version other than [`VERSION`].
    BadVersion(u8),
    /// A kind this version does not know.
    BadKind(u8),
    /// A guard this version does not know.
    BadGuard(u8),
    /// A packing this version does not know.
    BadPacking(u8),
    /// A reserved field that is not zero.
    ReservedNotZero,
    /// Lengths that contradict each other or exceed their bounds.
    BadLength,
}

impl core::fmt::Display for WireError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Truncated => f.write_str("frame is shorter than its lengths say"),
            Self::BadMagic => f.write_str("frame does not begin with XFRY"),
            Self::BadVersion(v) => write!(f, "frame has version {v}, this side speaks {VERSION}"),
            Self::BadKind(k) => write!(f, "frame has unknown kind {k}"),
            Self::BadGuard(g) => write!(f, "frame has unknown guard {g}"),
            Self::BadPacking(p) => write!(f, "frame has unknown packing {p}"),
            Self::ReservedNotZero => f.write_str("a reserved field is not zero"),
            Self::BadLength => f.write_str("frame's lengths contradict each other"),
        }
    }
}

impl core::error::Error for WireError {}

/// The fixed header of every frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the frame is for.
    pub kind: FrameKind,
    /// Number of [`PageDescriptor`]s that follow, at most [`MAX_DESCRIPTORS`].
    pub descriptors: u16,
    /// Random number of the migration, agreed in the control channel.
    pub session: u64,
    /// Which pass over memory the pages belong to; within one epoch every page is sent at most once.
    pub epoch: u32,
    /// Which sender thread numbered the frame.
    pub lane: u16,
    /// Number of the frame within its epoch and lane, from 0 without gaps.
    pub sequence: u32,
    /// What guards the frame.
    pub guard: Guard,
    /// How its payload is packed.
    pub packing: Packing,
    /// Bytes between the descriptors and the tag.
    pub payload: u32,
    /// CRC32C, see the module's text; zero in a sealed frame.
    pub checksum: u32,
}

#[inline(always)]
fn le16(bytes: &[u8; HEADER_LEN], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

#[inline(always)]
fn le32(bytes: &[u8; HEADER_LEN], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

impl FrameHeader {
    /// Reads and checks a header.
    ///
    /// # Errors
    /// Every [`WireError`] but `Truncated`; lengths are checked against their bounds, not against the
    /// buffer, which this function does not see.
    #[inline(always)]
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, WireError> {
        if bytes[0] != MAGIC[0] || bytes[1] != MAGIC[1] || bytes[2] != MAGIC[2] || bytes[3] != MAGIC[3] {
            return Err(WireError::BadMagic);
        }
        if bytes[4] != VERSION {
            return Err(WireError::BadVersion(bytes[4]));
        }
        let Some(kind) = FrameKind::from_wire(bytes[5]) else {
            return Err(WireError::BadKind(bytes[5]));
        };
        let Some(guard) = Guard::from_wire(bytes[22]) else {
            return Err(WireError::BadGuard(bytes[22]));
        };
        let Some(packing) = Packing::from_wire(bytes[23]) else {
            return Err(WireError::BadPacking(bytes[23]));
        };
        if le32(bytes, 36) != 0 {
            return Err(WireError::ReservedNotZero);
        }
        let header = Self {
            kind,
            descriptors: le16(bytes, 6),
            session: u64::from_le_bytes([
                bytes[8], bytes[9], bytes[10], bytes[11], bytes[12], bytes[13], bytes[14], bytes[15],
            ]),
            epoch: le32(bytes, 16),
            lane: le16(bytes, 20),
            sequence: le32(bytes, 24),
            guard,
            packing,
            payload: le32(bytes, 28),
            checksum: le32(bytes, CHECKSUM_OFFSET),
        };
        if header.descriptors as usize > MAX_DESCRIPTORS || header.payload > u16::MAX as u32 {
            return Err(WireError::BadLength);
        }
        if matches!(guard, Guard::Sealed) && header.checksum != 0 {
            return Err(WireError::ReservedNotZero);
        }
        Ok(header)
    }

    /// The header as it goes on the wire.
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut out = [0u8; HEADER_LEN];
        out[0..4].copy_from_slice(&MAGIC);
        out[4] = VERSION;
        out[5] = self.kind as u8;
        out[6..8].copy_from_slice(&self.descriptors.to_le_bytes());
        out[8..16].copy_from_slice(&self.session.to_le_bytes());
        out[16..20].copy_from_slice(&self.epoch.to_le_bytes());
        out[20..22].copy_from_slice(&self.lane.to_le_bytes());
        out[22] = self.guard as u8;
        out[23] = self.packing as u8;
        out[24..28].copy_from_slice(&self.sequence.to_le_bytes());
        out[28..32].copy_from_slice(&self.payload.to_le_bytes());
        out[32..36].copy_from_slice(&self.checksum.to_le_bytes());
        out
    }

    /// Bytes of descriptors and payload as the header tells them.
    #[inline(always)]
    pub const fn body_len(&self) -> usize {
        self.descriptors as usize * DESCRIPTOR_LEN + self.payload as usize
    }

    /// Bytes of the whole frame as the header tells them.
    #[inline(always)]
    pub const fn frame_len(&self) -> usize {
        HEADER_LEN + self.body_len() + self.guard.trailer_len()
    }
}

/// Where the bytes of a frame belong in the guest's memory.
///
/// `page` counts [`PAGE_SIZE`] units from the start of the memory backend's file: an address that both
/// hosts share without knowing the guest-physical layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageDescriptor {
    /// `length` bytes of payload for offset `offset` of `page`; `offset + length <= PAGE_SIZE`, `length > 0`.
    Data {
        /// Index of the memory backend, in the order agreed in the control channel.
        backend: u16,
        /// Page within the backend.
        page: u64,
        /// Bytes from the start of the page.
        offset: u16,
        /// Bytes of payload, 1..=4096.
        length: u16,
    },
    /// `pages` pages from `page` on read as zero; carries no payload.
    Zero {
        /// Index of the memory backend.
        backend: u16,
        /// First page of the run.
        page: u64,
        /// Length of the run in pages, at least 1.
        pages: u32,
    },
}

const DATA: u8 = 1;
const ZERO: u8 = 2;

impl PageDescriptor {
    /// The descriptor as it goes on the wire.
    pub fn to_bytes(&self) -> [u8; DESCRIPTOR_LEN] {
        let mut out = [0u8; DESCRIPTOR_LEN];
        match *self {
            Self::Data { backend, page, offset, length } => {
                out[0..8].copy_from_slice(&page.to_le_bytes());
                out[8..10].copy_from_slice(&backend.to_le_bytes());
                out[10] = DATA;
                out[12..14].copy_from_slice(&offset.to_le_bytes());
                out[14..16].copy_from_slice(&length.to_le_bytes());
            }
            Self::Zero { backend, page, pages } => {
                out[0..8].copy_from_slice(&page.to_le_bytes());
                out[8..10].copy_from_slice(&backend.to_le_bytes());
                out[10] = ZERO;
                out[12..16].copy_from_slice(&pages.to_le_bytes());
            }
        }
        out
    }

    /// Reads and checks a descriptor.
    ///
    /// # Errors
    /// [`WireError::BadKind`], [`WireError::ReservedNotZero`], or [`WireError::BadLength`] where offset and
    /// length leave the page or a run is empty. Bounds of the backend are for the receiver to check.
    pub fn parse(bytes: &[u8; DESCRIPTOR_LEN]) -> Result<Self, WireError> {
        let [p0, p1, p2, p3, p4, p5, p6, p7, b0, b1, kind, reserved, x0, x1, x2, x3] = *bytes;
        if reserved != 0 {
            return Err(WireError::ReservedNotZero);
        }
        let page = u64::from_le_bytes([p0, p1, p2, p3, p4, p5, p6, p7]);
        let backend = u16::from_le_bytes([b0, b1]);
        match kind {
            DATA => {
                let offset = u16::from_le_bytes([x0, x1]);
                let length = u16::from_le_bytes([x2, x3]);
                if length == 0 || offset as usize + length as usize > PAGE_SIZE {
                    return Err(WireError::BadLength);
                }
                Ok(Self::Data { backend, page, offset, length })
            }
            ZERO => {
                let pages = u32::from_le_bytes([x0, x1, x2, x3]);
                if pages == 0 {
                    return Err(WireError::BadLength);
                }
                Ok(Self::Zero { backend, page, pages })
            }
            other => Err(WireError::BadKind(other)),
        }
    }

    /// Bytes of payload that belong to this descriptor.
    pub const fn payload_len(&self) -> usize {
        match self {
            Self::Data { length, .. } => *length as usize,
            Self::Zero { .. } => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> impl Strategy<Value = FrameHeader> {
        (
            prop_oneof![Just(FrameKind::Pages), Just(FrameKind::Probe)],
            0..=MAX_DESCRIPTORS as u16,
            any::<u64>(),
            any::<u32>(),
            any::<u16>(),
            any::<u32>(),
            0..=u32::from(u16::MAX),
            prop_oneof![any::<u32>().prop_map(|sum| (Guard::Checksum, sum)), Just((Guard::Sealed, 0))],
            prop_oneof![Just(Packing::Plain), Just(Packing::Lz4), Just(Packing::Zstd)],
        )
            .prop_map(
                |(kind, descriptors, session, epoch, lane, sequence, payload, (guard, checksum), packing)| {
                    FrameHeader {
                        kind,
                        descriptors,
                        session,
                        epoch,
                        lane,
                        sequence,
                        guard,
                        packing,
                        payload,
                        checksum,
                    }
                },
            )
    }

    fn descriptor() -> impl Strategy<Value = PageDescriptor> {
        let data =
            (any::<u16>(), any::<u64>(), 0..PAGE_SIZE as u16).prop_flat_map(|(backend, page, offset)| {
                (1..=PAGE_SIZE as u16 - offset).prop_map(move |length| PageDescriptor::Data {
                    backend,
                    page,
                    offset,
                    length,
                })
            });
        let zero = (any::<u16>(), any::<u64>(), 1u32..)
            .prop_map(|(backend, page, pages)| PageDescriptor::Zero { backend, page, pages });
        prop_oneof![data, zero]
    }

    proptest! {
        #[test]
        fn headers_survive_the_wire(h in header()) {
            prop_assert_eq!(FrameHeader::parse(&h.to_bytes()), Ok(h));
        }

        #[test]
        fn descriptors_survive_the_wire(d in descriptor()) {
            prop_assert_eq!(PageDescriptor::parse(&d.to_bytes()), Ok(d));
        }

        #[test]
        fn arbitrary_bytes_never_panic_and_reencode_to_themselves(bytes in any::<[u8; HEADER_LEN]>(), desc in any::<[u8; DESCRIPTOR_LEN]>()) {
            if let Ok(h) = FrameHeader::parse(&bytes) {
                prop_assert_eq!(h.to_bytes(), bytes);
            }
            if let Ok(d) = PageDescriptor::parse(&desc) {
                prop_assert_eq!(d.to_bytes(), desc);
            }
        }
    }

    #[test]
    fn zero_buffers_are_refused() {
        assert_eq!(FrameHeader::parse(&[0; HEADER_LEN]), Err(WireError::BadMagic));
        assert_eq!(PageDescriptor::parse(&[0; DESCRIPTOR_LEN]), Err(WireError::BadKind(0)));
    }

    #[test]
    fn each_field_is_checked() {
        let good = FrameHeader {
            kind: FrameKind::Pages,
            descriptors: 2,
            session: 7,
            epoch: 1,
            lane: 0,
            sequence: 9,
            guard: Guard::Sealed,
            packing: Packing::Plain,
            payload: 8192,
            checksum: 0,
        }
        .to_bytes();
        let with = |at: usize, value: u8| {
            let mut bytes = good;
            bytes[at] = value;
            FrameHeader::parse(&bytes)
        };
        assert_eq!(with(0, b'x'), Err(WireError::BadMagic));
        assert_eq!(with(4, 9), Err(WireError::BadVersion(9)));
        assert_eq!(with(5, 0), Err(WireError::BadKind(0)));
        assert_eq!(with(22, 2), Err(WireError::BadGuard(2)));
        assert_eq!(with(23, 3), Err(WireError::BadPacking(3)));
        assert_eq!(with(32, 1), Err(WireError::ReservedNotZero), "a sealed frame has no checksum");
        assert_eq!(with(39, 1), Err(WireError::ReservedNotZero));
        assert_eq!(with(7, 0xff), Err(WireError::BadLength));
        assert_eq!(with(31, 1), Err(WireError::BadLength));
    }
}
