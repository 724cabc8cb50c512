//! The files of a host.

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    version::TLS13,
};

use super::{CA_FILE, CERTIFICATE_FILE, Certified, KEY_FILE, PkiError};

/// What is spoken inside (RFC 7301): another service's connections cannot be turned here.
pub(crate) const ALPN: &[u8] = b"xferry";
/// Largest file that is read, bytes.
const MAX_FILE: u64 = 1 << 20;

/// What a host shows of itself, and what it wants to see of others. TLS 1.3 only, no tickets: each connection proves
/// itself anew, so that a certificate's end is its end.
#[derive(Clone)]
pub struct Identity {
    own: Certified,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("own", &self.own).finish_non_exhaustive()
    }
}

impl Identity {
    /// Reads the files in `dir` of the host `name`. A certificate that has expired is taken: the agent must run to
    /// settle what concerns only this host, and its peers will refuse it.
    ///
    /// # Errors
    /// [`PkiError`], with what to do.
    pub fn load(dir: &Path, name: &str) -> Result<Self, PkiError> {
        let path = |file| dir.join(file);
        let (ca_path, own_path, key_path) = (path(CA_FILE), path(CERTIFICATE_FILE), path(KEY_FILE));
        let cas = certificates(&ca_path)?;
        let chain = certificates(&own_path)?;
        let key = key(&key_path)?;
        let invalid = |path: &PathBuf, problem: String| PkiError::Invalid { path: path.clone(), problem };
        let leaf = chain.first().ok_or_else(|| invalid(&own_path, "it is empty".into()))?.clone();
        let own = Certified::read(&leaf).map_err(|problem| invalid(&own_path, problem))?;
        if !own.is(name) {
            return Err(invalid(
                &own_path,
                format!(
                    "it is the certificate of {:?}, and this host's name is {name:?}: issue one for it, or correct `name`",
                    own.name
                ),
            ));
        }
        let mut roots = RootCertStore::empty();
        for ca in cas {
            roots
                .add(ca)
                .map_err(|error| invalid(&ca_path, format!("it is no CA's certificate: {error}")))?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            // Who asks is not told whom this host trusts.
            .clear_root_hint_subjects()
            .build()
            .map_err(|error| invalid(&ca_path, error.to_string()))?;
        // As a peer with the same CA will see it, on a day when it is valid.
        let valid_at = u64::try_from(own.expires.unix_timestamp()).unwrap_or_default().saturating_sub(1);
        let at = UnixTime::since_unix_epoch(std::time::Duration::from_secs(valid_at));
        verifier.verify_client_cert(&leaf, chain.get(1..).unwrap_or_default(), at).map_err(|error| {
            invalid(
                &own_path,
                format!("peers would not accept it ({error}): is it issued by the CA in {CA_FILE}?"),
            )
        })?;
        let unfit = |error: rustls::Error| match error {
            rustls::Error::InconsistentKeys(_) => {
                invalid(&key_path, format!("it is not the key of {CERTIFICATE_FILE}"))
            }
            other => invalid(&own_path, other.to_string()),
        };
        let mut server = ServerConfig::builder_with_provider(Arc::<CryptoProvider>::clone(&provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(unfit)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(unfit)?;
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.alpn_protocols = vec![ALPN.to_vec()];
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(unfit)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(unfit)?;
        client.resumption = Resumption::disabled();
        client.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Self { own, client: Arc::new(client), server: Arc::new(server) })
    }

    /// What the own certificate says.
    pub const fn own(&self) -> &Certified {
        &self.own
    }

    pub(crate) fn client(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.client)
    }

    pub(crate) fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }
}

/// The content of a file that must be there.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, PkiError> {
    let failed = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::NotFound => PkiError::Missing { path: path.to_owned() },
        _ => PkiError::File { operation: "read", path: path.to_owned(), source },
    };
    if std::fs::metadata(path).map_err(failed)?.len() > MAX_FILE {
        return Err(PkiError::Invalid { path: path.to_owned(), problem: "it is too large".into() });
    }
    std::fs::read(path).map_err(failed)
}

/// The content of a key's file, which nobody but its owner may read.
pub(super) fn read_key(path: &Path) -> Result<Vec<u8>, PkiError> {
    let content = read(path)?;
    let metadata = std::fs::metadata(path).map_err(|source| PkiError::File {
        operation: "look at",
        path: path.to_owned(),
        source,
    })?;
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(PkiError::Exposed { path: path.to_owned(), mode });
    }
    Ok(content)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, PkiError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => {
            Err(PkiError::Invalid { path: path.to_owned(), problem: "it holds no certificate (PEM)".into() })
        }
        Err(error) => Err(PkiError::Invalid { path: path.to_owned(), problem: error.to_string() }),
    }
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, PkiError> {
    PrivateKeyDer::from_pem_slice(&read_key(path)?).map_err(|error| PkiError::Invalid {
        path: path.to_owned(),
        problem: format!("it holds no private key (PEM): {error}"),
    })
}

#[cfg(test)]
mod tests {
    use super::{super::*, *};
    use std::os::unix::fs::PermissionsExt;

    fn made() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), "Test CA", Validity::from_now(10), false).unwrap();
        issue(dir.path(), "host-a", &dir.path().join("a"), Validity::from_now(5), false).unwrap();
        dir
    }

    #[test]
    fn files_that_were_issued_are_good() {
        let dir = made();
        let identity = Identity::load(&dir.path().join("a"), "host-a").unwrap();
        assert_eq!(identity.own().name, "host-a");
        assert_eq!(identity.own().days_left(), 4);
        assert!(identity.own().ends_soon() && identity.own().is("HOST-A"));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_file() {
        let dir = made();
        let a = dir.path().join("a");
        let says = |words: &[&str]| {
            let error = Identity::load(&a, "host-a").unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{words:?} in {error}");
        };
        let wrong = Identity::load(&a, "host-c").unwrap_err().to_string();
        assert!(wrong.contains("\"host-a\"") && wrong.contains("\"host-c\""), "{wrong}");
        let key = a.join(KEY_FILE);
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
        says(&["agent.key", "0640", "chmod 600"]);
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
        issue(dir.path(), "host-b", &dir.path().join("b"), Validity::from_now(5), false).unwrap();
        let own = std::fs::read(&key).unwrap();
        std::fs::copy(dir.path().join("b").join(KEY_FILE), &key).unwrap();
        says(&["agent.key", "not the key of agent.pem"]);
        std::fs::write(&key, &own).unwrap();
        let other = made();
        std::fs::copy(other.path().join(CA_FILE), a.join(CA_FILE)).unwrap();
        says(&["agent.pem", "issued by the CA in ca.pem"]);
        std::fs::write(a.join(CA_FILE), "nonsense").unwrap();
        says(&["ca.pem", "no certificate"]);
        std::fs::remove_file(a.join(CA_FILE)).unwrap();
        says(&["ca.pem", "xferry pki issue", "insecure = true"]);
    }
}
