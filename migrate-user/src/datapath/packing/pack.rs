//! Packing, with contexts and buffers that are made once.

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};
use migrate_common::wire::MAX_UNPACKED;
use zstd::bulk::Compressor;

use super::Codec;

/// Zstandard's level: the higher ones cost several times as much for a few per cent (`docs/performance.md`).
const ZSTD_LEVEL: i32 = 1;

/// Packs blocks on one thread.
pub struct Packer {
    lz4: CompressTable,
    /// Made when first needed: it takes a few 100 KiB.
    zstd: Option<Compressor<'static>>,
    /// What LZ4 may need for the largest block at worst.
    block: Vec<u8>,
}

impl Default for Packer {
    fn default() -> Self {
        Self { lz4: CompressTable::large(), zstd: None, block: Vec::new() }
    }
}

impl Packer {
    /// Packs `plain`, at most [`MAX_UNPACKED`] bytes, into at most `room` bytes. `None` when it takes more.
    pub fn pack(&mut self, codec: Codec, plain: &[u8], room: usize) -> Option<&[u8]> {
        debug_assert!(plain.len() <= MAX_UNPACKED);
        if self.block.is_empty() {
            self.block.resize(get_maximum_output_size(MAX_UNPACKED), 0);
        }
        let room = room.min(self.block.len());
        let len = match codec {
            // The safe encoder wants room for the worst case.
            Codec::Lz4 => compress_into_with_table(plain, &mut self.block, &mut self.lz4).ok()?,
            Codec::Zstd => {
                let compressor = match &mut self.zstd {
                    Some(compressor) => compressor,
                    // Only without memory is there none; pages then go as they are.
                    none => none.insert(Compressor::new(ZSTD_LEVEL).ok()?),
                };
                compressor.compress_to_buffer(plain, &mut self.block[..room]).ok()?
            }
        };
        (len <= room).then(|| &self.block[..len])
    }
}
