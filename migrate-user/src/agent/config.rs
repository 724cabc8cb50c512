//! The agent's configuration file.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, ToSocketAddrs},
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{migration::Limits, network::AnnounceSchedule};

/// Port of the control channel when an address has none.
pub const CONTROL_PORT: u16 = 4790;
/// UDP port of the page stream when none is configured.
const DATA_PORT: u16 = 4791;

/// An agent's configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct AgentConfig {
    /// Name of this host, as other agents and operators call it.
    pub name: String,
    /// Unix socket of the agent's API.
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    /// Where reports are kept.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// VM definitions, one TOML file each.
    #[serde(default = "default_vms_dir")]
    pub vms_dir: PathBuf,
    /// That nothing is encrypted and nobody authenticated. There is no other mode yet, and it must be said.
    #[serde(default)]
    pub insecure: bool,
    /// The control channel.
    pub control: ControlConfig,
    /// The migration NIC.
    pub migration: MigrationConfig,
    /// Other hosts by name: address and port of their control channel.
    #[serde(default)]
    pub peers: BTreeMap<String, String>,
    /// When RARP frames are repeated, ms.
    #[serde(default)]
    pub announce: AnnounceSchedule,
    /// Time limits, s.
    #[serde(default)]
    pub limits: Limits,
    /// What VMs that arrive may take.
    #[serde(default)]
    pub admission: AdmissionConfig,
}

/// `[admission]`: the destination's own say, which `--force` does not override.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct AdmissionConfig {
    /// VMs that may arrive at once; any number when not given.
    pub max_arriving: Option<u32>,
    /// Memory that stays with the host beside all VMs, MiB.
    pub memory_headroom_mib: u64,
}

impl Default for AdmissionConfig {
    fn default() -> Self {
        Self { max_arriving: None, memory_headroom_mib: 64 }
    }
}

/// `[control]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControlConfig {
    /// Address that other agents connect to.
    pub listen: SocketAddr,
}

/// `[migration]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct MigrationConfig {
    /// The dedicated NIC.
    pub interface: String,
    /// UDP port of the page stream.
    #[serde(default = "default_data_port")]
    pub port: u16,
    /// Queues to use at most; all of the NIC's when not given.
    pub queues: Option<u32>,
}

fn default_socket() -> PathBuf {
    crate::DEFAULT_SOCKET.into()
}

fn default_state_dir() -> PathBuf {
    "/var/lib/xferry".into()
}

fn default_vms_dir() -> PathBuf {
    "/etc/xferry/vms".into()
}

const fn default_data_port() -> u16 {
    DATA_PORT
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The content is wrong.
    #[error("{}: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A host that is not configured and not an address.
    #[error(
        "host {name:?} is not known: add it under [peers] ({known}), or give an address like 10.0.0.2:{CONTROL_PORT}"
    )]
    UnknownPeer {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
}

impl AgentConfig {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text).map_err(|problem| ConfigError::Invalid { path: path.to_owned(), problem })
    }

    /// Reads a text.
    ///
    /// # Errors
    /// A sentence about what is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let config: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        if !config.insecure {
            return Err("this version has no encryption and no authentication yet: say insecure = true to run it on a network \
                        that nobody else can reach"
                .into());
        }
        if config.name.is_empty() {
            return Err("name is empty: give this host's name".into());
        }
        if let Err(problem) = config.limits.check() {
            return Err(format!("[limits] {problem}"));
        }
        if let Err(problem) = config.announce.check() {
            return Err(format!("[announce] {problem}"));
        }
        if config.migration.port == 0 {
            return Err("[migration] port is 0: give a UDP port".into());
        }
        Ok(config)
    }

    /// The control address of host `name`, which may also be an address itself.
    ///
    /// # Errors
    /// [`ConfigError::UnknownPeer`].
    pub fn peer(&self, name: &str) -> Result<SocketAddr, ConfigError> {
        let text = self.peers.get(name).map_or(name, String::as_str);
        let resolved = text.parse::<SocketAddr>().ok().or_else(|| {
            let ip = text.parse().ok()?;
            Some(SocketAddr::new(ip, CONTROL_PORT))
        });
        let resolve = || text.to_socket_addrs().ok()?.next();
        resolved.or_else(resolve).ok_or_else(|| ConfigError::UnknownPeer {
            name: name.to_owned(),
            known: if self.peers.is_empty() {
                "none is configured".into()
            } else {
                let names: Vec<&str> = self.peers.keys().map(String::as_str).collect();
                format!("configured are {}", names.join(", "))
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
name = "host-a"
insecure = true
[control]
listen = "10.0.0.1:4790"
[migration]
interface = "eno2"
[peers]
host-b = "10.0.0.2:4790"
[announce]
rounds = 9
[limits]
round = 3
[admission]
max-arriving = 2
"#;

    #[test]
    fn reads_with_defaults() {
        let config = AgentConfig::parse(GOOD).unwrap();
        assert_eq!(config.migration.port, DATA_PORT);
        assert_eq!((config.announce.rounds, config.announce.initial), (9, 50));
        assert_eq!((config.limits.round, config.limits.hello), (3, 5));
        assert_eq!(config.admission, AdmissionConfig { max_arriving: Some(2), ..AdmissionConfig::default() });
    }

    #[test]
    fn peers_by_name_or_address() {
        let config = AgentConfig::parse(GOOD).unwrap();
        assert_eq!(config.peer("host-b").unwrap(), "10.0.0.2:4790".parse().unwrap());
        assert_eq!(config.peer("192.0.2.7").unwrap(), "192.0.2.7:4790".parse().unwrap());
        assert_eq!(config.peer("192.0.2.7:1").unwrap(), "192.0.2.7:1".parse().unwrap());
        let error = config.peer("host-c").unwrap_err().to_string();
        assert!(error.contains("configured are host-b"), "{error}");
    }

    #[test]
    fn mistakes_are_named() {
        let problem = |from: &str, to: &str| AgentConfig::parse(&GOOD.replace(from, to)).unwrap_err();
        assert!(problem("insecure = true", "").contains("insecure = true"));
        assert!(problem("interface", "interfase").contains("interfase"));
        assert!(problem("10.0.0.1:4790", "10.0.0.1").contains("listen"));
        assert!(problem("round = 3", "round = 0").contains("round is 0"));
        assert!(problem("round = 3", &format!("round = {}", i64::MAX)).contains("30 days"));
        assert!(problem("rounds = 9", "rounds = 4000000000").contains("at most 1000"));
        assert!(problem("rounds = 9", &format!("step = {}", i64::MAX)).contains("step is"));
    }
}
