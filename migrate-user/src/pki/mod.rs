//! Certificates of agents: the files of a host ([`Identity`], watched by a [`Keeper`]), and a small CA to make them
//! ([`init`], [`issue`]) and to take them back ([`revoke`]).
//!
//! A host has three files of fixed names in one directory: the CA's certificate, its own, and its key; and it may have the
//! CA's list of revoked certificates. Its certificate has exactly one DNS name, that by which other agents call the host;
//! there is no second name to confuse it with.

mod authority;
mod files;
mod identity;
mod issue;
mod keeper;
mod revocation;
mod revoke;

pub(crate) use identity::ALPN;
pub use identity::Identity;
pub use issue::{Issued, Made, Validity, init, issue};
pub use keeper::{Keeper, LOOK_AGAIN};
pub use revoke::{Revoked, RevokedList, revoke};

use std::path::{Path, PathBuf};

use time::OffsetDateTime;
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer, X509Certificate},
};

/// Directory of a host's files when none is configured.
pub const DEFAULT_DIR: &str = "/etc/xferry/pki";
/// Directory of the CA when none is given. Not on a host that runs VMs, if that can be had.
pub const DEFAULT_CA_DIR: &str = "/etc/xferry/ca";
/// The CA's certificate, or those of several.
pub const CA_FILE: &str = "ca.pem";
/// The CA's key, which no host needs.
pub const CA_KEY_FILE: &str = "ca.key";
/// The host's certificate, with what leads to the CA's, if anything.
pub const CERTIFICATE_FILE: &str = "agent.pem";
/// The host's key.
pub const KEY_FILE: &str = "agent.key";
/// The CA's list of revoked certificates, or those of several; it need not be there.
pub const REVOKED_FILE: &str = "crl.pem";
/// Directory of the certificates that a CA has issued, beside its own.
const ISSUED_DIR: &str = "issued";
/// So many days before a certificate's end its host begins to warn.
pub const WARN_DAYS: i64 = 30;

/// What is wrong with certificates or keys.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file is not there.
    #[error(
        "there is no {}: make certificates for both hosts (`xferry pki init`, `xferry pki issue HOST`) and copy this host's files \
         to {}, or say insecure = true to run without, on a network that nobody else can reach",
        path.display(),
        path.parent().unwrap_or(Path::new(".")).display()
    )]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A file cannot be read or written.
    #[error("cannot {operation} {}: {source}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A key that others can read.
    #[error(
        "others can read the key {} (mode {mode:04o}): `chmod 600` it, and issue a new one if somebody may have read it",
        path.display()
    )]
    Exposed {
        /// The key.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// A file's content is of no use.
    #[error("{} cannot be used: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// A name that no certificate can have.
    #[error(
        "{0:?} cannot be a host's name in a certificate: use letters, digits, hyphens and dots, as in DNS"
    )]
    HostName(String),
    /// A file is there already.
    #[error("{} is there already, and is left as it is: --force replaces it", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A host that has no certificate.
    #[error(
        "this CA has issued no certificate to {host:?} that is kept in {}: name the certificate's FILE (agent.pem of that host)",
        dir.display()
    )]
    NotIssued {
        /// The host.
        host: String,
        /// Where they are kept.
        dir: PathBuf,
    },
    /// A certificate cannot be made.
    #[error("cannot make a certificate, or a list of them: {0}")]
    Make(String),
}

/// What a certificate says about its host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certified {
    /// The host, in lower case.
    pub name: String,
    /// Until when.
    pub expires: OffsetDateTime,
}

impl Certified {
    /// Reads a certificate (DER).
    ///
    /// # Errors
    /// A sentence when it is no certificate, or not of exactly one host.
    pub fn read(der: &[u8]) -> Result<Self, String> {
        let (_, certificate) =
            X509Certificate::from_der(der).map_err(|error| format!("not an X.509 certificate: {error}"))?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|error| format!("its subject alternative name is not understood: {error}"))?;
        let hosts: Vec<&str> = names
            .iter()
            .flat_map(|names| &names.value.general_names)
            .filter_map(|name| match name {
                GeneralName::DNSName(host) => Some(*host),
                _ => None,
            })
            .collect();
        let [host] = hosts[..] else {
            return Err(format!(
                "it has {} DNS names ({}), and an agent's certificate has exactly one, the host's: issue one that has",
                hosts.len(),
                hosts.join(", ")
            ));
        };
        Ok(Self { name: host.to_ascii_lowercase(), expires: certificate.validity().not_after.to_datetime() })
    }

    /// Whether it is the certificate of `host`. DNS names have no case (RFC 4343).
    pub fn is(&self, host: &str) -> bool {
        self.name.eq_ignore_ascii_case(host)
    }

    /// Whole days that are left; negative when it has expired.
    pub fn days_left(&self) -> i64 {
        (self.expires - OffsetDateTime::now_utc()).whole_seconds().div_euclid(24 * 3600)
    }

    /// Whether it is time for another.
    pub fn ends_soon(&self) -> bool {
        self.days_left() < WARN_DAYS
    }
}
