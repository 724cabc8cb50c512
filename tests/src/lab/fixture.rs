//! A lab's life: it is built once, removed once, and nothing starts in it after that.

use std::fs;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail};

use super::layout::Layout;
use super::plan::Side;
use super::state::{Registry, State};
use super::sync::lock;
use super::{LabConfig, disk, netns, signals, teardown, topology};

#[derive(Clone, Copy, PartialEq)]
enum Life {
    Up,
    Kept,
    Removed,
}

/// The part of a lab that a signal handler removes from under everybody else.
pub(super) struct Fixture {
    layout: Layout,
    /// Held while something is made in the lab, so that teardown never misses it.
    life: Mutex<Life>,
}

impl Fixture {
    /// Claims the names, removes what killed processes left, and builds.
    pub fn build(layout: Layout, config: &LabConfig) -> Result<Arc<Self>> {
        // Until the claim holds, nothing under these names is ours to remove.
        claim(&layout)?;
        let fixture = Arc::new(Self { layout, life: Mutex::new(Life::Up) });
        signals::watch(&fixture);
        let built = fixture.while_up(|| {
            make_directories(&fixture.layout, config)?;
            if let Some(bytes) = config.state_disk {
                Side::BOTH
                    .iter()
                    .try_for_each(|&side| disk::mount(&fixture.layout.state_dir(side), bytes))?;
            }
            topology::build(&fixture.layout, config.migration_network())
        });
        if let Err(error) = built {
            return match fixture.remove() {
                Ok(()) => Err(error),
                Err(problem) => Err(error.context(problem.to_string())),
            };
        }
        Ok(fixture)
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Runs `work` unless the lab is being removed, which then waits for it. Keep it short.
    pub fn while_up<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let life = lock(&self.life);
        if *life == Life::Removed {
            bail!("the lab {:?} is being removed", self.layout.prefix());
        }
        work()
    }

    /// Removes the lab, once.
    pub fn remove(&self) -> Result<()> {
        let mut life = lock(&self.life);
        if *life != Life::Up {
            return Ok(());
        }
        *life = Life::Removed;
        let result = teardown::remove(&self.layout);
        // Closing the registry removes its directory after the last lab.
        Registry::open().map(drop)?;
        result
    }

    /// Leaves the lab up after this process' end.
    pub fn keep(&self) -> Result<()> {
        let mut life = lock(&self.life);
        if *life == Life::Up {
            *life = Life::Kept;
            State::own(&self.layout, true)?.write()?;
        }
        Ok(())
    }
}

/// Claims the names of `layout` for this process, or says who has them.
fn claim(layout: &Layout) -> Result<()> {
    let _registry = Registry::open()?;
    remove_stale();
    if let Some(state) = State::read(&layout.state_file()) {
        let (pid, first) = (state.pid, &layout.namespaces()[0]);
        if state.kept {
            bail!(
                "the lab with namespace {first} was left up by process {pid}: remove it with `cargo xtask demo --clean`"
            );
        }
        bail!(
            "the lab with namespace {first} is in use by process {pid}: wait until it ends, or end it with Ctrl-C"
        );
    }
    if let Some(name) = layout.namespaces().iter().find(|name| netns::exists(name)) {
        bail!(
            "a network namespace {name} exists already and no lab made it: if nothing needs it, \
             remove it with `ip netns delete {name}`"
        );
    }
    State::own(layout, false)?.write()
}

/// Removes what processes left that were killed. Their failures are not ours.
pub(super) fn remove_stale() -> Vec<String> {
    let mut removed = Vec::new();
    for state in State::all().into_iter().filter(State::is_stale) {
        match teardown::remove(&state.layout()) {
            Ok(()) => removed.push(state.layout().namespace(Side::A)),
            Err(error) => eprintln!("left by process {}, which was killed: {error:#}", state.pid),
        }
    }
    removed
}

fn make_directories(layout: &Layout, config: &LabConfig) -> Result<()> {
    if config.huge_tmpfs {
        let directory = layout.ram_dir();
        fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        disk::mount_huge(&directory)?;
    }
    let disk_dir = layout.disk().parent().map(ToOwned::to_owned).into_iter();
    let host_dirs = Side::BOTH.into_iter().flat_map(|side| {
        let host = layout.host_dir(side);
        [host.join("vms"), layout.state_dir(side), layout.ram_dir().join(side.name())]
    });
    for dir in disk_dir.chain(host_dirs) {
        fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    }
    Ok(())
}

/// Removes the lab of `prefix` unless somebody uses it, and all stale ones.
pub(super) fn clean(prefix: &str) -> Result<Vec<String>> {
    let _registry = Registry::open()?;
    let mut removed = remove_stale();
    let unclaimed = Layout::new(prefix, &super::cache_dir());
    if let Some(state) = State::read(&unclaimed.state_file()) {
        let first = unclaimed.namespace(Side::A);
        if !state.kept {
            bail!("the lab with namespace {first} is in use by process {}: end it with Ctrl-C", state.pid);
        }
        teardown::remove(&state.layout())?;
        removed.push(first);
    } else if let Some(name) = unclaimed.namespaces().iter().find(|name| netns::exists(name)) {
        bail!(
            "no lab made the network namespace {name}: if nothing needs it, remove it with `ip netns delete {name}`"
        );
    }
    Ok(removed)
}
