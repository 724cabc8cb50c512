//! The agent's configuration file.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr, ToSocketAddrs},
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::socket::SocketGroup;
use crate::{
    cpus::CpuList,
    datapath::{Cipher, Encryption, Offer},
    files::{self, MAX_CONFIG},
    migration::Limits,
    network::{AnnounceSchedule, Nic},
};

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
    /// Group whose members may use it, beside root; `xferry`, if there is one, when not given.
    pub socket_group: Option<SocketGroup>,
    /// Where reports are kept.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// VM definitions, one TOML file each.
    #[serde(default = "default_vms_dir")]
    pub vms_dir: PathBuf,
    /// That nothing is encrypted and nobody authenticated: no certificates are read.
    #[serde(default)]
    pub insecure: bool,
    /// Directory of this host's certificate and key, and of the CA's certificate.
    #[serde(default = "default_pki_dir")]
    pub pki_dir: PathBuf,
    /// Whether pages are encrypted; [`AgentConfig::pages`] says what holds when nothing is said.
    pub encryption: Option<Encryption>,
    /// By what, the preferred first.
    #[serde(default = "Cipher::preferred")]
    pub ciphers: Vec<Cipher>,
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
    /// Which hosts may do what.
    #[serde(default)]
    pub allow: AllowConfig,
}

/// `[allow]`: hosts by the names in their certificates; all configured peers where nothing is said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AllowConfig {
    /// Who may send VMs to this host.
    pub send: Option<Vec<String>>,
    /// To whom this host may give VMs.
    pub receive: Option<Vec<String>>,
}

/// Where another agent is, and who must be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its control address.
    pub address: SocketAddr,
    /// The host whose certificate it must show; `None` where nobody shows one.
    pub name: Option<String>,
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
    /// Channels that the NIC is given for as long as the agent runs; as many as it has when not given.
    pub channels: Option<u32>,
    /// Processors for the threads that move pages; those of the NIC's node when not given.
    pub cpus: Option<CpuList>,
    /// By what frames get on and off the NIC.
    #[serde(default)]
    pub transport: TransportChoice,
    /// How pages of VMs that leave get into frames.
    #[serde(default)]
    pub sending: SendingChoice,
}

/// `sending` of `[migration]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SendingChoice {
    /// Direct where that can be had and the driver reads the UMEM itself, else staged.
    #[default]
    Auto,
    /// Pages are copied into the UMEM.
    Staged,
    /// The guest's RAM is part of the UMEM and pages are sent from where they lie; staged where that cannot be had.
    Direct,
}

/// `transport` of `[migration]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TransportChoice {
    /// AF_XDP where the driver has zero-copy for it, else UDP sockets.
    #[default]
    Auto,
    /// AF_XDP or nothing.
    AfXdp,
    /// UDP sockets.
    Udp,
}

impl MigrationConfig {
    /// How many queues of `nic` are used.
    pub fn queues_of(&self, nic: &Nic) -> u32 {
        nic.queues.min(self.queues.unwrap_or(u32::MAX)).clamp(1, migrate_common::maps::MAX_QUEUES)
    }
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

fn default_pki_dir() -> PathBuf {
    crate::pki::DEFAULT_DIR.into()
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
    /// An address of which it is not said who is there.
    #[error(
        "{address} is the address of no configured peer, so it is not known whose certificate to expect there: add it under [peers] \
         with the host's name, as in host-b = \"{address}\""
    )]
    Nameless {
        /// The address.
        address: SocketAddr,
    },
    /// A host that may not do what is asked for.
    #[error("{host} may not {act} (named are {allowed}): add it to [allow] {setting} on {here} if it should")]
    NotAllowed {
        /// This host.
        here: String,
        /// The other.
        host: String,
        /// What it may not.
        act: &'static str,
        /// The setting that says so.
        setting: &'static str,
        /// Who may.
        allowed: String,
    },
}

impl AgentConfig {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = files::read_text(path, MAX_CONFIG)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text).map_err(|problem| ConfigError::Invalid { path: path.to_owned(), problem })
    }

    /// Reads a text.
    ///
    /// # Errors
    /// A sentence about what is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let config: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        if config.insecure && config.allow != AllowConfig::default() {
            return Err("[allow] goes by certificates, and with insecure = true there are none: take one of the two away".into());
        }
        if config.insecure && config.encryption == Some(Encryption::Required) {
            return Err("encryption is required, and with insecure = true there is no key for it: take one of the two away".into());
        }
        if config.ciphers.is_empty() {
            return Err(
                "ciphers is empty: name one, or leave it out; encryption = \"off\" does without".into()
            );
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
        if config.migration.channels == Some(0) {
            return Err(
                "[migration] channels is 0: give at least 1, or leave it out to keep what the NIC has".into(),
            );
        }
        Ok(config)
    }

    /// What this host wants for pages: encryption required where there are certificates and nothing else is said. Keys come
    /// from TLS, so that without it there is none.
    pub fn pages(&self) -> Offer {
        let encryption = match self.encryption {
            _ if self.insecure => Encryption::Off,
            said => said.unwrap_or(Encryption::Required),
        };
        Offer { encryption, ciphers: self.ciphers.clone() }
    }

    /// The agent of host `name`, which may also be an address.
    ///
    /// # Errors
    /// [`ConfigError::UnknownPeer`]; [`ConfigError::Nameless`] where certificates are wanted.
    pub fn peer(&self, name: &str) -> Result<Peer, ConfigError> {
        let address = self.address(name)?;
        if self.peers.contains_key(name) && !self.insecure {
            return Ok(Peer { address, name: Some(name.to_owned()) });
        }
        self.peer_at(address)
    }

    /// The agent at an address.
    ///
    /// # Errors
    /// [`ConfigError::Nameless`] where certificates are wanted.
    pub fn peer_at(&self, address: SocketAddr) -> Result<Peer, ConfigError> {
        if self.insecure {
            return Ok(Peer { address, name: None });
        }
        let found = self.peers.keys().find(|name| self.address(name).is_ok_and(|other| other == address));
        let name = found.cloned().ok_or(ConfigError::Nameless { address })?;
        Ok(Peer { address, name: Some(name) })
    }

    /// Whether the host of this certificate may send VMs to this one.
    ///
    /// # Errors
    /// [`ConfigError::NotAllowed`].
    pub fn may_send(&self, host: &str) -> Result<(), ConfigError> {
        self.allowed(host, self.allow.send.as_deref(), "send", "send VMs to this host")
    }

    /// Whether the host of this certificate may be given VMs.
    ///
    /// # Errors
    /// [`ConfigError::NotAllowed`].
    pub fn may_receive(&self, host: &str) -> Result<(), ConfigError> {
        self.allowed(host, self.allow.receive.as_deref(), "receive", "receive VMs from this host")
    }

    fn allowed(
        &self,
        host: &str,
        named: Option<&[String]>,
        setting: &'static str,
        act: &'static str,
    ) -> Result<(), ConfigError> {
        let names: Vec<&str> = match named {
            Some(named) => named.iter().map(String::as_str).collect(),
            None => self.peers.keys().map(String::as_str).collect(),
        };
        if names.iter().any(|name| name.eq_ignore_ascii_case(host)) {
            return Ok(());
        }
        Err(ConfigError::NotAllowed {
            here: self.name.clone(),
            host: host.to_owned(),
            act,
            setting,
            allowed: if names.is_empty() { "none".into() } else { names.join(", ") },
        })
    }

    /// Whether a connection comes from an address of [`Self::peers`], which proves nothing.
    pub fn is_peer_address(&self, ip: IpAddr) -> bool {
        let of = |text: &String| {
            let address = text.parse().map(|address: SocketAddr| address.ip());
            address.or_else(|_| text.parse::<IpAddr>()).ok()
        };
        self.peers.values().filter_map(of).any(|peer| peer.to_canonical() == ip.to_canonical())
    }

    fn address(&self, name: &str) -> Result<SocketAddr, ConfigError> {
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
        assert_eq!(config.migration.transport, TransportChoice::Auto);
        assert_eq!((config.migration.channels, &config.migration.cpus), (None, &None));
        assert_eq!((config.announce.rounds, config.announce.initial), (9, 50));
        assert_eq!((config.limits.round, config.limits.hello), (3, 5));
        assert_eq!(config.socket_group, None);
        assert_eq!(config.admission, AdmissionConfig { max_arriving: Some(2), ..AdmissionConfig::default() });
    }

    #[test]
    fn peers_by_name_or_address() {
        let config = AgentConfig::parse(GOOD).unwrap();
        let at = |text: &str| Peer { address: text.parse().unwrap(), name: None };
        assert_eq!(config.peer("host-b").unwrap(), at("10.0.0.2:4790"));
        assert_eq!(config.peer("192.0.2.7").unwrap(), at("192.0.2.7:4790"));
        assert_eq!(config.peer("192.0.2.7:1").unwrap(), at("192.0.2.7:1"));
        let error = config.peer("host-c").unwrap_err().to_string();
        assert!(error.contains("configured are host-b"), "{error}");
    }

    fn secure(more: &str) -> AgentConfig {
        AgentConfig::parse(&(GOOD.replace("insecure = true", "") + more)).unwrap()
    }

    #[test]
    fn with_certificates_every_peer_has_a_name() {
        let config = secure("");
        assert_eq!(config.pki_dir, PathBuf::from("/etc/xferry/pki"));
        let b = Peer { address: "10.0.0.2:4790".parse().unwrap(), name: Some("host-b".into()) };
        for name in ["host-b", "10.0.0.2:4790", "10.0.0.2"] {
            assert_eq!(config.peer(name).unwrap(), b, "{name}");
        }
        let error = config.peer("192.0.2.7").unwrap_err().to_string();
        assert!(error.contains("192.0.2.7:4790") && error.contains("[peers]"), "{error}");
        assert!(config.is_peer_address("10.0.0.2".parse().unwrap()));
        assert!(config.is_peer_address("::ffff:10.0.0.2".parse().unwrap()));
        assert!(!config.is_peer_address("10.0.0.3".parse().unwrap()));
    }

    #[test]
    fn who_may_do_what() {
        let config = secure("");
        assert!(config.may_send("HOST-B").is_ok() && config.may_receive("host-b").is_ok());
        let error = config.may_send("host-c").unwrap_err().to_string();
        assert!(["host-c", "send VMs", "host-b", "[allow] send", "host-a"].iter().all(|w| error.contains(w)));
        let config = secure("[allow]\nsend = [\"host-c\"]\nreceive = []\n");
        assert!(config.may_send("host-c").is_ok() && config.may_send("host-b").is_err());
        let error = config.may_receive("host-b").unwrap_err().to_string();
        assert!(error.contains("named are none") && error.contains("[allow] receive"), "{error}");
        let both = AgentConfig::parse(&format!("{GOOD}[allow]\nsend = []\n")).unwrap_err();
        assert!(both.contains("[allow]") && both.contains("insecure = true"), "{both}");
    }

    #[test]
    fn pages_are_encrypted_unless_it_is_said() {
        let pages = |text: &str| AgentConfig::parse(text).map(|config| config.pages());
        let secure = |more: &str| GOOD.replace("insecure = true", more);
        assert_eq!(pages(&secure("")).unwrap().encryption, Encryption::Required);
        assert_eq!(pages(&secure("encryption = \"preferred\"")).unwrap().encryption, Encryption::Preferred);
        assert_eq!(pages(&secure("encryption = \"off\"")).unwrap().encryption, Encryption::Off);
        assert_eq!(pages(GOOD).unwrap().encryption, Encryption::Off);
        let only = pages(&secure("ciphers = [\"aes-256-gcm\"]")).unwrap();
        assert_eq!(only.ciphers, [Cipher::Aes256Gcm]);
        assert!(pages(&secure("ciphers = []")).unwrap_err().contains("ciphers is empty"));
        assert!(pages(&secure("ciphers = [\"rot13\"]")).unwrap_err().contains("aes-128-gcm"));
        let both = pages(&secure("insecure = true\nencryption = \"required\"")).unwrap_err();
        assert!(both.contains("insecure = true"), "{both}");
    }

    #[test]
    fn the_example_says_what_it_looks_like() {
        const EXAMPLE: &str = include_str!("../../../packaging/xferry.toml");
        fn setting(line: &str) -> Option<&str> {
            line.strip_prefix("# ").filter(|rest| rest.contains(" = ") || rest.starts_with('['))
        }
        let config = AgentConfig::parse(EXAMPLE).unwrap();
        assert_eq!(config.peer("host-b").unwrap().name.as_deref(), Some("host-b"));
        // What is commented out says what holds without it, but for these.
        let numbers = ["# queues", "# channels", "# cpus", "# max-arr"];
        let lines = EXAMPLE.lines().filter(|line| !numbers.iter().any(|name| line.starts_with(name)));
        let text: String = lines.map(|line| format!("{}\n", setting(line).unwrap_or(line))).collect();
        let all = AgentConfig::parse(&text).unwrap();
        assert_eq!(all.socket_group, Some(SocketGroup::Name(super::super::socket::DEFAULT_GROUP.into())));
        assert_eq!((&all.socket, &all.state_dir), (&config.socket, &config.state_dir));
        assert_eq!((&all.vms_dir, &all.pki_dir), (&config.vms_dir, &config.pki_dir));
        assert_eq!((all.migration.port, all.admission), (config.migration.port, AdmissionConfig::default()));
        assert!(all.may_send("host-b").is_ok());
    }

    #[test]
    fn groups_by_name_or_number() {
        let group = |value: &str| AgentConfig::parse(&format!("socket-group = {value}\n{GOOD}"));
        assert_eq!(group("\"ops\"").unwrap().socket_group, Some(SocketGroup::Name("ops".into())));
        assert_eq!(group("977").unwrap().socket_group, Some(SocketGroup::Id(977)));
        let error = group("true").unwrap_err();
        assert!(error.contains("socket-group") && error.contains("name or its number"), "{error}");
    }

    #[test]
    fn mistakes_are_named() {
        let problem = |from: &str, to: &str| AgentConfig::parse(&GOOD.replace(from, to)).unwrap_err();
        assert!(problem("interface", "interfase").contains("interfase"));
        assert!(problem("10.0.0.1:4790", "10.0.0.1").contains("listen"));
        assert!(problem("[peers]", "channels = 0\n[peers]").contains("channels is 0"));
        assert!(problem("[peers]", "channels = -1\n[peers]").contains("channels = -1"));
        let cpus = problem("[peers]", "cpus = \"2-5,x\"\n[peers]");
        assert!(cpus.contains("cpus = ") && cpus.contains("\"x\" is neither a processor"), "{cpus}");
        assert!(problem("[peers]", "transport = \"tcp\"\n[peers]").contains("`auto`, `af-xdp`, `udp`"));
        assert!(problem("round = 3", "round = 0").contains("round is 0"));
        assert!(problem("round = 3", &format!("round = {}", i64::MAX)).contains("30 days"));
        assert!(problem("rounds = 9", "rounds = 4000000000").contains("at most 1000"));
        assert!(problem("rounds = 9", &format!("step = {}", i64::MAX)).contains("step is"));
    }
}
