//! A frame that is as it was sent.

use std::borrow::Cow;

use migrate_common::wire::{DESCRIPTOR_LEN, FrameHeader};

use super::datagram::Pieces;

/// A frame whose guard held: header, descriptor bytes, and the pieces of its payload.
pub struct Frame<'a> {
    /// The header.
    pub header: FrameHeader,
    /// Bytes of all descriptors: as they came, where that is in one piece.
    descriptors: Cow<'a, [[u8; DESCRIPTOR_LEN]]>,
    pieces: &'a [&'a [u8]],
    /// Where the payload begins in the pieces, bytes.
    payload_at: usize,
}

impl<'a> Frame<'a> {
    /// The frame whose body, descriptors first, begins `at` bytes into `pieces`; they are long enough.
    pub(super) fn new(header: FrameHeader, pieces: &'a [&'a [u8]], at: usize) -> Self {
        let len = usize::from(header.descriptors) * DESCRIPTOR_LEN;
        let descriptors = match Pieces::new(pieces, at, len).next() {
            Some(whole) if whole.len() == len => Cow::Borrowed(whole.as_chunks().0),
            _ => {
                let mut gathered = vec![[0; DESCRIPTOR_LEN]; header.descriptors.into()];
                Pieces::new(pieces, at, len).gather(gathered.as_flattened_mut());
                Cow::Owned(gathered)
            }
        };
        Self { header, descriptors, pieces, payload_at: at + len }
    }

    /// The descriptors' bytes, in order.
    pub fn descriptors(&self) -> &[[u8; DESCRIPTOR_LEN]] {
        &self.descriptors
    }

    /// `len` bytes of payload from `at` on, in the pieces they arrived in.
    pub fn payload(&self, at: usize, len: usize) -> Pieces<'a> {
        Pieces::new(self.pieces, self.payload_at + at, len)
    }
}
