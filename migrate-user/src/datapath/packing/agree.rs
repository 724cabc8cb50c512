//! What two hosts agree on.

use serde::{Deserialize, Serialize};

use super::{Codec, Method};

/// Whether and how pages are to be packed, as asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// While it makes the migration faster, by the codec that does so most.
    #[default]
    Auto,
    /// Not at all.
    None,
    /// By LZ4, wherever a frame becomes smaller.
    Lz4,
    /// By Zstandard, wherever a frame becomes smaller.
    Zstd,
}

impl Compression {
    /// Name as in requests and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::None => "none",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }
}

/// What a lane may do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Packings {
    /// Pages go as they are.
    #[default]
    Never,
    /// Always by this.
    Always(Method),
    /// By one of these while it pays.
    WhenFaster(Vec<Method>),
}

/// The destination does not unpack what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the destination does not unpack {}: use --compression auto or none, or update xferry there", .0.name()
)]
pub struct NotUnpacked(pub Codec);

/// What lanes do when `wanted` was asked for and the destination unpacks `unpacked`.
///
/// # Errors
/// [`NotUnpacked`], when a codec was asked for by name.
pub fn agree(wanted: Compression, unpacked: &[Codec]) -> Result<Packings, NotUnpacked> {
    let by = |codec: Codec| match unpacked.contains(&codec) {
        true => Ok(Packings::Always(Method::by_name(codec))),
        false => Err(NotUnpacked(codec)),
    };
    match wanted {
        Compression::None => Ok(Packings::Never),
        Compression::Lz4 => by(Codec::Lz4),
        Compression::Zstd => by(Codec::Zstd),
        Compression::Auto => {
            let methods: Vec<Method> =
                Method::ALL.into_iter().filter(|method| unpacked.contains(&method.codec())).collect();
            Ok(if methods.is_empty() { Packings::Never } else { Packings::WhenFaster(methods) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_destination_unpacks() {
        use Codec::{Lz4, Zstd};
        assert_eq!(agree(Compression::Zstd, &[Lz4, Zstd]), Ok(Packings::Always(Method::Zstd)));
        assert_eq!(agree(Compression::Zstd, &[Lz4]), Err(NotUnpacked(Zstd)));
        let zstd = vec![Method::ZstdFast, Method::Zstd];
        assert_eq!(agree(Compression::Auto, &[Zstd]), Ok(Packings::WhenFaster(zstd)));
        assert_eq!(agree(Compression::Auto, &[Lz4]), Ok(Packings::WhenFaster(vec![Method::Lz4])));
        assert_eq!(agree(Compression::Auto, &[]), Ok(Packings::Never));
        assert_eq!(agree(Compression::None, &[Lz4, Zstd]), Ok(Packings::Never));
        let text = NotUnpacked(Zstd).to_string();
        assert!(text.contains("zstd") && text.contains("--compression"), "{text}");
    }
}
