//! A CA for a small site, or for tests.

use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::ServerName;
use time::{Duration, OffsetDateTime};

use super::{
    CA_FILE, CA_KEY_FILE, CERTIFICATE_FILE, KEY_FILE, PkiError, REVOKED_FILE,
    authority::Authority,
    files::{free, make_dir, read_optional, write},
};

/// Clocks of hosts may differ by this much.
const BEFORE: Duration = Duration::hours(1);

/// From when until when a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// From when.
    pub from: OffsetDateTime,
    /// Until when.
    pub until: OffsetDateTime,
}

impl Validity {
    /// From now, less what clocks may differ by, for `days`.
    pub fn from_now(days: u32) -> Self {
        let now = OffsetDateTime::now_utc();
        Self { from: now - BEFORE, until: now.saturating_add(Duration::days(days.into())) }
    }
}

/// A CA that was made.
#[derive(Clone, Debug)]
pub struct Made {
    /// Its certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// A host's certificate that was made.
#[derive(Clone, Debug)]
pub struct Issued {
    /// Directory with the three files.
    pub dir: PathBuf,
    /// Its end.
    pub until: OffsetDateTime,
}

/// Makes a CA in `dir`.
///
/// # Errors
/// [`PkiError`]; with `force` existing files are no reason.
pub fn init(dir: &Path, name: &str, validity: Validity, force: bool) -> Result<Made, PkiError> {
    let made = Made { certificate: dir.join(CA_FILE), key: dir.join(CA_KEY_FILE) };
    free(&[&made.certificate, &made.key], force)?;
    let mut params = params(validity, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().map_err(make)?;
    let certificate = params.self_signed(&key).map_err(make)?;
    make_dir(dir)?;
    write(&made.key, &key.serialize_pem(), 0o600, force)?;
    write(&made.certificate, &certificate.pem(), 0o644, force)?;
    Ok(made)
}

/// Makes the certificate of `host` by the CA in `dir`, and puts it, its key, the CA's certificate and its list of revoked
/// ones, if there is one, into `out`. It ends with the CA at the latest. The CA keeps a copy of it.
///
/// # Errors
/// [`PkiError`]; with `force` existing files are no reason.
pub fn issue(
    dir: &Path,
    host: &str,
    out: &Path,
    validity: Validity,
    force: bool,
) -> Result<Issued, PkiError> {
    if !matches!(ServerName::try_from(host), Ok(ServerName::DnsName(_))) {
        return Err(PkiError::HostName(host.to_owned()));
    }
    let ca = Authority::open(dir)?;
    let until = validity.until.min(ca.until);
    let mut params = params(Validity { until, ..validity }, host);
    let name = host.try_into().map_err(make)?;
    params.subject_alt_names = vec![rcgen::SanType::DnsName(name)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // An agent is both.
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    let [ca_copy, own, own_key] = [CA_FILE, CERTIFICATE_FILE, KEY_FILE].map(|file| out.join(file));
    // Its own CA may be there already.
    let same_ca = std::fs::read(&ca_copy).is_ok_and(|there| there == ca.pem);
    free(&[&own, &own_key], force)?;
    if !same_ca {
        free(&[&ca_copy], force)?;
    }
    let key = KeyPair::generate().map_err(make)?;
    let certificate = params.signed_by(&key, &ca.issuer).map_err(make)?;
    // Before anybody can have it.
    ca.remember(host, &certificate)?;
    make_dir(out)?;
    write(&own_key, &key.serialize_pem(), 0o600, force)?;
    write(&own, &certificate.pem(), 0o644, force)?;
    if !same_ca {
        write(&ca_copy, &String::from_utf8_lossy(&ca.pem), 0o644, force)?;
    }
    // A host that is new knows whom not to trust.
    if let Some(revoked) = read_optional(&ca.revoked_path())? {
        write(&out.join(REVOKED_FILE), &String::from_utf8_lossy(&revoked), 0o644, true)?;
    }
    Ok(Issued { dir: out.to_owned(), until })
}

fn make(error: rcgen::Error) -> PkiError {
    PkiError::Make(error.to_string())
}

fn params(validity: Validity, name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.not_before = validity.from;
    params.not_after = validity.until;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn nothing_is_overwritten_and_keys_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("ca");
        let made = init(&ca, "CA", Validity::from_now(10), false).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(&made.key), mode(&ca)), (0o600, 0o700));
        let before = std::fs::read(&made.key).unwrap();
        let error = init(&ca, "CA", Validity::from_now(10), false).unwrap_err().to_string();
        assert!(error.contains("--force") && std::fs::read(&made.key).unwrap() == before, "{error}");
        let out = dir.path().join("a");
        issue(&ca, "host-a", &out, Validity::from_now(5), false).unwrap();
        assert_eq!(mode(&out.join(KEY_FILE)), 0o600);
        assert!(!out.join(CA_KEY_FILE).exists(), "a host has no use for the CA's key");
        assert!(matches!(
            issue(&ca, "host-a", &out, Validity::from_now(5), false),
            Err(PkiError::Exists { .. })
        ));
        issue(&ca, "host-a", &out, Validity::from_now(5), true).unwrap();
        let again = init(&ca, "CA", Validity::from_now(10), true).unwrap();
        assert_ne!(std::fs::read(&again.key).unwrap(), before);
        // Of another CA now, and the old one is not replaced unasked.
        assert!(issue(&ca, "host-a", &out, Validity::from_now(5), false).is_err());
        assert_eq!(std::fs::read_dir(&out).unwrap().count(), 3, "nothing else is left");
    }

    #[test]
    fn a_certificate_ends_with_its_ca() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), "CA", Validity::from_now(10), false).unwrap();
        let issued = issue(dir.path(), "h", &dir.path().join("h"), Validity::from_now(90), false).unwrap();
        assert!(issued.until <= OffsetDateTime::now_utc() + Duration::days(10));
        for name in ["", "a b", "10.0.0.1", "a/../b"] {
            let made = issue(dir.path(), name, &dir.path().join("x"), Validity::from_now(1), false);
            assert!(matches!(made, Err(PkiError::HostName(_))), "{name}");
        }
        let missing = issue(&dir.path().join("no"), "h", dir.path(), Validity::from_now(1), false);
        assert!(missing.unwrap_err().to_string().contains("xferry pki init"));
    }
}
