//! Waits until a disturbed migration is over: for the VM, for both agents, and for whoever asked for it.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::Value;

use super::site::Site;
use crate::lab::{Process, Side};

/// How often is looked.
const INTERVAL: Duration = Duration::from_millis(20);
/// So long after everything else is quiet, a QEMU that does not run is taken for one that is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(40);

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// One host runs the VM, and nobody does anything any more.
    Runs(Side),
    /// There is no QEMU any more.
    Gone,
    /// It did not end; what was still to come.
    Never(String),
}

/// Waits for the end until `deadline`.
pub(super) fn settle(site: &Site, command: &mut Process, deadline: Instant) -> End {
    let mut quiet_since = None;
    loop {
        let open = match look(site, command) {
            Ok(Sight::Over(end)) => return end,
            Ok(Sight::Remnant(side)) => {
                let since = *quiet_since.get_or_insert_with(Instant::now);
                if since.elapsed() > FORGOTTEN {
                    return End::Runs(side);
                }
                format!("the VM runs on {side}, and a QEMU is left on {}", side.other())
            }
            Err(reason) => {
                quiet_since = None;
                format!("{reason:#}")
            }
        };
        if Instant::now() > deadline {
            return End::Never(open);
        }
        thread::sleep(INTERVAL);
    }
}

enum Sight {
    Over(End),
    /// All is quiet, the VM runs here, and something is left on the other host.
    Remnant(Side),
}

/// An error says what is not over.
fn look(site: &Site, command: &mut Process) -> Result<Sight> {
    ensure!(command.try_wait()?.is_some(), "`xferry migrate` still runs");
    let mut pids = [0; 2];
    let mut running = Vec::new();
    for (side, pids) in Side::BOTH.into_iter().zip(&mut pids) {
        let status = site.status(side)?;
        for what in ["leaving", "arriving"] {
            let idle = status[what].as_array().is_some_and(Vec::is_empty);
            ensure!(idle, "{side} has a VM {what}: {}", brief(&status[what]));
        }
        *pids = site.host(side).qemu_pids()?.len();
        if site.runs(side)? {
            running.push(side);
        }
    }
    match (running[..].as_ref(), pids) {
        ([], [0, 0]) => Ok(Sight::Over(End::Gone)),
        (&[side], [1, 0] | [0, 1]) => Ok(Sight::Over(End::Runs(side))),
        (&[side], _) => Ok(Sight::Remnant(side)),
        _ => {
            let states = Side::BOTH.map(|side| site.watch(side).status().ok().flatten());
            anyhow::bail!("QEMU on host-a and host-b: {states:?}, {pids:?} processes")
        }
    }
}

/// An array of reports is pages long.
fn brief(value: &Value) -> String {
    let items = value.as_array().map(Vec::as_slice).unwrap_or_default();
    let names = items.iter().map(|item| match item["phase"].as_str() {
        Some(phase) => format!("{} in phase {phase}", item["id"].as_str().unwrap_or_default()),
        None => item.to_string(),
    });
    names.collect::<Vec<_>>().join(", ")
}
