//! Packing, with contexts and buffers that are made once.

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};
use migrate_common::wire::MAX_UNPACKED;
use zstd::bulk::Compressor;

use super::Method;

/// Zstandard's level of [`Method::ZstdFast`]: the highest that leaves literals as they are (`ZSTD_literalsCompressionIsDisabled`,
/// lib/compress/zstd_compress_internal.h).
const FAST_LEVEL: i32 = -1;
/// That of [`Method::Zstd`].
const LEVEL: i32 = 1;

/// Packs blocks on one thread.
pub struct Packer {
    lz4: CompressTable,
    /// By level, made when first needed: each takes a few 100 KiB.
    zstd_fast: Option<Compressor<'static>>,
    zstd: Option<Compressor<'static>>,
    /// What LZ4 may need for the largest block at worst.
    block: Vec<u8>,
}

impl Default for Packer {
    fn default() -> Self {
        Self { lz4: CompressTable::large(), zstd_fast: None, zstd: None, block: Vec::new() }
    }
}

impl Packer {
    /// Packs `plain`, at most [`MAX_UNPACKED`] bytes, into at most `room` bytes. `None` when it takes more.
    pub fn pack(&mut self, method: Method, plain: &[u8], room: usize) -> Option<&[u8]> {
        debug_assert!(plain.len() <= MAX_UNPACKED);
        if self.block.is_empty() {
            self.block.resize(get_maximum_output_size(MAX_UNPACKED), 0);
        }
        let room = room.min(self.block.len());
        let zstd = |context: &mut Option<Compressor<'static>>, level: i32, block: &mut [u8]| {
            let compressor = match context {
                Some(compressor) => compressor,
                // Only without memory is there none; pages then go as they are.
                none => none.insert(Compressor::new(level).ok()?),
            };
            compressor.compress_to_buffer(plain, block).ok()
        };
        let len = match method {
            // The safe encoder wants room for the worst case.
            Method::Lz4 => compress_into_with_table(plain, &mut self.block, &mut self.lz4).ok()?,
            Method::ZstdFast => zstd(&mut self.zstd_fast, FAST_LEVEL, &mut self.block[..room])?,
            Method::Zstd => zstd(&mut self.zstd, LEVEL, &mut self.block[..room])?,
        };
        (len <= room).then(|| &self.block[..len])
    }
}
