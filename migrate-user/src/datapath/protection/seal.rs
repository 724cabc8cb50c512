//! The sending side: what completes a frame.

use aws_lc_rs::aead::{Aad, Nonce};
use migrate_common::wire::{CHECKSUM_OFFSET, FrameHeader, Guard, HEADER_LEN};

use super::{Cipher, Protection};
use crate::{
    checksum::{Crc32c, crc32c},
    datapath::path::FramePath,
};

/// Two frames of a lane with the same number, or in the wrong order. A nonce used twice would give the guest's memory away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("frame {sequence} of round {epoch} was about to be sealed out of order")]
pub struct NonceReused {
    epoch: u32,
    sequence: u32,
}

/// Completes the frames of one lane.
pub struct Sealer {
    protection: Protection,
    /// Epoch and number of the last sealed frame.
    last: Option<(u32, u32)>,
}

impl Sealer {
    /// For the frames of one lane; no other sealer may have the same key and lane.
    pub const fn new(protection: Protection) -> Self {
        Self { protection, last: None }
    }

    /// Completes a frame whose descriptors and payload are already in `buffer`, behind the headers: writes headers,
    /// encrypts, and adds what guards it. `header.guard` and `header.checksum` are set here. Returns its length with
    /// `path`'s headers, bytes.
    ///
    /// # Errors
    /// [`NonceReused`] when the frame is not numbered above the last one of its lane, by epoch and sequence.
    pub fn complete(
        &mut self,
        buffer: &mut [u8],
        path: &FramePath,
        header: FrameHeader,
    ) -> Result<usize, NonceReused> {
        self.complete_with(buffer, path, header, &[])
    }

    /// Whether [`complete_with`](Self::complete_with) spares a copy: the library encrypts from elsewhere as fast as in place with AES alone.
    pub fn spares_a_copy(&self) -> bool {
        matches!(&self.protection, Protection::Sealed(key) if key.cipher() != Cipher::ChaCha20Poly1305)
    }

    /// The same of a frame whose payload lies elsewhere: only its descriptors are in `buffer`. Whoever holds `payload` may change it
    /// meanwhile: what is sealed is what each byte was at one moment.
    ///
    /// # Errors
    /// As [`complete`](Self::complete).
    pub fn complete_with(
        &mut self,
        buffer: &mut [u8],
        path: &FramePath,
        mut header: FrameHeader,
        payload: &[u8],
    ) -> Result<usize, NonceReused> {
        header.guard = self.protection.guard();
        header.checksum = 0;
        let start = path.len();
        let end = start + header.frame_len();
        let head = header.to_bytes();
        path.write(buffer, header.frame_len());
        let frame = &mut buffer[start..end];
        frame[..HEADER_LEN].copy_from_slice(&head);
        match &self.protection {
            Protection::Checksum => {
                let missing = frame.len() - payload.len();
                frame[missing..].copy_from_slice(payload);
                let checksum = crc32c(frame);
                frame[CHECKSUM_OFFSET..CHECKSUM_OFFSET + 4].copy_from_slice(&checksum.to_le_bytes());
            }
            Protection::Sealed(key) => {
                let (epoch, sequence) = (header.epoch, header.sequence);
                let reused = NonceReused { epoch, sequence };
                if self.last.is_some_and(|last| (epoch, sequence) <= last) {
                    return Err(reused);
                }
                self.last = Some((epoch, sequence));
                let (body, rest) = frame[HEADER_LEN..].split_at_mut(header.body_len() - payload.len());
                let nonce = Nonce::assume_unique_for_key(nonce(&header));
                // The library refuses only bodies of gigabytes.
                key.key
                    .seal_in_place_scatter(nonce, Aad::from(&head), body, payload, rest)
                    .map_err(|_| reused)?;
            }
        }
        Ok(end)
    }
}

/// Completes the head of a frame whose payload lies elsewhere and stays as it is: `head` has room for `path`'s headers and the
/// frame's, and the descriptors behind them; `payload` goes on with a sum over the payload. So guarded by a checksum:
/// a sealed frame's payload would have to be written. Returns the head's length, bytes.
pub fn complete_apart(
    head: &mut [u8],
    path: &FramePath,
    mut header: FrameHeader,
    payload: impl FnOnce(&mut Crc32c),
) -> usize {
    header.guard = Guard::Checksum;
    header.checksum = 0;
    let start = path.len();
    let end = start + header.frame_len() - header.payload as usize;
    path.write(head, header.frame_len());
    let frame = &mut head[start..end];
    frame[..HEADER_LEN].copy_from_slice(&header.to_bytes());
    let mut sum = Crc32c::new();
    sum.update(frame);
    payload(&mut sum);
    frame[CHECKSUM_OFFSET..CHECKSUM_OFFSET + 4].copy_from_slice(&sum.value().to_le_bytes());
    end
}

/// A frame's own number under the key of its migration: lane (2 bytes), kind (1), 0, epoch (4), sequence (4), all
/// little-endian. Within a lane the [`Sealer`] never goes back, and every lane has one.
pub(super) fn nonce(header: &FrameHeader) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[0..2].copy_from_slice(&header.lane.to_le_bytes());
    nonce[2] = header.kind as u8;
    nonce[4..8].copy_from_slice(&header.epoch.to_le_bytes());
    nonce[8..12].copy_from_slice(&header.sequence.to_le_bytes());
    nonce
}
