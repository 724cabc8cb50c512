//! A frame that is as it was sent.

use migrate_common::wire::{DESCRIPTOR_LEN, FrameHeader};

use super::datagram::Pieces;

/// A frame whose guard held: header, descriptor bytes, and the pieces of its payload.
pub struct Frame<'a> {
    /// The header.
    pub header: FrameHeader,
    /// Bytes of all descriptors.
    descriptors: Vec<[u8; DESCRIPTOR_LEN]>,
    pieces: &'a [&'a [u8]],
    /// Where the payload begins in the pieces, bytes.
    payload_at: usize,
}

impl<'a> Frame<'a> {
    /// The frame whose body, descriptors first, begins `at` bytes into `pieces`; they are long enough.
    pub(super) fn new(header: FrameHeader, pieces: &'a [&'a [u8]], at: usize) -> Self {
        let mut descriptors = vec![[0; DESCRIPTOR_LEN]; header.descriptors.into()];
        let len = descriptors.as_flattened().len();
        Pieces::new(pieces, at, len).gather(descriptors.as_flattened_mut());
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
