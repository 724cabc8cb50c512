//! The command line: talks to the agent of this host.

mod check;
mod client;
mod load;
mod migrate;
mod pki;
mod resolve;
mod set;
mod show;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use client::Client;

/// Live migration of running virtual machines over a dedicated NIC.
#[derive(Debug, Parser)]
#[command(name = "xferry", version, max_term_width = 100)]
pub struct Cli {
    /// Unix socket of this host's agent
    #[arg(long, global = true, default_value = xferry::DEFAULT_SOCKET)]
    socket: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent of this host: owns the migration NIC, sends and receives VMs
    Agent {
        /// Configuration file (TOML)
        #[arg(long, default_value = "/etc/xferry/agent.toml")]
        config: PathBuf,
    },
    #[command(flatten)]
    Other(Errand),
}

/// What ends by itself.
#[derive(Debug, Subcommand)]
enum Errand {
    /// Would a migration work? Does everything up to the first page, takes it back, and shows every check with a
    /// remedy. Exit code 0: it can go, 1: refused, 2: could not tell
    Check(check::CheckArgs),
    /// Move a running VM to another host. Ctrl-C cancels, and the VM stays where it is
    Migrate(migrate::MigrateArgs),
    /// What this host's agent is doing
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Stop a migration; the VM stays where it is
    Cancel {
        /// Id of the migration; not needed when there is only one
        id: Option<String>,
    },
    /// Change a migration that is under way; at the host that the VM leaves
    Set(set::SetArgs),
    /// Decide about a VM that the two hosts cannot settle, because one of them is gone for good
    Resolve(resolve::ResolveArgs),
    /// What a migration did
    Report {
        /// Id of the migration; the latest when not given
        id: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Make certificates by which agents know each other
    #[command(subcommand)]
    Pki(pki::PkiCommand),
    /// Attach the XDP program to a NIC and show its counters, without an agent
    Load(load::LoadArgs),
}

/// Carries the command out. Returns the exit code.
///
/// # Errors
/// A sentence for the operator.
pub fn run(cli: Cli) -> Result<u8> {
    match cli.command {
        Command::Agent { config } => {
            xferry::agent::run(&config)?;
            Ok(0)
        }
        Command::Other(errand) => {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build();
            runtime.context("cannot start threads")?.block_on(carry_out(errand, Client::new(cli.socket)))
        }
    }
}

async fn carry_out(errand: Errand, client: Client) -> Result<u8> {
    match errand {
        Errand::Pki(command) => pki::run(command),
        Errand::Load(arguments) => load::run(&arguments),
        Errand::Set(arguments) => set::run(&client, arguments).await,
        Errand::Resolve(arguments) => resolve::run(&client, arguments).await,
        Errand::Migrate(arguments) => migrate::run(&client, arguments).await,
        Errand::Check(arguments) => Ok(check::run(&client, arguments).await),
        Errand::Status { json } => show::status(&client, json).await,
        Errand::Report { id, json } => show::report(&client, id.as_deref(), json).await,
        Errand::Cancel { id } => show::cancel(&client, id.as_deref()).await,
    }
}
