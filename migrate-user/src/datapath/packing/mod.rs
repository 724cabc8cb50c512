//! Fewer bytes for the same pages: all pages of a frame as one compressed block.
//!
//! A whole frame is one block, so that pages share what they have in common, and as many pages are packed as fill the frame
//! ([`Fill`]). Whether packing pays, and by what method, is decided by each lane for itself, from what it measures ([`Auto`]).

mod agree;
mod auto;
mod fill;
mod method;
mod pack;
mod sample;
mod unpack;

use migrate_common::wire::Packing;
use serde::{Deserialize, Serialize};

pub use agree::{Compression, NotUnpacked, Packings, agree};
pub use auto::{Auto, Work};
pub use fill::Fill;
pub use method::Method;
pub use pack::Packer;
pub use sample::Sample;
pub use unpack::Unpacker;

/// A way of packing pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Codec {
    /// LZ4: cheap.
    Lz4,
    /// Zstandard: packs better, at several times the cost.
    Zstd,
}

impl Codec {
    /// All that this version packs and unpacks.
    pub const ALL: [Self; 2] = [Self::Lz4, Self::Zstd];

    /// Name as in requests and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    /// As a frame says it.
    pub const fn packing(self) -> Packing {
        match self {
            Self::Lz4 => Packing::Lz4,
            Self::Zstd => Packing::Zstd,
        }
    }

    /// What a frame says; `None` for a plain one.
    pub const fn of(packing: Packing) -> Option<Self> {
        match packing {
            Packing::Plain => None,
            Packing::Lz4 => Some(Self::Lz4),
            Packing::Zstd => Some(Self::Zstd),
        }
    }
}
