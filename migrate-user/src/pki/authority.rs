//! A CA in its directory, with its key.

use std::path::{Path, PathBuf};

use rcgen::{Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use time::OffsetDateTime;
use x509_parser::{
    prelude::{FromDer, X509Certificate},
    revocation_list::CertificateRevocationList,
};

use super::{
    CA_FILE, CA_KEY_FILE, ISSUED_DIR, PkiError, REVOKED_FILE,
    files::{make_dir, read, read_key, write},
    revocation::has_signed,
};

/// A CA that can sign.
pub(super) struct Authority {
    dir: PathBuf,
    /// Its certificate as it lies there.
    pub pem: Vec<u8>,
    der: CertificateDer<'static>,
    /// What signs.
    pub issuer: Issuer<'static, KeyPair>,
    /// Its end.
    pub until: OffsetDateTime,
}

impl Authority {
    /// Opens the CA in `dir`.
    ///
    /// # Errors
    /// [`PkiError`]: no CA there, a key of another, or one whose time is over.
    pub fn open(dir: &Path) -> Result<Self, PkiError> {
        let (ca_path, key_path) = (dir.join(CA_FILE), dir.join(CA_KEY_FILE));
        let no_ca = |error: PkiError| match error {
            PkiError::Missing { path } => PkiError::Invalid {
                path,
                problem: "it is not there: `xferry pki init --name NAME` makes a CA".into(),
            },
            other => other,
        };
        let pem = read(&ca_path).map_err(no_ca)?;
        let key = read_key(&key_path).map_err(no_ca)?;
        let invalid = |path: &Path, problem: String| PkiError::Invalid { path: path.to_owned(), problem };
        let der =
            CertificateDer::from_pem_slice(&pem).map_err(|error| invalid(&ca_path, error.to_string()))?;
        let key = std::str::from_utf8(&key).map_err(|error| invalid(&key_path, error.to_string()))?;
        let key = KeyPair::from_pem(key).map_err(|error| invalid(&key_path, error.to_string()))?;
        let (_, parsed) =
            X509Certificate::from_der(&der).map_err(|error| invalid(&ca_path, error.to_string()))?;
        if !parsed.is_ca() {
            return Err(invalid(&ca_path, "it is not the certificate of a CA".into()));
        }
        if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
            return Err(invalid(&key_path, format!("it is not the key of {CA_FILE}")));
        }
        let until = parsed.validity().not_after.to_datetime();
        if until <= OffsetDateTime::now_utc() {
            return Err(invalid(
                &ca_path,
                "the CA has expired: `xferry pki init --force` makes another".into(),
            ));
        }
        let issuer =
            Issuer::from_ca_cert_der(&der, key).map_err(|error| PkiError::Make(error.to_string()))?;
        Ok(Self { dir: dir.to_owned(), pem, der, issuer, until })
    }

    /// Its list of revoked certificates, which may not be there yet.
    pub fn revoked_path(&self) -> PathBuf {
        self.dir.join(REVOKED_FILE)
    }

    /// Where it keeps what it has issued.
    pub fn issued_dir(&self) -> PathBuf {
        self.dir.join(ISSUED_DIR)
    }

    /// Where the files of a host are, unless they were put somewhere else.
    pub fn host_dir(&self, host: &str) -> PathBuf {
        self.dir.join(host)
    }

    /// Keeps a certificate that was issued, so that it can be revoked by its host's name.
    pub fn remember(&self, host: &str, certificate: &rcgen::Certificate) -> Result<(), PkiError> {
        let (_, parsed) = X509Certificate::from_der(certificate.der())
            .map_err(|error| PkiError::Make(error.to_string()))?;
        let path = self.issued_dir().join(format!("{host}-{:x}.pem", parsed.tbs_certificate.serial));
        make_dir(&self.issued_dir())?;
        write(&path, &certificate.pem(), 0o644, true)
    }

    /// Whether it has signed this certificate.
    pub fn has_issued(&self, certificate: &X509Certificate<'_>) -> bool {
        // It was read when the CA was opened, so it can be read.
        X509Certificate::from_der(&self.der).is_ok_and(|(_, ca)| {
            certificate.issuer() == ca.subject()
                && certificate.verify_signature(Some(ca.public_key())).is_ok()
        })
    }

    /// Whether it has signed this list.
    pub fn has_listed(&self, list: &CertificateRevocationList<'_>) -> bool {
        has_signed(&self.der, list)
    }
}
