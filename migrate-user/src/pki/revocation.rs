//! A host's copy of the CA's list of revoked certificates.
//!
//! Only what is listed is refused. A list does not grow old: after its `nextUpdate` it goes on refusing what it lists, and
//! a CA without a list has revoked nothing. A site whose list does not reach a host in time must not lose its migrations.

use std::path::Path;

use rustls::pki_types::{CertificateDer, CertificateRevocationListDer};
use x509_parser::{
    prelude::{FromDer, X509Certificate},
    revocation_list::CertificateRevocationList,
};

use super::{
    CA_FILE, PkiError,
    files::{pem, read_optional},
};

/// Lists, each of another CA.
#[derive(Default)]
pub(super) struct Revocations {
    /// As TLS takes them.
    pub lists: Vec<CertificateRevocationListDer<'static>>,
    /// How many certificates are on them.
    pub certificates: usize,
}

impl Revocations {
    /// Reads the lists of `cas` in the file `path`, which need not be there.
    ///
    /// # Errors
    /// [`PkiError`], when it is there and cannot be used.
    pub fn read(path: &Path, cas: &[CertificateDer<'_>]) -> Result<Self, PkiError> {
        let invalid = |problem: String| PkiError::Invalid { path: path.to_owned(), problem };
        let Some(content) = read_optional(path)? else { return Ok(Self::default()) };
        let lists: Vec<CertificateRevocationListDer<'static>> = pem(path, &content, "list of a CA")?;
        let (mut certificates, mut listed) = (0, Vec::new());
        for list in &lists {
            let (_, list) = CertificateRevocationList::from_der(list)
                .map_err(|error| invalid(format!("not a list of revoked certificates: {error}")))?;
            let of = cas.iter().position(|ca| has_signed(ca, &list)).ok_or_else(|| {
                invalid(format!(
                    "its list of {:?} is not signed by a CA in {CA_FILE}: copy it anew from the CA (`xferry pki revoke`), and take lists \
                     of CAs that are gone out of it",
                    list.issuer().to_string()
                ))
            })?;
            // TLS looks at the first list of a CA and at no other.
            if listed.contains(&of) {
                return Err(invalid("it holds two lists of one CA: leave the newer one".into()));
            }
            listed.push(of);
            certificates += list.iter_revoked_certificates().count();
        }
        Ok(Self { lists, certificates })
    }
}

/// Whether a CA has signed this list.
pub(super) fn has_signed(ca: &CertificateDer<'_>, list: &CertificateRevocationList<'_>) -> bool {
    X509Certificate::from_der(ca)
        .is_ok_and(|(_, ca)| ca.subject() == list.issuer() && list.verify_signature(ca.public_key()).is_ok())
}

#[cfg(test)]
mod tests {
    use super::{super::*, *};
    use crate::pki::files::read;

    #[test]
    fn lists_that_cannot_be_meant() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [ours, theirs] = [&dirs[0], &dirs[1]].map(|dir| {
            let dir = dir.path();
            // The same name, as a CA has that was made anew.
            init(dir, "CA", Validity::from_now(10), false).unwrap();
            issue(dir, "host-a", &dir.join("a"), Validity::from_now(5), false).unwrap();
            revoke(dir, "host-a").unwrap();
            dir
        });
        let ca_path = ours.join(CA_FILE);
        let cas = pem::<CertificateDer<'static>>(&ca_path, &read(&ca_path).unwrap(), "certificate").unwrap();
        let list = |dir: &Path| std::fs::read_to_string(dir.join(REVOKED_FILE)).unwrap();
        let path = ours.join("copy.pem");
        let reading = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Revocations::read(&path, &cas)
        };
        assert_eq!(reading(&list(ours)).unwrap().certificates, 1);
        let says = |text: &str, word: &str| {
            let error = reading(text).err().unwrap().to_string();
            assert!(error.contains("copy.pem") && error.contains(word), "{word:?} in {error}");
        };
        says(&list(theirs), "not signed by a CA in ca.pem");
        says(&(list(ours) + &list(ours)), "two lists of one CA");
        says("", "no list of a CA");
        says("nonsense", "no list of a CA");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(Revocations::read(&path, &cas).unwrap().certificates, 0);
    }
}
