//! The agent from its start to its end, and what surrounds its service: what of the host is changed for it and given back.

use std::{io, path::Path};

use tokio::runtime::{Builder, Runtime};

use super::{Agent, AgentConfig, AgentError, config::MigrationConfig};
use crate::{migration::MigrationError, network::ChangedChannels, privileges};

/// Reads the configuration file and serves. It has threads of its own, so that nothing of it is left at the end: not to be called
/// by a task.
///
/// # Errors
/// [`AgentError`].
pub fn run(config: &Path) -> Result<(), AgentError> {
    // QEMU makes RAM files that everybody may read (0644), and inherits this.
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    let config = AgentConfig::read(config)?;
    privileges::check(&privileges::AGENT)?;
    let runtime = threads()?;
    let channels = runtime.block_on(give_channels(&config.migration))?;
    let served = runtime.block_on(Agent::serve(config));
    // A driver takes no queue away that an AF_XDP socket is bound to, and the last of these goes with the last task.
    drop(runtime);
    if let Some(channels) = channels
        && let Err(error) = threads()?.block_on(channels.give_back())
    {
        tracing::warn!("{error}");
    }
    served
}

fn threads() -> Result<Runtime, AgentError> {
    let started: io::Result<_> = Builder::new_multi_thread().worker_threads(4).enable_all().build();
    started.map_err(|error| AgentError::Host(format!("the agent cannot start threads: {error}")))
}

/// Gives the NIC the channels that are configured, if any are.
async fn give_channels(config: &MigrationConfig) -> Result<Option<ChangedChannels>, AgentError> {
    let Some(wanted) = config.channels else { return Ok(None) };
    let changed = ChangedChannels::set(&config.interface, wanted).await.map_err(MigrationError::from)?;
    if changed.is_some() {
        tracing::info!(interface = config.interface, channels = wanted, "channels set until the agent ends");
    }
    Ok(changed)
}
