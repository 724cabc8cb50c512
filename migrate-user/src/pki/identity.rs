//! The files of a host.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustls::{
    CertificateError, ClientConfig, RootCertStore, ServerConfig,
    client::{Resumption, WebPkiServerVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject},
    server::{
        NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier, danger::ClientCertVerifier,
    },
    version::TLS13,
};

use super::{
    CA_FILE, CERTIFICATE_FILE, Certified, KEY_FILE, PkiError, REVOKED_FILE,
    files::{pem, read, read_key},
    revocation::Revocations,
};

/// What is spoken inside (RFC 7301): another service's connections cannot be turned here.
pub(crate) const ALPN: &[u8] = b"xferry";

/// What a host shows of itself, and what it wants to see of others. TLS 1.3 only, no tickets: each connection proves
/// itself anew, so that a certificate's end is its end.
#[derive(Clone)]
pub struct Identity {
    own: Certified,
    /// How many certificates are on the lists of revoked ones.
    revoked: usize,
    /// Whether the own one is among them.
    is_revoked: bool,
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
        Self::read(dir, name, |own| {
            // As a peer with the same CA will see it, on a day when it is valid.
            let valid_at = u64::try_from(own.expires.unix_timestamp()).unwrap_or_default().saturating_sub(1);
            UnixTime::since_unix_epoch(Duration::from_secs(valid_at))
        })
    }

    /// The same where there are others already: these must be valid now.
    ///
    /// # Errors
    /// [`PkiError`], with what to do.
    pub fn renew(dir: &Path, name: &str) -> Result<Self, PkiError> {
        Self::read(dir, name, |_| UnixTime::now())
    }

    /// Reads the files, which are to be valid at a time.
    fn read(dir: &Path, name: &str, at: impl FnOnce(&Certified) -> UnixTime) -> Result<Self, PkiError> {
        let path = |file| dir.join(file);
        let (ca_path, own_path, key_path) = (path(CA_FILE), path(CERTIFICATE_FILE), path(KEY_FILE));
        let cas: Vec<CertificateDer<'static>> = pem(&ca_path, &read(&ca_path)?, "certificate")?;
        let chain: Vec<CertificateDer<'static>> = pem(&own_path, &read(&own_path)?, "certificate")?;
        let key = key(&key_path)?;
        let revoked_path = path(REVOKED_FILE);
        let revocations = Revocations::read(&revoked_path, &cas)?;
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
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let unlisted = |error: VerifierBuilderError| invalid(&revoked_path, error.to_string());
        let lists = || revocations.lists.iter().cloned();
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            // Who asks is not told whom this host trusts.
            .clear_root_hint_subjects()
            .with_crls(lists())
            .allow_unknown_revocation_status()
            .build()
            .map_err(unlisted)?;
        let servers = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .with_crls(lists())
            .allow_unknown_revocation_status()
            .build()
            .map_err(unlisted)?;
        let is_revoked = accepted(clients.as_ref(), &chain, at(&own))
            .map_err(|problem| invalid(&own_path, format!("peers would not accept it: {problem}")))?;
        let unfit = |error: rustls::Error| match error {
            rustls::Error::InconsistentKeys(_) => {
                invalid(&key_path, format!("it is not the key of {CERTIFICATE_FILE}"))
            }
            other => invalid(&own_path, other.to_string()),
        };
        let mut server = ServerConfig::builder_with_provider(Arc::<CryptoProvider>::clone(&provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(unfit)?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(unfit)?;
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.alpn_protocols = vec![ALPN.to_vec()];
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(unfit)?
            .with_webpki_verifier(servers)
            .with_client_auth_cert(chain, key)
            .map_err(unfit)?;
        client.resumption = Resumption::disabled();
        client.alpn_protocols = vec![ALPN.to_vec()];
        let revoked = revocations.certificates;
        Ok(Self { own, revoked, is_revoked, client: Arc::new(client), server: Arc::new(server) })
    }

    /// What the own certificate says.
    pub const fn own(&self) -> &Certified {
        &self.own
    }

    /// How many certificates are on the CA's list of revoked ones, as far as this host has it.
    pub const fn revoked(&self) -> usize {
        self.revoked
    }

    /// Whether the own certificate is on that list: peers that have it refuse it.
    pub const fn is_revoked(&self) -> bool {
        self.is_revoked
    }

    /// Says in the log when it is.
    pub fn warn_if_revoked(&self) {
        if self.is_revoked {
            tracing::warn!("this host's own certificate is on the list of revoked ones: peers refuse it");
        }
    }

    pub(crate) fn client(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.client)
    }

    pub(crate) fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }
}

/// Whether the first of `chain`, which others would accept at a time, is on the list of revoked ones.
///
/// # Errors
/// Why they would not.
fn accepted(
    verifier: &dyn ClientCertVerifier,
    chain: &[CertificateDer<'static>],
    at: UnixTime,
) -> Result<bool, String> {
    let Some((leaf, others)) = chain.split_first() else { return Err("it is empty".into()) };
    let problem = match verifier.verify_client_cert(leaf, others, at) {
        Ok(_) => return Ok(false),
        Err(rustls::Error::InvalidCertificate(problem)) => problem,
        Err(other) => return Err(other.to_string()),
    };
    match problem {
        CertificateError::Revoked => Ok(true),
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            Err("it has expired: issue a new one, or set the clock".into())
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            Err("it is not valid yet: set the clock, or wait".into())
        }
        other => Err(format!("{other}: is it issued by the CA in {CA_FILE}?")),
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
