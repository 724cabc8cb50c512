//! What two hosts agree on.

use serde::{Deserialize, Serialize};

use super::Cipher;

/// What a host wants for the pages of VMs that come and go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encryption {
    /// Encrypted, or not at all.
    Required,
    /// Encrypted where the other host does it too.
    Preferred,
    /// Not encrypted: readable and forgeable for whoever is on the migration network.
    Off,
}

impl Encryption {
    /// Name as in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Required => "required",
            Self::Preferred => "preferred",
            Self::Off => "off",
        }
    }
}

/// A host's say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Offer {
    /// Whether.
    pub encryption: Encryption,
    /// By what, the preferred first.
    pub ciphers: Vec<Cipher>,
}

/// That two hosts do not agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disagreement {
    /// One requires what the other does not do.
    Off,
    /// One requires it, and there is no cipher that both take.
    NoCipher,
}

/// By what the pages from `source` to `destination` are encrypted; `None`: not at all.
///
/// # Errors
/// [`Disagreement`].
pub fn agree(source: &Offer, destination: &Offer) -> Result<Option<Cipher>, Disagreement> {
    let either = |encryption| source.encryption == encryption || destination.encryption == encryption;
    let required = either(Encryption::Required);
    if either(Encryption::Off) {
        return if required { Err(Disagreement::Off) } else { Ok(None) };
    }
    let common = source.ciphers.iter().find(|cipher| destination.ciphers.contains(cipher));
    match common {
        None if required => Err(Disagreement::NoCipher),
        common => Ok(common.copied()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Encryption::{Off, Preferred, Required};

    fn offer(encryption: Encryption, ciphers: &[Cipher]) -> Offer {
        Offer { encryption, ciphers: ciphers.to_vec() }
    }

    #[test]
    fn required_is_never_given_up() {
        const AES: Cipher = Cipher::Aes128Gcm;
        for (source, destination, agreed) in [
            (Required, Required, Ok(Some(AES))),
            (Required, Preferred, Ok(Some(AES))),
            (Required, Off, Err(Disagreement::Off)),
            (Preferred, Preferred, Ok(Some(AES))),
            (Preferred, Off, Ok(None)),
            (Off, Off, Ok(None)),
        ] {
            for (one, other) in [(source, destination), (destination, source)] {
                assert_eq!(agree(&offer(one, &[AES]), &offer(other, &[AES])), agreed, "{one:?} {other:?}");
            }
        }
    }

    #[test]
    fn the_source_prefers_among_what_both_take() {
        use Cipher::{Aes128Gcm, Aes256Gcm, ChaCha20Poly1305};
        let all = [Aes128Gcm, Aes256Gcm, ChaCha20Poly1305];
        let with = |source: &[Cipher], destination: &[Cipher], encryption| {
            agree(&offer(encryption, source), &offer(Preferred, destination))
        };
        assert_eq!(with(&all, &[ChaCha20Poly1305, Aes256Gcm], Required), Ok(Some(Aes256Gcm)));
        assert_eq!(with(&[ChaCha20Poly1305], &all, Required), Ok(Some(ChaCha20Poly1305)));
        assert_eq!(with(&[Aes128Gcm], &[Aes256Gcm], Required), Err(Disagreement::NoCipher));
        assert_eq!(with(&[Aes128Gcm], &[Aes256Gcm], Preferred), Ok(None));
        assert_eq!(with(&[], &[], Preferred), Ok(None));
    }
}
