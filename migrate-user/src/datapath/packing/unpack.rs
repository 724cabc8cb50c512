//! Unpacking what came from the network.

use migrate_common::wire::MAX_UNPACKED;
use zstd::bulk::Decompressor;

use super::Codec;

/// Unpacks blocks on one thread, beside the guest's memory: nothing of a block reaches it that does not unpack as it should.
#[derive(Default)]
pub struct Unpacker {
    zstd: Option<Decompressor<'static>>,
    packed: Vec<u8>,
    plain: Vec<u8>,
}

impl Unpacker {
    /// Unpacks a block, which came in `pieces`, that must unpack to exactly `len` bytes. `None` when it does not, or when
    /// `len` is 0 or above [`MAX_UNPACKED`].
    pub fn unpack<'a>(
        &mut self,
        codec: Codec,
        pieces: impl Iterator<Item = &'a [u8]>,
        len: usize,
    ) -> Option<&[u8]> {
        if len == 0 || len > MAX_UNPACKED {
            return None;
        }
        self.packed.clear();
        pieces.for_each(|piece| self.packed.extend_from_slice(piece));
        self.plain.resize(self.plain.len().max(len), 0);
        let plain = &mut self.plain[..len];
        let unpacked = match codec {
            Codec::Lz4 => lz4_flex::block::decompress_into(&self.packed, plain).ok()?,
            Codec::Zstd => {
                let decompressor = match &mut self.zstd {
                    Some(decompressor) => decompressor,
                    none => none.insert(Decompressor::new().ok()?),
                };
                decompressor.decompress_to_buffer(&self.packed, plain).ok()?
            }
        };
        (unpacked == len).then_some(&*plain)
    }
}

#[cfg(test)]
mod tests {
    use migrate_common::PAGE_SIZE;
    use proptest::prelude::*;

    use super::super::{Method, Packer};
    use super::*;

    /// Bytes that pack to about a third.
    fn text(len: usize) -> Vec<u8> {
        (0..len).map(|at| if at % 3 == 0 { (at * at / 7) as u8 } else { 7 }).collect()
    }

    #[test]
    fn blocks_come_out_as_they_went_in() {
        let (mut packer, mut unpacker) = (Packer::default(), Unpacker::default());
        for method in Method::ALL {
            let codec = method.codec();
            for pages in [1, 2, 7, 15, 16, 64, 1] {
                let plain = text(pages * PAGE_SIZE);
                let packed = packer.pack(method, &plain, usize::MAX).unwrap().to_vec();
                assert!(packed.len() < plain.len(), "{method:?}, {pages} pages: {}", packed.len());
                let pieces = || packed.chunks(1000);
                assert_eq!(unpacker.unpack(codec, pieces(), plain.len()), Some(plain.as_slice()));
                assert_eq!(unpacker.unpack(codec, pieces(), plain.len() - 1), None, "too many bytes");
                assert_eq!(
                    unpacker.unpack(codec, pieces(), (plain.len() + 1).min(MAX_UNPACKED + 1)),
                    None,
                    "too few bytes"
                );
                assert_eq!(packer.pack(method, &plain, packed.len() - 1), None, "no room");
            }
            assert_eq!(unpacker.unpack(codec, [].into_iter(), PAGE_SIZE), None);
            assert_eq!(unpacker.unpack(codec, [].into_iter(), 0), None);
        }
    }

    proptest! {
        #[test]
        fn what_is_no_block_is_refused_and_never_panics(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
            flips in proptest::collection::vec((any::<u16>(), any::<u8>()), 0..4),
            zstd: bool,
        ) {
            let codec = if zstd { Codec::Zstd } else { Codec::Lz4 };
            let mut unpacker = Unpacker::default();
            let _ = unpacker.unpack(codec, bytes.chunks(64), 3 * PAGE_SIZE);
            let plain = text(3 * PAGE_SIZE);
            let mut packed = Packer::default().pack(Method::by_name(codec), &plain, usize::MAX).unwrap().to_vec();
            for (at, bits) in flips {
                let at = usize::from(at) % packed.len();
                packed[at] ^= bits;
            }
            if let Some(unpacked) = unpacker.unpack(codec, packed.chunks(999), plain.len()) {
                prop_assert_eq!(unpacked.len(), plain.len());
            }
        }
    }
}
