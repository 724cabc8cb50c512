//! What keeps frames as they were sent: a checksum, or encryption with a tag.
//!
//! Keys are made for one migration from a secret that only the two agents have ([`Secret`]), and are wiped when the last
//! lane, worker or feedback socket of it is gone. Every frame has a nonce of its own, made of its kind, lane, epoch and number;
//! the [`Sealer`] refuses to use one twice.

mod agree;
mod keys;
mod open;
mod seal;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use migrate_common::wire::Guard;
use serde::{Deserialize, Serialize};

pub use agree::{Disagreement, Encryption, Offer, agree};
pub use keys::{CODE_LEN, FeedbackKey, KeyError, PageKey, Secret};
pub use open::{Opener, Unproved};
pub(super) use seal::complete_apart;
pub use seal::{NonceReused, Sealer};

/// How pages may be encrypted. All three are AEADs with a nonce of 12 bytes and a tag of 16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cipher {
    /// AES-128 in Galois/Counter Mode (NIST SP 800-38D).
    #[serde(rename = "aes-128-gcm")]
    Aes128Gcm,
    /// The same with a key of 256 bits.
    #[serde(rename = "aes-256-gcm")]
    Aes256Gcm,
    /// ChaCha20-Poly1305 (RFC 8439).
    #[serde(rename = "chacha20-poly1305")]
    ChaCha20Poly1305,
}

impl Cipher {
    /// Name as in configuration and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Aes128Gcm => "aes-128-gcm",
            Self::Aes256Gcm => "aes-256-gcm",
            Self::ChaCha20Poly1305 => "chacha20-poly1305",
        }
    }

    /// What this host takes when its configuration says nothing, the fastest first: without instructions for AES only what
    /// is fast without them, and safe against caches being watched.
    pub fn preferred() -> Vec<Self> {
        if has_aes() {
            vec![Self::Aes128Gcm, Self::Aes256Gcm, Self::ChaCha20Poly1305]
        } else {
            vec![Self::ChaCha20Poly1305]
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn has_aes() -> bool {
    std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_aes() -> bool {
    cfg!(target_feature = "aes")
}

/// How the frames of one migration are guarded.
#[derive(Clone, Default)]
pub enum Protection {
    /// By CRC32C against damage.
    #[default]
    Checksum,
    /// By an AEAD against readers and forgers too.
    Sealed(Arc<PageKey>),
}

impl Protection {
    /// What two agents agreed on for migration `session`, by the secret that they share.
    ///
    /// # Errors
    /// [`KeyError`], also where there is a cipher and no secret.
    pub fn agreed(cipher: Option<Cipher>, secret: Option<&Secret>, session: u64) -> Result<Self, KeyError> {
        let Some(cipher) = cipher else { return Ok(Self::Checksum) };
        let secret = secret.ok_or(KeyError)?;
        Ok(Self::Sealed(Arc::new(secret.page_key(session, cipher)?)))
    }

    /// As a frame says it.
    pub const fn guard(&self) -> Guard {
        match self {
            Self::Checksum => Guard::Checksum,
            Self::Sealed(_) => Guard::Sealed,
        }
    }
}
