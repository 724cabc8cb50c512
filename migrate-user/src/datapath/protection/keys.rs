//! Keys of one migration.

use std::sync::Arc;

use aws_lc_rs::{
    aead::{self, LessSafeKey, UnboundKey},
    error::Unspecified,
    hkdf, hmac,
};
use zeroize::Zeroizing;

use super::Cipher;

/// Purpose of the pages' key, part of what it is derived from.
const PAGES: &[u8] = b"xferry pages ";
/// The same for feedback.
const FEEDBACK: &[u8] = b"xferry feedback";

/// That the cryptographic library made no key.
#[derive(Debug, thiserror::Error)]
#[error("no key for the page stream could be made")]
pub struct KeyError;

impl From<Unspecified> for KeyError {
    fn from(_: Unspecified) -> Self {
        Self
    }
}

/// What both agents of a migration know and nobody else does: 32 bytes exported by TLS. Wiped when dropped.
#[derive(Clone)]
pub struct Secret(Zeroizing<[u8; 32]>);

impl Secret {
    /// Takes it over.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The key for pages of migration `session`.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn page_key(&self, session: u64, cipher: Cipher) -> Result<PageKey, KeyError> {
        let algorithm = match cipher {
            Cipher::Aes128Gcm => &aead::AES_128_GCM,
            Cipher::Aes256Gcm => &aead::AES_256_GCM,
            Cipher::ChaCha20Poly1305 => &aead::CHACHA20_POLY1305,
        };
        // 32 bytes are the longest key of the three.
        let mut bytes = Zeroizing::new([0; 32]);
        let key = &mut bytes[..algorithm.key_len()];
        self.derive(session, &[PAGES, cipher.name().as_bytes()], key)?;
        Ok(PageKey { cipher, key: LessSafeKey::new(UnboundKey::new(algorithm, key)?) })
    }

    /// The key for feedback of migration `session`.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn feedback_key(&self, session: u64) -> Result<FeedbackKey, KeyError> {
        let mut key = Zeroizing::new([0; 32]);
        self.derive(session, &[FEEDBACK, b""], &mut key[..])?;
        Ok(FeedbackKey(hmac::Key::new(hmac::HMAC_SHA256, &key[..])))
    }

    /// HKDF-SHA256 (RFC 5869): no salt, `purpose` and session number as info.
    fn derive(&self, session: u64, purpose: &[&[u8]; 2], out: &mut [u8]) -> Result<(), KeyError> {
        struct Len(usize);
        impl hkdf::KeyType for Len {
            fn len(&self) -> usize {
                self.0
            }
        }
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, &[]).extract(&self.0[..]);
        let session = session.to_be_bytes();
        let info = [purpose[0], purpose[1], &session];
        prk.expand(&info, Len(out.len()))?.fill(out)?;
        Ok(())
    }
}

/// A key for the pages of one migration. The library wipes it when it is dropped.
pub struct PageKey {
    pub(super) cipher: Cipher,
    pub(super) key: LessSafeKey,
}

impl PageKey {
    /// What it is a key of.
    pub const fn cipher(&self) -> Cipher {
        self.cipher
    }
}

/// Length of the code behind a datagram of feedback, bytes: half of HMAC-SHA256 (RFC 2104, section 5).
pub const CODE_LEN: usize = 16;

/// A key that proves feedback to be the other agent's.
pub struct FeedbackKey(hmac::Key);

impl FeedbackKey {
    /// That of migration `session`, where the two agents have a secret.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn agreed(secret: Option<&Secret>, session: u64) -> Result<Option<Arc<Self>>, KeyError> {
        secret.map(|secret| secret.feedback_key(session).map(Arc::new)).transpose()
    }

    /// The code of a datagram.
    pub fn code(&self, datagram: &[u8]) -> [u8; CODE_LEN] {
        let tag = hmac::sign(&self.0, datagram);
        let mut code = [0; CODE_LEN];
        code.copy_from_slice(&tag.as_ref()[..CODE_LEN]);
        code
    }

    /// Whether a datagram has that code.
    pub fn proves(&self, datagram: &[u8], code: &[u8; CODE_LEN]) -> bool {
        // In constant time: how much of a guess was right is not told.
        aws_lc_rs::constant_time::verify_slices_are_equal(&self.code(datagram), code).is_ok()
    }
}
