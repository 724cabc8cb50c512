//! How hard pages are packed.

use super::Codec;

/// A codec and how hard it tries. The source alone decides it: a destination that unpacks the codec unpacks all its methods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// LZ4: cheapest.
    Lz4,
    /// Zstandard without coding what it finds no match for: nearly as small where that does not pack anyway, and a sixth cheaper
    /// than [`Zstd`](Self::Zstd).
    ZstdFast,
    /// Zstandard as it begins to code that too. What higher levels gain is less than 5 % for at least a fifth more time
    /// (`docs/performance.md`).
    Zstd,
}

impl Method {
    /// All there are, the cheaper first.
    pub const ALL: [Self; 3] = [Self::Lz4, Self::ZstdFast, Self::Zstd];

    /// What its blocks are.
    pub const fn codec(self) -> Codec {
        match self {
            Self::Lz4 => Codec::Lz4,
            Self::ZstdFast | Self::Zstd => Codec::Zstd,
        }
    }

    /// What is done when a codec is asked for by name.
    pub const fn by_name(codec: Codec) -> Self {
        match codec {
            Codec::Lz4 => Self::Lz4,
            Codec::Zstd => Self::Zstd,
        }
    }
}
