//! QEMU's own migration over the same link.

use std::fmt;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::LIMIT;
use crate::bench::bed::Bed;
use crate::bench::figures::Told;
use crate::bench::guests::Guest;
use crate::lab::monitor::{ANSWER_LIMIT, Monitor};
use crate::lab::{Host, Side};

const PORT: u16 = 4800;
/// How often QEMU is asked whether it is done.
const POLL: Duration = Duration::from_millis(10);

/// A way to migrate with QEMU alone. Bandwidth is unlimited in all, unlike QEMU's default of 128 MiB/s; the blackout that it
/// aims at is its default of 300 ms, as xferry's is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::bench) enum Qemu {
    /// One stream.
    Default,
    /// So many channels.
    Multifd(u32),
    /// So many channels, compressed.
    MultifdZstd(u32),
    /// So many channels, in TLS.
    MultifdTls(u32),
}

/// Name of the object that has QEMU's key.
const CREDENTIALS: &str = "bench-tls";
/// With a shared key GnuTLS would take ChaCha20-Poly1305, the first of its ciphers whose hash fits the key's, which is half as fast here as
/// AES-128-GCM.
const PRIORITY: &str = "NORMAL:-CHACHA20-POLY1305";
/// Whose the key is, and the key: that nobody else knows it is not what is measured.
const USER: &str = "bench";
const KEY: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

impl Qemu {
    /// Its ways without compression.
    pub const ALL: [Self; 3] = [Self::Default, Self::Multifd(2), Self::Multifd(4)];

    /// `endpoint` is `client` at the source, `server` at the destination; `directory` is its own.
    fn configure(self, monitor: &mut Monitor, endpoint: &str, directory: &Path) -> Result<()> {
        let mut parameters = json!({ "max-bandwidth": 0 });
        if let Self::Multifd(channels) | Self::MultifdZstd(channels) | Self::MultifdTls(channels) = self {
            let capabilities = json!({ "capabilities": [{ "capability": "multifd", "state": true }] });
            monitor.call("migrate-set-capabilities", capabilities)?;
            parameters["multifd-channels"] = channels.into();
        }
        if let Self::MultifdZstd(_) = self {
            parameters["multifd-compression"] = "zstd".into();
        }
        if let Self::MultifdTls(_) = self {
            let keys = directory.join("keys.psk");
            fs::write(&keys, format!("{USER}:{KEY}\n"))
                .with_context(|| format!("writing {}", keys.display()))?;
            let mut credentials = json!({
                "qom-type": "tls-creds-psk", "id": CREDENTIALS, "dir": directory, "endpoint": endpoint, "priority": PRIORITY,
            });
            if endpoint == "client" {
                credentials["username"] = USER.into();
            }
            monitor.call("object-add", credentials)?;
            parameters["tls-creds"] = CREDENTIALS.into();
        }
        monitor.call("migrate-set-parameters", parameters).map(drop)
    }

    /// Moves the guest away from `source`, and ends the old QEMU there, as xferry does and an operator would.
    pub fn migrate(self, bed: &Bed, guest: &Guest, source: Side) -> Result<Told> {
        let target = source.other();
        let mut incoming = bed.command(guest, target)?;
        incoming.extend(["-incoming".to_owned(), "defer".to_owned()]);
        bed.lab.host(target).start_qemu(&incoming)?;
        let open = |host: &Host| Monitor::open(&host.vm_paths().qmp)?.context("QEMU is gone");
        let (mut from, mut to) = (open(bed.lab.host(source))?, open(bed.lab.host(target))?);
        self.configure(&mut from, "client", &bed.lab.host(source).dir())?;
        self.configure(&mut to, "server", &bed.lab.host(target).dir())?;
        let uri = format!("tcp:{}:{PORT}", target.migration_ip());
        to.call("migrate-incoming", json!({ "uri": uri }))?;
        from.call("migrate", json!({ "uri": uri }))?;
        let deadline = Instant::now() + LIMIT;
        loop {
            let answer = from.call("query-migrate", json!({}))?;
            match answer["status"].as_str() {
                Some("completed") => {
                    bed.clear_guest(source)?;
                    return told(&answer);
                }
                Some("failed" | "cancelled") => {
                    bail!("{}", answer["error-desc"].as_str().unwrap_or("it failed"))
                }
                _ if Instant::now() > deadline => bail!("it takes longer than {} s", LIMIT.as_secs()),
                _ => thread::sleep(POLL),
            }
        }
    }
}

fn told(answer: &Value) -> Result<Told> {
    let ms = |name: &str| answer[name].as_f64().with_context(|| format!("query-migrate without {name}"));
    Ok(Told {
        total_ms: ms("total-time")?,
        setup_ms: ms("setup-time")?,
        blackout_ms: ms("downtime")?,
        ..Told::default()
    })
}

impl fmt::Display for Qemu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&match self {
            Self::Default => "QEMU default".to_owned(),
            Self::Multifd(channels) => format!("QEMU multifd {channels}"),
            Self::MultifdZstd(channels) => format!("QEMU multifd {channels}, zstd"),
            Self::MultifdTls(channels) => format!("QEMU multifd {channels}, TLS"),
        })
    }
}

impl Monitor {
    /// Runs a command and returns its answer.
    fn call(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.send(&json!({ "execute": command, "arguments": arguments }))?;
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            if let Some(mut message) = self.read()? {
                if let Some(error) = message.get("error") {
                    bail!("QEMU refuses {command}: {}", error["desc"]);
                }
                if message.get("return").is_some() {
                    return Ok(message["return"].take());
                }
            }
            if Instant::now() > deadline {
                bail!("QEMU does not answer {command}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_without_figures_are_refused() {
        let answer = json!({ "status": "completed", "total-time": 900, "setup-time": 3, "downtime": 40 });
        let told = told(&answer).unwrap();
        assert!((told.total_ms - 900.0).abs() < 1e-9 && told.rounds.is_empty());
        assert!(super::told(&json!({ "status": "completed" })).is_err());
    }
}
