//! How this agent proves itself to others and has them prove themselves.

use std::{fmt, net::IpAddr, sync::Arc};

use serde::{Deserialize, Serialize};
use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
};

use super::{AgentConfig, AgentError, Peer};
use crate::{
    control::{self, ControlError, ControlStream, StreamChannel, split},
    migration::Limits,
    pki::{Certified, Identity},
    preflight::{self, Finding},
};

/// Connections at once that have not yet said who they are: from addresses of peers, and from all others together, so
/// that strangers cannot take the peers' places. Each is let go after `[limits] hello`.
const PLACES: (usize, usize) = (64, 16);

/// A control channel to another agent.
pub(super) type AgentChannel = StreamChannel<ControlStream<TcpStream>>;
/// A place among those that have not yet said who they are.
pub(super) type Place = OwnedSemaphorePermit;

/// This host's certificate, as `xferry status` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CertificateStatus {
    /// The host that it names.
    pub name: String,
    /// Its last day, as 2027-01-31 (UTC).
    pub expires: String,
    /// Whole days left; negative when it has expired.
    pub days_left: i64,
    /// Whether it is time for another.
    pub ends_soon: bool,
}

/// What the agent has for it.
pub(super) struct Security {
    /// `None` with `insecure = true`.
    identity: Option<Identity>,
    peers: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
}

impl Security {
    /// Reads the certificates, unless the configuration says that there are none.
    pub fn load(config: &AgentConfig) -> Result<Self, AgentError> {
        let identity = if config.insecure {
            None
        } else {
            let loaded = Identity::load(&config.pki_dir, &config.name);
            Some(loaded.map_err(|error| AgentError::Host(error.to_string()))?)
        };
        let (peers, strangers) = PLACES;
        Ok(Self {
            identity,
            peers: Arc::new(Semaphore::new(peers)),
            strangers: Arc::new(Semaphore::new(strangers)),
        })
    }

    /// A place for a new connection; `None` when too many wait already.
    pub fn place(&self, config: &AgentConfig, ip: IpAddr) -> Option<Place> {
        let places = if config.is_peer_address(ip) { &self.peers } else { &self.strangers };
        Arc::clone(places).try_acquire_owned().ok()
    }

    /// Secures a connection that somebody opened, within `limit`.
    pub async fn accept(
        &self,
        stream: TcpStream,
        limit: std::time::Duration,
    ) -> Result<AgentChannel, ControlError> {
        Ok(split(match &self.identity {
            Some(identity) => control::secure_from(stream, identity, limit).await?,
            None => ControlStream::Plain(stream),
        }))
    }

    /// Connects to `peer`, from `local` where given, and secures the connection.
    pub async fn connect(
        &self,
        peer: &Peer,
        local: Option<IpAddr>,
        limits: Limits,
    ) -> Result<AgentChannel, ControlError> {
        let (connect, dead_peer) = (Limits::of(limits.connect), Limits::of(limits.dead_peer));
        let stream = control::connect(peer.address, local, connect, dead_peer).await?;
        let stream = match (&self.identity, &peer.name) {
            (Some(identity), Some(name)) => {
                control::secure_to(stream, identity, name, Limits::of(limits.hello)).await?
            }
            (None, _) => ControlStream::Plain(stream),
            // The configuration names every peer where there are certificates.
            (Some(_), None) => {
                return Err(ControlError::Peer(format!(
                    "it is not known whose to expect at {}",
                    peer.address
                )));
            }
        };
        Ok(split(stream))
    }

    /// How a channel to a host with that certificate is secured.
    pub fn finding(&self, peer: Option<&Certified>) -> Finding {
        let own = self.identity.as_ref().map(Identity::own);
        preflight::control_channel(own.zip(peer).map(|(own, peer)| [own, peer]))
    }

    /// The own certificate, if there is one.
    pub fn certificate(&self) -> Option<CertificateStatus> {
        let own = self.identity.as_ref()?.own();
        Some(CertificateStatus {
            name: own.name.clone(),
            expires: own.expires.date().to_string(),
            days_left: own.days_left(),
            ends_soon: own.ends_soon(),
        })
    }

    /// Says when it is time for another certificate.
    pub fn warn(&self) {
        if let Some(certificate) = self.certificate().filter(|certificate| certificate.ends_soon) {
            tracing::warn!(
                expires = certificate.expires,
                days_left = certificate.days_left,
                "this host's certificate ends, and its peers will refuse it then: issue a new one (`xferry pki issue`) and restart \
                 the agent"
            );
        }
    }
}

impl fmt::Display for Security {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.identity {
            Some(_) => "control channel: TLS 1.3 with certificates; pages are NOT encrypted",
            None => "control channel and pages are NOT encrypted, peers NOT authenticated (insecure = true)",
        })
    }
}
