//! QEMU's own migration over the same link.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::Figures;
use crate::lab::monitor::Monitor;
use crate::lab::{Lab, Side, VmConfig};

const PORT: u16 = 4800;
const LIMIT: Duration = Duration::from_secs(300);

/// A way to migrate with QEMU alone. Bandwidth is unlimited in all, unlike QEMU's default of 128 MiB/s.
#[derive(Clone, Copy, Debug)]
pub(super) enum Peer {
    /// One stream.
    Default,
    /// Several channels.
    Multifd(u32),
}

impl Peer {
    pub const ALL: [Self; 3] = [Self::Default, Self::Multifd(2), Self::Multifd(4)];

    pub fn name(self) -> &'static str {
        match self {
            Self::Default => "QEMU default",
            Self::Multifd(2) => "QEMU multifd 2",
            Self::Multifd(_) => "QEMU multifd 4",
        }
    }

    fn configure(self, monitor: &mut Monitor) -> Result<()> {
        if let Self::Multifd(channels) = self {
            let capabilities = json!({ "capabilities": [{ "capability": "multifd", "state": true }] });
            monitor.call("migrate-set-capabilities", capabilities)?;
            monitor.call("migrate-set-parameters", json!({ "multifd-channels": channels }))?;
        }
        monitor.call("migrate-set-parameters", json!({ "max-bandwidth": 0 }))?;
        Ok(())
    }
}

/// Moves the guest from host-a to host-b.
pub(super) fn migrate(lab: &Lab, config: &VmConfig, peer: Peer) -> Result<Figures> {
    let mut incoming = config.clone();
    incoming.extra.extend(["-incoming".to_owned(), "defer".to_owned()]);
    lab.b.start_vm(&incoming)?;
    let open = |host: &crate::lab::Host| Monitor::open(&host.vm_paths().qmp)?.context("QEMU is gone");
    let (mut source, mut destination) = (open(&lab.a)?, open(&lab.b)?);
    peer.configure(&mut source)?;
    peer.configure(&mut destination)?;
    let uri = format!("tcp:{}:{PORT}", Side::B.migration_ip());
    destination.call("migrate-incoming", json!({ "uri": uri }))?;
    source.call("migrate", json!({ "uri": uri }))?;
    let deadline = Instant::now() + LIMIT;
    loop {
        let answer = source.call("query-migrate", json!({}))?;
        let number =
            |name: &str| answer[name].as_f64().with_context(|| format!("query-migrate without {name}"));
        match answer["status"].as_str() {
            Some("completed") => {
                return Ok(Figures {
                    total_ms: number("total-time")?,
                    downtime_ms: number("downtime")?,
                    rate_mib: None,
                });
            }
            Some("failed" | "cancelled") => {
                bail!("{}: {}", peer.name(), answer["error-desc"].as_str().unwrap_or("failed"))
            }
            _ if Instant::now() > deadline => {
                bail!("{} takes longer than {} s", peer.name(), LIMIT.as_secs())
            }
            _ => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

impl Monitor {
    /// Runs a command and returns its answer.
    fn call(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.send(&json!({ "execute": command, "arguments": arguments }))?;
        let deadline = Instant::now() + crate::lab::monitor::ANSWER_LIMIT;
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
