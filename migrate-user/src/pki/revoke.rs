//! The CA takes a certificate back: its list of revoked certificates (RFC 5280, section 5).

use std::path::{Path, PathBuf};

use rcgen::{CertificateRevocationListParams, KeyIdMethod, RevokedCertParams, SerialNumber};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject};
use time::OffsetDateTime;
use x509_parser::{
    prelude::{FromDer, X509Certificate},
    revocation_list::CertificateRevocationList,
};

use super::{
    CERTIFICATE_FILE, Certified, PkiError,
    authority::Authority,
    files::{read, read_optional, write},
};

/// A certificate on the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revoked {
    /// Its host.
    pub host: String,
    /// Its number, hexadecimal.
    pub serial: String,
    /// Until when it would have been valid.
    pub until: OffsetDateTime,
    /// Whether it was on the list before.
    pub before: bool,
}

/// What became of the list.
#[derive(Clone, Debug)]
pub struct RevokedList {
    /// The list.
    pub path: PathBuf,
    /// What was asked for.
    pub revoked: Vec<Revoked>,
    /// How many are on it in all.
    pub listed: usize,
}

/// Puts certificates on the list of the CA in `dir`, which is made if there is none: that in the file `what`, or all
/// that the CA has issued to the host `what`.
///
/// # Errors
/// [`PkiError`]; then the list is as it was.
pub fn revoke(dir: &Path, what: &str) -> Result<RevokedList, PkiError> {
    let authority = Authority::open(dir)?;
    let found = if what.contains('/') || Path::new(what).is_file() {
        vec![named(&authority, Path::new(what))?]
    } else {
        issued(&authority, what)?
    };
    let path = authority.revoked_path();
    let mut list = List::read(&authority, &path)?;
    let now = OffsetDateTime::now_utc();
    let mut revoked: Vec<Revoked> = Vec::new();
    for (certified, serial) in found {
        // The same one may lie in two places.
        let shown = hex(&serial);
        if revoked.iter().any(|other| other.serial == shown) {
            continue;
        }
        let before = list.entries.iter().any(|entry| entry.serial_number.as_ref() == serial);
        if !before {
            list.entries.push(entry(SerialNumber::from_slice(&serial), now));
        }
        revoked.push(Revoked { host: certified.name, serial: shown, until: certified.expires, before });
    }
    let listed = list.entries.len();
    if revoked.iter().any(|revoked| !revoked.before) {
        list.write(&authority, &path, now)?;
    }
    Ok(RevokedList { path, revoked, listed })
}

/// A number without what DER puts before it to keep it positive.
fn plain(serial: &[u8]) -> &[u8] {
    let zeros = serial.iter().take_while(|&&byte| byte == 0).count();
    serial.get(zeros..).unwrap_or_default()
}

fn hex(serial: &[u8]) -> String {
    serial.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn entry(serial_number: SerialNumber, revocation_time: OffsetDateTime) -> RevokedCertParams {
    RevokedCertParams { serial_number, revocation_time, reason_code: None, invalidity_date: None }
}

/// Whose certificate the file holds, and its number.
fn named(authority: &Authority, path: &Path) -> Result<(Certified, Vec<u8>), PkiError> {
    let invalid = |problem: String| PkiError::Invalid { path: path.to_owned(), problem };
    let content = read(path).map_err(|error| match error {
        PkiError::Missing { .. } => invalid("it is not there".into()),
        other => other,
    })?;
    let der = CertificateDer::from_pem_slice(&content)
        .map_err(|error| invalid(format!("it holds no certificate (PEM): {error}")))?;
    let certified = Certified::read(&der).map_err(invalid)?;
    let (_, parsed) = X509Certificate::from_der(&der).map_err(|error| invalid(error.to_string()))?;
    if !authority.has_issued(&parsed) {
        return Err(invalid(
            "it is not issued by this CA, which can revoke only what it has issued: name the other CA's directory by --dir"
                .into(),
        ));
    }
    Ok((certified, plain(parsed.raw_serial()).to_vec()))
}

/// All certificates that the CA has kept of a host.
fn issued(authority: &Authority, host: &str) -> Result<Vec<(Certified, Vec<u8>)>, PkiError> {
    let dir = authority.issued_dir();
    let failed = |source| PkiError::File { operation: "look into", path: dir.clone(), source };
    let mut paths = match std::fs::read_dir(&dir) {
        Ok(entries) => entries
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(failed)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(failed(error)),
    };
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "pem"));
    // Of a version that kept nothing.
    paths.extend(Some(authority.host_dir(host).join(CERTIFICATE_FILE)).filter(|path| path.is_file()));
    paths.sort();
    let mut found = Vec::new();
    for path in paths {
        // Another CA may have been here before this one.
        if let Ok((certified, serial)) = named(authority, &path)
            && certified.is(host)
        {
            found.push((certified, serial));
        }
    }
    if found.is_empty() {
        return Err(PkiError::NotIssued { host: host.to_owned(), dir });
    }
    Ok(found)
}

/// The list while it is extended.
struct List {
    entries: Vec<RevokedCertParams>,
    number: u64,
}

impl List {
    fn read(authority: &Authority, path: &Path) -> Result<Self, PkiError> {
        let invalid = |problem: String| PkiError::Invalid { path: path.to_owned(), problem };
        let Some(content) = read_optional(path)? else { return Ok(Self { entries: Vec::new(), number: 0 }) };
        let der = CertificateRevocationListDer::from_pem_slice(&content)
            .map_err(|error| invalid(format!("it holds no list (PEM): {error}")))?;
        let (_, list) =
            CertificateRevocationList::from_der(&der).map_err(|error| invalid(error.to_string()))?;
        if !authority.has_listed(&list) {
            return Err(invalid(
                "it is not this CA's list: move it away, or name the other CA by --dir".into(),
            ));
        }
        let entries = list
            .iter_revoked_certificates()
            .map(|revoked| {
                let at = revoked.revocation_date.to_datetime();
                entry(SerialNumber::from_slice(plain(revoked.raw_serial())), at)
            })
            .collect();
        let number = list.crl_number().map(|number| number.to_u64_digits());
        let number = number.and_then(|digits| digits.first().copied()).unwrap_or_default();
        Ok(Self { entries, number })
    }

    fn write(self, authority: &Authority, path: &Path, now: OffsetDateTime) -> Result<(), PkiError> {
        let make = |error: rcgen::Error| PkiError::Make(error.to_string());
        let list = CertificateRevocationListParams {
            this_update: now,
            // It holds until there is a newer one.
            next_update: authority.until,
            crl_number: SerialNumber::from(self.number + 1),
            issuing_distribution_point: None,
            revoked_certs: self.entries,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&authority.issuer).and_then(|list| list.pem()).map_err(make)?;
        write(path, &list, 0o644, true)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::*, *};

    fn ca() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), "CA", Validity::from_now(10), false).unwrap();
        dir
    }

    fn issued(ca: &Path, host: &str) -> String {
        let out = ca.join(host);
        issue(ca, host, &out, Validity::from_now(5), true).unwrap();
        out.join(CERTIFICATE_FILE).display().to_string()
    }

    #[test]
    fn a_host_by_name_and_a_certificate_by_file() {
        let ca = ca();
        let dir = ca.path();
        issued(dir, "host-a");
        issued(dir, "host-b");
        issued(dir, "host-b");
        let list = revoke(dir, "host-b").unwrap();
        assert_eq!((list.revoked.len(), list.listed), (2, 2), "{list:?}");
        assert!(list.revoked.iter().all(|revoked| revoked.host == "host-b" && !revoked.before));
        let written = std::fs::read(&list.path).unwrap();
        let again = revoke(dir, "HOST-B").unwrap();
        assert!(again.revoked.iter().all(|revoked| revoked.before) && again.listed == 2);
        assert_eq!(std::fs::read(&list.path).unwrap(), written);
        let a = issued(dir, "host-a");
        let list = revoke(dir, &a).unwrap();
        assert_eq!((list.revoked.len(), list.listed), (1, 3), "the other one of host-a is as good as ever");
        let authority = Authority::open(dir).unwrap();
        assert_eq!(List::read(&authority, &list.path).unwrap().number, 2);
    }

    #[test]
    fn hosts_before_their_certificates_were_kept() {
        let ca = ca();
        issued(ca.path(), "host-a");
        std::fs::remove_dir_all(ca.path().join(ISSUED_DIR)).unwrap();
        assert_eq!(revoke(ca.path(), "host-a").unwrap().listed, 1);
    }

    #[test]
    fn what_cannot_be_revoked() {
        let (ours, theirs) = (ca(), ca());
        let says = |what: &str, words: &[&str]| {
            let error = revoke(ours.path(), what).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{words:?} in {error}");
        };
        says("host-x", &["host-x", "issued", "FILE"]);
        says("./no/such.pem", &["not there"]);
        says(&issued(theirs.path(), "host-a"), &["agent.pem", "not issued by this CA"]);
        revoke(theirs.path(), "host-a").unwrap();
        std::fs::copy(theirs.path().join(REVOKED_FILE), ours.path().join(REVOKED_FILE)).unwrap();
        says(&issued(ours.path(), "host-a"), &["crl.pem", "not this CA's list"]);
    }
}
