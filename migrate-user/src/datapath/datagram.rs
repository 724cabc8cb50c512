//! A datagram to the data port, as it was received.

use migrate_common::{
    locate,
    wire::{FrameHeader, HEADER_LEN, SESSION_OFFSET, WireError},
};

use super::frame::Frame;
use crate::xsk::Packet;

/// A received datagram, in the pieces the kernel left it in.
pub struct Datagram<'a> {
    pieces: &'a [&'a [u8]],
    /// Where its payload begins in the first piece.
    start: usize,
    /// Length of its payload as the network says, bytes.
    len: usize,
}

impl<'a> Datagram<'a> {
    /// The datagram to `port` in an Ethernet frame, or `None` where there is none.
    pub fn in_ethernet(packet: &Packet<'a>, port: u16) -> Option<Self> {
        let pieces = packet.pieces();
        let found = locate::datagram(*pieces.first()?, port)?;
        Some(Self { pieces, start: found.payload_offset, len: found.payload_len })
    }

    /// One whose headers the kernel has taken off.
    pub fn bare(pieces: &'a [&'a [u8]]) -> Self {
        Self { pieces, start: 0, len: pieces.iter().map(|piece| piece.len()).sum() }
    }

    /// The frame's header.
    ///
    /// # Errors
    /// [`WireError`], also where the frame is not as long as the header says.
    pub fn header(&self) -> Result<FrameHeader, WireError> {
        let bytes = self.head(0).ok_or(WireError::Truncated)?;
        let header = FrameHeader::parse(&bytes)?;
        let there: usize = self.pieces.iter().map(|piece| piece.len()).sum();
        if header.frame_len() != self.len || self.start + self.len > there {
            return Err(WireError::Truncated);
        }
        Ok(header)
    }

    /// The migration that a frame says it belongs to, even if its header does not hold.
    pub fn claimed_session(&self) -> Option<u64> {
        self.head(SESSION_OFFSET).map(u64::from_le_bytes)
    }

    /// The frame with this header, whose guard held and which is not encrypted.
    pub(super) fn frame(&self, header: FrameHeader) -> Frame<'a> {
        Frame::new(header, self.pieces, self.start + HEADER_LEN)
    }

    /// What follows the header: `len` bytes from `at` on.
    pub fn behind_header(&self, at: usize, len: usize) -> Pieces<'a> {
        Pieces::new(self.pieces, self.start + HEADER_LEN + at, len)
    }

    /// `N` bytes of the first piece, where headers lie.
    fn head<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        let at = self.start + at;
        self.pieces.first()?.get(at..at + N)?.try_into().ok()
    }
}

/// The bytes `start..start + len` of a packet, piece by piece.
pub struct Pieces<'a> {
    pieces: &'a [&'a [u8]],
    skip: usize,
    left: usize,
}

impl<'a> Pieces<'a> {
    /// Nothing of what lies beyond the end.
    pub fn new(pieces: &'a [&'a [u8]], start: usize, len: usize) -> Self {
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

impl Pieces<'_> {
    /// Copies the bytes to the front of `to`, as many as fit. Returns how many.
    pub fn gather(self, to: &mut [u8]) -> usize {
        let mut at = 0;
        for piece in self {
            let len = piece.len().min(to.len() - at);
            to[at..at + len].copy_from_slice(&piece[..len]);
            at += len;
        }
        at
    }
}
