//! Whether pages are encrypted.

use super::{Check, Finding};
use crate::datapath::{Disagreement, Encryption, Offer, agree};

/// What two hosts, by name, make of each other's wishes.
pub fn page_encryption(source: (&str, &Offer), destination: (&str, &Offer)) -> Finding {
    let ((source_name, source), (destination_name, destination)) = (source, destination);
    match agree(source, destination) {
        Ok(Some(cipher)) => Finding::good(Check::PageEncryption, cipher.name()),
        Ok(None) => {
            let off = [(source_name, source), (destination_name, destination)]
                .into_iter()
                .filter(|(_, offer)| offer.encryption == Encryption::Off)
                .map(|(name, _)| name)
                .collect::<Vec<_>>();
            let why = if off.is_empty() {
                "no cipher in common".to_owned()
            } else {
                format!("off on {}", off.join(" and "))
            };
            Finding::warning(
                Check::PageEncryption,
                format!("pages are not encrypted ({why}): the migration network sees guests' memory"),
                "",
            )
        }
        Err(Disagreement::Off) => {
            let (requires, other) = match source.encryption {
                Encryption::Required => (source_name, destination_name),
                _ => (destination_name, source_name),
            };
            Finding::bad(
                Check::PageEncryption,
                format!("{requires} requires encrypted pages, {other} has them off"),
                format!(
                    "take `encryption = \"off\"` or `insecure = true` out of {other}'s configuration (with certificates in place), or \
                     set `encryption = \"preferred\"` on {requires}"
                ),
            )
        }
        Err(Disagreement::NoCipher) => {
            let of = |offer: &Offer| {
                offer.ciphers.iter().map(|cipher| cipher.name()).collect::<Vec<_>>().join(", ")
            };
            Finding::bad(
                Check::PageEncryption,
                format!(
                    "no cipher in common: {source_name} takes {}; {destination_name} takes {}",
                    of(source),
                    of(destination)
                ),
                "add one to `ciphers` on either host",
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{datapath::Cipher, preflight::Verdict};

    #[test]
    fn every_outcome_names_hosts_and_remedy() {
        let offer = |encryption, cipher| Offer { encryption, ciphers: vec![cipher] };
        let check = |source: Offer, destination: Offer| {
            page_encryption(("host-a", &source), ("host-b", &destination))
        };
        use Cipher::{Aes128Gcm, ChaCha20Poly1305};
        use Encryption::{Off, Preferred, Required};
        let good = check(offer(Required, Aes128Gcm), offer(Preferred, Aes128Gcm));
        assert_eq!((good.verdict, good.found.as_str()), (Verdict::Good, "aes-128-gcm"));
        let off = check(offer(Preferred, Aes128Gcm), offer(Off, Aes128Gcm));
        assert!(off.verdict == Verdict::Warning && off.found.contains("off on host-b"), "{off:?}");
        let refused = check(offer(Off, Aes128Gcm), offer(Required, Aes128Gcm));
        assert!(refused.refuses() && !refused.overridable, "{refused:?}");
        assert!(refused.found.contains("host-b requires encrypted pages, host-a has them off"));
        assert!(refused.remedy.contains("host-a's configuration"));
        let none = check(offer(Required, Aes128Gcm), offer(Required, ChaCha20Poly1305));
        assert!(none.refuses() && none.found.contains("host-b takes chacha20-poly1305"), "{none:?}");
    }
}
