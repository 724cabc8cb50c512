//! Waits until a disturbed migration is over: for the VM, for both agents, and for whoever asked for it.

use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Result, ensure};
use serde_json::Value;

use super::site::{ANSWER_LIMIT, Site};
use crate::lab::{Process, Side};

/// How often is looked.
const INTERVAL: Duration = Duration::from_millis(20);
/// So long after everything else is quiet, a QEMU that does not run is taken for one that is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(40);

/// How long an operator lets the agents try.
const PATIENCE: Duration = Duration::from_secs(3);

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

/// Waits for the end until `deadline`. `begun` is when the migration was.
pub(super) fn settle(site: &Site, command: &mut Process, begun: SystemTime, deadline: Instant) -> End {
    let mut quiet_since = None;
    let mut human = Human { begun, undecided: None };
    loop {
        human.looks(site);
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

/// The operator, who decides about a VM that was taken, died with its host, and of which the agents cannot know whether it
/// ever ran there. The campaign does: QEMU said so.
struct Human {
    begun: SystemTime,
    /// Since when somebody waits.
    undecided: Option<Instant>,
}

impl Human {
    fn looks(&mut self, site: &Site) {
        let Some((side, id)) = Side::BOTH.into_iter().find_map(|side| Some((side, undecided(site, side)?)))
        else {
            self.undecided = None;
            return;
        };
        if self.undecided.get_or_insert_with(Instant::now).elapsed() < PATIENCE {
            return;
        }
        let ran = site.watch(side).events_since(self.begun).iter().any(|event| event.name == "RESUME");
        let decision = if ran { "--keep-here" } else { "--give-up" };
        println!("  the operator on {side}: xferry resolve {id} {decision}");
        // If it does not work, the run does not settle, which is what is reported.
        let _ = site.host(side).xferry(&["resolve", &id, decision, "--yes"], ANSWER_LIMIT);
        self.undecided = None;
    }
}

/// The session whose VM was taken on a host and is gone there, if somebody is to decide about one.
fn undecided(site: &Site, side: Side) -> Option<String> {
    let status = site.status(side).ok()?;
    let waits = |open: &&Value| {
        open["role"] == "destination"
            && !open["choice"].is_null()
            && open["state"].as_str().is_some_and(|state| state.contains("whether it ever ran"))
    };
    let open = status["unsettled"].as_array()?.iter().find(waits)?;
    open["id"].as_str().map(ToOwned::to_owned)
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
        for what in ["leaving", "arriving", "unsettled"] {
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
