//! What a migration that is over must not have left on either host.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;

use super::journal::Journal;
use super::site::Site;
use crate::lab::plan::MIGRATION_NIC;
use crate::lab::{Host, Side, netns, run_tool};
use crate::scenario::{ip, tracked};

/// How long an agent may take to clean up once the migration is over.
const LIMIT: Duration = Duration::from_secs(8);
/// How often is looked.
const INTERVAL: Duration = Duration::from_millis(50);
/// What the RAM file of a host without a VM may hold, bytes.
const RAM_TOLERANCE: u64 = 64 << 10;
/// How many descriptors more than when it was new an idle agent may hold: connections that are just closing.
const DESCRIPTOR_TOLERANCE: usize = 16;
/// The argument that makes `xferry` a helper which reaches into a QEMU.
const HELPER: &[u8] = b"__userfaultfd-of";
/// What an agent keeps in its state directory.
const KEPT: [&str; 3] = ["handover.journal", "reports", "demo.log"];
/// Unit of `st_blocks`.
const BLOCK: u64 = 512;

/// What is left when the VM runs on `owner` and nobody migrates, after the agents had their time to clean up.
pub(super) fn of_migration(site: &Site, owner: Side) -> Result<Vec<String>> {
    patiently(|| {
        let mut found = Vec::new();
        for side in Side::BOTH {
            let host = site.host(side);
            found.extend(processes(host, side == owner)?);
            found.extend(sessions(host)?);
            found.extend(files(host)?);
            let status = site.status(side)?;
            for what in ["leaving", "arriving"] {
                if status[what].as_array().is_none_or(|list| !list.is_empty()) {
                    found.push(format!("{side} says that a VM is {what}: {}", status[what]));
                }
            }
        }
        found.extend(memory(site.host(owner.other()))?);
        Ok(found)
    })
}

/// What adds up over runs.
pub(super) fn lasting(site: &mut Site) -> Result<Vec<String>> {
    let mut found = patiently(|| {
        let mut found = Vec::new();
        for side in Side::BOTH {
            for session in Journal::read(&site.host(side).state_dir())?.open() {
                found.push(format!("session {session} has no end in the journal of {side}"));
            }
        }
        Ok(found)
    })?;
    for side in Side::BOTH {
        let Some(pid) = site.host(side).agent_pid() else { continue };
        let path = format!("/proc/{pid}/fd");
        let now = fs::read_dir(&path).with_context(|| format!("reading {path}"))?.count();
        let new = *site.descriptors.entry(pid).or_insert(now);
        if now > new + DESCRIPTOR_TOLERANCE {
            found.push(format!("the agent of {side} holds {now} descriptors, {new} when it was new"));
        }
    }
    Ok(found)
}

/// Looks until nothing is found, or it has been there too long.
fn patiently(mut look: impl FnMut() -> Result<Vec<String>>) -> Result<Vec<String>> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let found = look()?;
        if found.is_empty() || Instant::now() > deadline {
            return Ok(found);
        }
        thread::sleep(INTERVAL);
    }
}

/// QEMUs that nobody needs, trackers of the one that runs, helpers.
fn processes(host: &Host, owns: bool) -> Result<Vec<String>> {
    let side = host.side();
    let mut found = Vec::new();
    let qemus = host.qemu_pids()?;
    match (&qemus[..], owns) {
        ([], false) => {}
        (&[pid], true) => {
            if tracked(pid)? {
                found.push(format!("the memory of the VM on {side} is still tracked"));
            }
        }
        _ => found.push(format!("QEMU processes on {side}: {qemus:?}")),
    }
    for pid in netns::pids(&host.namespace())? {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if command.split(|&byte| byte == 0).any(|argument| argument == HELPER) {
            found.push(format!("a helper process on {side}: {pid}"));
        }
    }
    Ok(found)
}

/// Sessions for which the XDP program still lets frames in.
fn sessions(host: &Host) -> Result<Vec<String>> {
    // Without the tool the program's maps cannot be seen; the next migration then tells whether a session is in its
    // way.
    let Ok(maps) = run_tool("bpftool", &["-j", "map", "show"]) else { return Ok(Vec::new()) };
    let link = ip(&host.namespace(), &format!("-j link show dev {MIGRATION_NIC}"))?;
    let link: Value = serde_json::from_str(&link).context("`ip` did not answer with JSON")?;
    let Some(program) = link[0]["xdp"]["prog"]["id"].as_u64() else {
        return Ok(vec![format!("no XDP program on {MIGRATION_NIC} of {}", host.side())]);
    };
    let program = run_tool("bpftool", &["-j", "prog", "show", "id", &program.to_string()])?;
    let program: Value = serde_json::from_str(&program).context("bpftool did not answer with JSON")?;
    let maps: Value = serde_json::from_str(&maps).context("bpftool did not answer with JSON")?;
    let of_program = |id: &Value| program["map_ids"].as_array().is_some_and(|ids| ids.contains(id));
    let table = maps
        .as_array()
        .into_iter()
        .flatten()
        .find(|map| map["name"] == "SESSIONS" && of_program(&map["id"]))
        .context("the XDP program has no map of sessions")?;
    let entries = run_tool("bpftool", &["-j", "map", "dump", "id", &table["id"].to_string()])?;
    let entries: Value = serde_json::from_str(&entries).context("bpftool did not answer with JSON")?;
    let count = entries.as_array().map_or(0, Vec::len);
    Ok((count > 0)
        .then(|| format!("{count} sessions in the XDP program of {}", host.side()))
        .into_iter()
        .collect())
}

/// Files that nobody will ever read again.
fn files(host: &Host) -> Result<Vec<String>> {
    let names = |directory: &Path| -> Result<Vec<String>> {
        let entries = fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))?;
        Ok(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
    };
    let state = host.state_dir();
    let stray = names(&state)?.into_iter().filter(|name| !KEPT.contains(&&**name));
    let halves = names(&state.join("reports"))?.into_iter().filter(|name| !name.ends_with(".json"));
    Ok(stray.chain(halves).map(|name| format!("the file {name} on {}", host.side())).collect())
}

/// Memory of a VM that is not there.
fn memory(host: &Host) -> Result<Vec<String>> {
    let path = host.vm_paths().ram;
    let bytes = match fs::metadata(&path) {
        Ok(metadata) => metadata.blocks() * BLOCK,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error).with_context(|| format!("looking at {}", path.display())),
    };
    let stray = bytes > RAM_TOLERANCE;
    Ok(stray
        .then(|| format!("{} KiB of RAM on {}, where no VM is", bytes >> 10, host.side()))
        .into_iter()
        .collect())
}
