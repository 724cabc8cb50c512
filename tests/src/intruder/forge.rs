//! Forged frames of a migration that was sniffed. All that need not be secret is right in them: session, epoch, lane, addresses,
//! lengths, checksum. The one place that has to follow the stream's format, as far as its own encoders do not.

use migrate_common::PAGE_SIZE;
use migrate_common::wire::{CHECKSUM_OFFSET, FrameHeader, HEADER_LEN, PageDescriptor};

use super::Sniffed;

/// Fields of the header that are reserved, or say how a frame is protected.
const RESERVED: [std::ops::Range<usize>; 2] = [22..24, 36..40];
/// Where a feedback datagram says how far the receiver got, and how many frames came.
const SEEN: std::ops::Range<usize> = 20..24;
const RECEIVED: std::ops::Range<usize> = 24..28;

/// A migration's page stream as the intruder knows it.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    /// Header of a frame of it.
    pub header: FrameHeader,
}

impl Stream {
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
            ..self.header
        };
        let mut frame = header.to_bytes().to_vec();
        descriptors.iter().for_each(|descriptor| frame.extend(descriptor.to_bytes()));
        frame.extend(payload);
        seal(&mut frame);
        frame
    }

    /// The same frame saying that nothing protects it.
    pub fn unprotected(mut frame: Vec<u8>) -> Vec<u8> {
        RESERVED.into_iter().for_each(|field| frame[field].fill(0));
        seal(&mut frame);
        frame
    }

    /// A sniffed frame with one byte of it changed, behind the header or in it, and the checksum put right.
    pub fn changed(sniffed: &Sniffed, at: usize) -> Vec<u8> {
        let mut frame = sniffed.payload().to_vec();
        let at = at % frame.len();
        frame[at] ^= 0x40;
        seal(&mut frame);
        frame
    }

    /// A sniffed feedback datagram's payload that says more.
    pub fn feedback(sniffed: &Sniffed, seen: u32) -> Vec<u8> {
        let mut datagram = sniffed.payload().to_vec();
        datagram[SEEN].copy_from_slice(&seen.to_le_bytes());
        datagram[RECEIVED].copy_from_slice(&seen.to_le_bytes());
        datagram
    }
}

/// Puts the checksum right: CRC32C over all with the field itself zero.
fn seal(frame: &mut [u8]) {
    if frame.len() < HEADER_LEN {
        return;
    }
    let field = CHECKSUM_OFFSET..CHECKSUM_OFFSET + 4;
    frame[field.clone()].fill(0);
    let sum = crc32c::crc32c(frame);
    frame[field].copy_from_slice(&sum.to_le_bytes());
}
