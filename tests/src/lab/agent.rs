//! The agent of one host, as an operator would configure it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;

use super::encryption::Encryption;
use super::pki;
use super::plan::{CONTROL_PORT, MIGRATION_NIC, MIGRATION_PORT, Side};

/// The file `xferry agent --config` reads.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct AgentConfig {
    name: &'static str,
    socket: PathBuf,
    state_dir: PathBuf,
    vms_dir: PathBuf,
    insecure: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    encryption: Option<&'static str>,
    pki_dir: PathBuf,
    control: Control,
    migration: Migration,
    peers: BTreeMap<&'static str, String>,
    limits: BTreeMap<&'static str, u64>,
}

#[derive(Serialize)]
struct Control {
    listen: String,
}

#[derive(Serialize)]
struct Migration {
    interface: &'static str,
    port: u16,
    transport: &'static str,
}

/// The agent's API socket under its host's directory.
pub(super) fn socket(host_dir: &Path) -> PathBuf {
    host_dir.join("xferry.sock")
}

/// What an agent is told that is not the same in every lab.
pub(super) struct Words<'a> {
    /// Time limits that are not the default, s.
    pub limits: &'a [(&'static str, u64)],
    /// Whether it goes without certificates.
    pub insecure: bool,
    /// About encrypting pages.
    pub encryption: Option<Encryption>,
    /// By what frames get on and off the NIC.
    pub transport: &'static str,
}

/// The configuration (TOML) of the agent on `side`.
pub(super) fn config(side: Side, host_dir: &Path, state_dir: &Path, words: &Words<'_>) -> Result<String> {
    let control = |side: Side| format!("{}:{CONTROL_PORT}", side.management_ip());
    let config = AgentConfig {
        name: side.name(),
        socket: socket(host_dir),
        state_dir: state_dir.to_owned(),
        vms_dir: host_dir.join("vms"),
        insecure: words.insecure,
        encryption: words.encryption.map(Encryption::value),
        pki_dir: pki::dir(host_dir),
        control: Control { listen: control(side) },
        migration: Migration { interface: MIGRATION_NIC, port: MIGRATION_PORT, transport: words.transport },
        peers: BTreeMap::from([(side.other().name(), control(side.other()))]),
        limits: words.limits.iter().copied().collect(),
    };
    toml::to_string(&config).context("encoding the agent's configuration")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_point_at_each_other() {
        let words = Words { limits: &[("hello", 7)], insecure: false, encryption: None, transport: "udp" };
        let config = |side, dir: &str| config(side, Path::new(dir), &Path::new(dir).join("state"), &words);
        let a: toml::Table = config(Side::A, "/run/a").unwrap().parse().unwrap();
        let b: toml::Table = config(Side::B, "/run/b").unwrap().parse().unwrap();
        assert_eq!(a["peers"]["host-b"], b["control"]["listen"]);
        assert_eq!(b["peers"]["host-a"], a["control"]["listen"]);
        assert_eq!(a["migration"]["interface"].as_str(), Some("mig0"));
        assert_eq!(a["migration"]["transport"].as_str(), Some("udp"));
        assert_eq!(a["state-dir"].as_str(), Some("/run/a/state"));
        assert_eq!(a["pki-dir"].as_str(), Some("/run/a/pki"));
        assert_eq!(a["limits"]["hello"].as_integer(), Some(7));
    }
}
