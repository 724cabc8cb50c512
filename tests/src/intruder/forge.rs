//! Forged frames of a migration that was sniffed. All that need not be secret is right in them: session, epoch, lane, addresses,
//! lengths, checksum. The one place that has to follow the stream's format, as far as its own encoders do not.

use migrate_common::PAGE_SIZE;
use migrate_common::wire::{CHECKSUM_OFFSET, FrameHeader, Guard, HEADER_LEN, Packing, PageDescriptor};

use super::Sniffed;

/// Where a feedback datagram says how far the receiver got, and how many frames came; both are 32 bits, little-endian.
const SEEN: std::ops::Range<usize> = 20..24;
const RECEIVED: std::ops::Range<usize> = 24..28;
/// What stands for a tag that cannot be made.
const NO_TAG: u8 = 0xa7;

/// A migration's page stream as the intruder knows it.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    /// Header of a frame of it.
    pub header: FrameHeader,
}

impl Stream {
    /// The same stream as if nothing but the checksum guarded its frames.
    #[must_use]
    pub fn unsealed(mut self) -> Self {
        self.header.guard = Guard::Checksum;
        self
    }

    /// A frame that puts `content` into whole pages of the first memory backend. `sequence` is its number in the epoch
    /// of [`Self::header`].
    pub fn pages(&self, pages: &[u64], content: u8, sequence: u32) -> Vec<u8> {
        let page = |page| PageDescriptor::Data { backend: 0, page, offset: 0, length: PAGE_SIZE as u16 };
        let descriptors: Vec<_> = pages.iter().copied().map(page).collect();
        self.frame(&descriptors, &vec![content; pages.len() * PAGE_SIZE], sequence)
    }

    /// A frame that clears `pages` pages from `first` on.
    pub fn zeros(&self, first: u64, pages: u32, sequence: u32) -> Vec<u8> {
        self.frame(&[PageDescriptor::Zero { backend: 0, page: first, pages }], &[], sequence)
    }

    fn frame(&self, descriptors: &[PageDescriptor], payload: &[u8], sequence: u32) -> Vec<u8> {
        let header = FrameHeader {
            descriptors: descriptors.len() as u16,
            payload: payload.len() as u32,
            sequence,
            checksum: 0,
            packing: Packing::Plain,
            ..self.header
        };
        let mut frame = header.to_bytes().to_vec();
        descriptors.iter().for_each(|descriptor| frame.extend(descriptor.to_bytes()));
        frame.extend(payload);
        frame.resize(header.frame_len(), NO_TAG);
        mend(&mut frame, header.guard);
        frame
    }

    /// A sniffed frame with one bit of it changed, in whatever part, and its checksum put right if it has one.
    pub fn changed(&self, sniffed: &Sniffed, at: usize) -> Vec<u8> {
        let mut frame = sniffed.payload().to_vec();
        let at = at % frame.len();
        frame[at] ^= 0x01;
        mend(&mut frame, self.header.guard);
        frame
    }

    /// A sniffed feedback datagram's payload that says something else, and the same without what follows it.
    pub fn feedback(sniffed: &Sniffed, seen: u32) -> [Vec<u8>; 2] {
        let mut datagram = sniffed.payload().to_vec();
        datagram[SEEN].copy_from_slice(&seen.to_le_bytes());
        datagram[RECEIVED].copy_from_slice(&seen.to_le_bytes());
        let bare = datagram[..RECEIVED.end].to_vec();
        [datagram, bare]
    }
}

/// Puts the checksum of a frame that has one right: CRC32C over all with the field itself zero.
fn mend(frame: &mut [u8], guard: Guard) {
    if guard != Guard::Checksum || frame.len() < HEADER_LEN {
        return;
    }
    let field = CHECKSUM_OFFSET..CHECKSUM_OFFSET + 4;
    frame[field.clone()].fill(0);
    let sum = crc32c::crc32c(frame);
    frame[field].copy_from_slice(&sum.to_le_bytes());
}
