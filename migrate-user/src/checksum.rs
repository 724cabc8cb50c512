//! CRC32C (Castagnoli; RFC 3385 names it for iSCSI).

use crc_fast::{CrcAlgorithm, Digest};

/// Of one piece.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// Of pieces, as they come.
#[derive(Clone)]
pub struct Crc32c(Digest);

impl Crc32c {
    /// Of nothing yet.
    pub fn new() -> Self {
        Self(Digest::new(CrcAlgorithm::Crc32Iscsi))
    }

    /// Goes on with `bytes`.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Of all so far.
    pub fn value(&self) -> u32 {
        // A CRC of 32 bits, in the type of the widest.
        self.0.finalize() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 3720, B.4.
    #[test]
    fn the_standard_s_examples() {
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c(&ascending), 0x46dd_794e);
    }

    #[test]
    fn pieces_add_up() {
        let bytes: Vec<u8> = (0..10_000u32).map(|n| (n * 7 + n / 256) as u8).collect();
        for cut in [0, 1, 40, 72, 3840, 9_999] {
            let mut sum = Crc32c::new();
            sum.update(&bytes[..cut]);
            sum.update(&bytes[cut..]);
            assert_eq!(sum.value(), crc32c(&bytes), "cut at {cut}");
        }
    }
}
