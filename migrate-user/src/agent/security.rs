//! How this agent proves itself to others and has them prove themselves.

use std::{fmt, net::IpAddr, sync::Arc};

use serde::{Deserialize, Serialize};
use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
};

use super::{Agent, AgentConfig, AgentError, Peer};
use crate::{
    control::{self, ControlError, ControlStream, StreamChannel, split},
    migration::{Limits, Session},
    pki::{self, Certified, Identity, Keeper},
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
    /// Whether it is on the CA's list of revoked certificates, as this host has it.
    pub is_revoked: bool,
    /// How many certificates are on that list; 0 without one.
    pub revoked: usize,
    /// Why the files that are there now are not the ones in use, if they are not.
    pub problem: Option<String>,
}

/// What the agent has for it.
pub(super) struct Security {
    /// `None` with `insecure = true`.
    keeper: Option<Keeper>,
    peers: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
}

impl Security {
    /// Reads the certificates, unless the configuration says that there are none.
    pub fn load(config: &AgentConfig) -> Result<Self, AgentError> {
        let keeper = if config.insecure {
            None
        } else {
            let loaded = Keeper::open(&config.pki_dir, &config.name);
            Some(loaded.map_err(|error| AgentError::Host(error.to_string()))?)
        };
        if keeper.is_some() {
            // The library gathers entropy when it is first asked, for some 20 ms, which would be in the first migration's time.
            aws_lc_rs::rand::fill(&mut [0; 32])
                .map_err(|_| AgentError::Host("the system has no random numbers to give".into()))?;
        }
        let (peers, strangers) = PLACES;
        Ok(Self {
            keeper,
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
        Ok(split(match &self.keeper {
            Some(keeper) => control::secure_from(stream, &keeper.current(), limit).await?,
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
        let stream = match (&self.keeper, &peer.name) {
            (Some(keeper), Some(name)) => {
                control::secure_to(stream, &keeper.current(), name, Limits::of(limits.hello)).await?
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
        let identity = self.keeper.as_ref().map(Keeper::held_identity);
        preflight::control_channel(
            identity.as_ref().map(Identity::own).zip(peer).map(|(own, peer)| [own, peer]),
        )
    }

    /// The own certificate, if there is one.
    pub fn certificate(&self) -> Option<CertificateStatus> {
        let keeper = self.keeper.as_ref()?;
        let identity = keeper.held_identity();
        let own = identity.own();
        Some(CertificateStatus {
            name: own.name.clone(),
            expires: own.expires.date().to_string(),
            days_left: own.days_left(),
            ends_soon: own.ends_soon(),
            is_revoked: identity.is_revoked(),
            revoked: identity.revoked(),
            problem: keeper.problem(),
        })
    }

    /// Says when it is time for another certificate.
    pub fn warn(&self) {
        let Some(keeper) = &self.keeper else { return };
        keeper.held_identity().warn_if_revoked();
        if let Some(certificate) = self.certificate().filter(|certificate| certificate.ends_soon) {
            tracing::warn!(
                expires = certificate.expires,
                days_left = certificate.days_left,
                "this host's certificate ends, and its peers will refuse it then: issue a new one (`xferry pki issue`) and copy \
                 it here; the agent reads it by itself"
            );
        }
    }
}

/// Reads certificates anew when they change, and on SIGHUP; until the end.
///
/// # Errors
/// When the signal cannot be waited for.
pub(super) async fn keep_current(agent: Arc<Agent>) -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut asked = signal(SignalKind::hangup())?;
    let mut again = tokio::time::interval(pki::LOOK_AGAIN);
    tokio::spawn(async move {
        loop {
            let at_once = tokio::select! {
                _ = asked.recv() => true,
                _ = again.tick() => false,
            };
            match &agent.security.keeper {
                Some(keeper) if at_once => {
                    keeper.reload();
                }
                Some(keeper) => {
                    keeper.look();
                }
                None if at_once => {
                    tracing::info!("SIGHUP: with insecure = true there are no certificates to read anew");
                }
                None => {}
            }
        }
    });
    Ok(())
}

/// Whether the host with this certificate, which calls from `ip`, is the other one of a session.
pub(super) fn took_part(config: &AgentConfig, asks: &Certified, ip: IpAddr, session: &Session) -> bool {
    if let Some(name) = &session.peer_name {
        return asks.is(name);
    }
    // Begun without certificates, or by an earlier version: who has its address, now or by the configuration.
    session.peer.is_some_and(|peer| {
        let configured = config.peer_at(peer).ok().and_then(|peer| peer.name);
        peer.ip().to_canonical() == ip.to_canonical() || configured.is_some_and(|name| asks.is(&name))
    })
}

impl fmt::Display for Security {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.keeper {
            Some(_) => "control channel: TLS 1.3 with certificates",
            None => "control channel and pages are NOT encrypted, peers NOT authenticated (insecure = true)",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = r#"
name = "host-a"
[control]
listen = "10.0.0.1:4790"
[migration]
interface = "eno2"
[peers]
host-b = "10.0.0.2:4790"
"#;

    #[test]
    fn only_the_other_host_of_a_session_took_part_in_it() {
        let config = AgentConfig::parse(CONFIG).unwrap();
        let host = |name: &str| Certified { name: name.into(), expires: time::OffsetDateTime::UNIX_EPOCH };
        let (b, c) = (host("host-b"), host("host-c"));
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let mut session = Session {
            session: 1,
            id: "host-a-1".into(),
            vm: "vm".into(),
            peer: Some("10.0.0.2:4790".parse().unwrap()),
            peer_name: Some("host-b".into()),
            keep_source: false,
            ram: vec![],
        };
        assert!(took_part(&config, &b, ip("10.0.0.9"), &session), "it may call from another address");
        assert!(!took_part(&config, &c, ip("10.0.0.2"), &session), "an address proves nothing");
        session.peer_name = None;
        assert!(took_part(&config, &b, ip("10.0.0.9"), &session));
        assert!(took_part(&config, &c, ip("10.0.0.2"), &session));
        assert!(!took_part(&config, &c, ip("10.0.0.9"), &session));
        session.peer = None;
        assert!(!took_part(&config, &b, ip("10.0.0.2"), &session), "a human decides");
    }

    #[tokio::test]
    async fn strangers_do_not_take_the_places_of_peers() {
        let insecure =
            AgentConfig::parse(&CONFIG.replacen("[control]", "insecure = true\n[control]", 1)).unwrap();
        let security = Security::load(&insecure).unwrap();
        let from = |ip: &str| security.place(&insecure, ip.parse().unwrap());
        let strangers: Vec<_> = (0..PLACES.1).map(|_| from("10.0.0.66").unwrap()).collect();
        assert!(from("10.0.0.67").is_none() && from("10.0.0.2").is_some());
        drop(strangers);
        assert!(from("10.0.0.67").is_some());
        let missing = Security::load(&AgentConfig {
            pki_dir: "/nonexistent".into(),
            ..AgentConfig::parse(CONFIG).unwrap()
        });
        let error = missing.err().unwrap().to_string();
        assert!(error.contains("/nonexistent/ca.pem") && error.contains("xferry pki issue"), "{error}");
    }
}
