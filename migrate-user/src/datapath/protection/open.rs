//! The receiving side: what is believed of a frame.

use aws_lc_rs::aead::{Aad, Nonce};
use migrate_common::wire::{CHECKSUM_OFFSET, FrameHeader, HEADER_LEN, TAG_LEN};

use super::{Protection, seal::nonce};
use crate::{
    checksum::Crc32c,
    datapath::{datagram::Datagram, frame::Frame},
};

/// Why a frame is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unproved {
    /// Its checksum does not match: it changed on the way.
    Corrupt,
    /// It is not sealed though it should be, or its tag does not match: forged, or changed on the way.
    BadTag,
}

/// Checks the frames of one migration on one thread.
#[derive(Default)]
pub struct Opener {
    protection: Protection,
    /// A sealed frame's body as it came, and decrypted. Nothing of a frame reaches the guest before its tag was checked.
    sealed: Vec<u8>,
    plain: Vec<u8>,
}

impl Opener {
    /// For frames guarded like this.
    pub const fn new(protection: Protection) -> Self {
        Self { protection, sealed: Vec::new(), plain: Vec::new() }
    }

    /// Gives the frame to `use_it` if its guard holds.
    ///
    /// # Errors
    /// [`Unproved`].
    pub fn open<T>(
        &mut self,
        datagram: &Datagram<'_>,
        header: FrameHeader,
        use_it: impl FnOnce(&Frame<'_>) -> T,
    ) -> Result<T, Unproved> {
        let as_agreed = header.guard == self.protection.guard();
        match &self.protection {
            Protection::Checksum => {
                // Sealed without reason, nobody can open it.
                if !as_agreed || checksum(datagram, &header) != header.checksum {
                    return Err(Unproved::Corrupt);
                }
                Ok(use_it(&datagram.frame(header)))
            }
            Protection::Sealed(_) if !as_agreed => Err(Unproved::BadTag),
            Protection::Sealed(key) => {
                let len = header.body_len();
                let Self { sealed, plain, .. } = self;
                plain.resize(plain.len().max(len), 0);
                let plain = &mut plain[..len];
                let mut pieces = datagram.behind_header(0, len + TAG_LEN);
                let whole = match pieces.next() {
                    Some(first) if first.len() == len + TAG_LEN => first,
                    first => {
                        sealed.resize(sealed.len().max(len + TAG_LEN), 0);
                        let at = first.map_or(0, <[u8]>::len);
                        sealed[..at].copy_from_slice(first.unwrap_or_default());
                        pieces.gather(&mut sealed[at..len + TAG_LEN]);
                        &sealed[..len + TAG_LEN]
                    }
                };
                let (body, tag) = whole.split_at(len);
                let nonce = Nonce::assume_unique_for_key(nonce(&header));
                let opened =
                    key.key.open_separate_gather(nonce, Aad::from(header.to_bytes()), body, tag, plain);
                opened.map_err(|_| Unproved::BadTag)?;
                Ok(use_it(&Frame::new(header, &[&*plain], 0)))
            }
        }
    }
}

fn checksum(datagram: &Datagram<'_>, header: &FrameHeader) -> u32 {
    // What was parsed is written the same way again; the checksum's own field counts as zero.
    let mut head: [u8; HEADER_LEN] = header.to_bytes();
    head[CHECKSUM_OFFSET..CHECKSUM_OFFSET + 4].fill(0);
    let mut sum = Crc32c::new();
    sum.update(&head);
    datagram.behind_header(0, header.body_len()).for_each(|piece| sum.update(piece));
    sum.value()
}
