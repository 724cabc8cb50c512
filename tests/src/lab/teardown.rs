//! Removes a lab: first what runs in it, then its namespaces, files and state.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, anyhow};

use super::layout::Layout;
use super::plan::Side;
use super::{disk, hugepages, netns, reporting};

/// Removes everything that belongs to `layout`; what is not there is fine. Goes on after a failure
/// and reports all of them; the state file then stays, so that a later run tries again.
pub(super) fn remove(layout: &Layout) -> Result<()> {
    let mut problems = Vec::new();
    // All hosts' processes before any namespace: one that loses its peer first would only log about it.
    let namespaces: Vec<String> =
        layout.namespaces().into_iter().filter(|name| netns::exists(name)).collect();
    for step in [netns::kill_all as fn(&str) -> Result<()>, netns::delete] {
        problems.extend(namespaces.iter().filter_map(|name| step(name).err()));
    }
    problems.extend(Side::BOTH.iter().filter_map(|&side| disk::unmount(&layout.state_dir(side)).err()));
    problems.extend(disk::unmount(&layout.ram_dir()).err());
    problems.extend(hugepages::give_back(layout).err());
    problems.extend(reporting::resume(layout).err());
    problems.extend(remove_tree(&layout.run_dir()).err());
    problems.extend(remove_tree(&layout.ram_dir()).err());
    problems.extend(remove_file(layout.disk()).err());
    if problems.is_empty() {
        problems.extend(remove_file(&layout.state_file()).err());
    }
    if problems.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = problems.iter().map(|problem| format!("{problem:#}")).collect();
    Err(anyhow!("the lab could not be removed entirely: {}", list.join("; ")))
}

fn remove_tree(path: &Path) -> Result<()> {
    gone(fs::remove_dir_all(path)).with_context(|| format!("removing {}", path.display()))
}

fn remove_file(path: &Path) -> Result<()> {
    gone(fs::remove_file(path)).with_context(|| format!("removing {}", path.display()))
}

/// That it was not there is as good.
fn gone(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
