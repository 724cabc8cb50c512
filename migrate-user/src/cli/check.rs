//! `xferry check`: asks whether a migration would work.

use anyhow::Result;
use xferry::{
    agent::{CheckAnswer, MigrateRequest},
    datapath::Compression,
    migration::TimeoutAction,
    preflight::{self, Outcome},
};

use super::client::Client;

#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    /// Name of the VM on this host
    vm: String,
    /// Name or address of the host to go to
    #[arg(long)]
    to: String,
    /// Override findings that cannot cost the VM, as missing CPU features; each is named
    #[arg(long)]
    force: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Shows what was found. Returns the exit code: not being able to ask is not knowing.
pub async fn run(client: &Client, arguments: CheckArgs) -> u8 {
    match ask(client, &arguments).await {
        Ok(outcome) => outcome.exit_code(),
        Err(error) => {
            eprintln!("xferry: {error:#}");
            Outcome::CouldNotTell.exit_code()
        }
    }
}

async fn ask(client: &Client, arguments: &CheckArgs) -> Result<Outcome> {
    let request = MigrateRequest {
        vm: arguments.vm.clone(),
        to: arguments.to.clone(),
        force: arguments.force,
        bandwidth_mib: None,
        downtime_limit_ms: None,
        timeout_s: None,
        timeout_action: TimeoutAction::Cancel,
        auto_converge: false,
        verify: None,
        compression: Compression::None,
        keep_source: false,
    };
    let answer: CheckAnswer = client.post("/v1/check", &request).await?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&answer)?);
    } else {
        let report = &answer.report;
        let table = preflight::table(&report.vm, &report.source, &report.destination, &answer.findings);
        print!("{table}");
    }
    Ok(answer.outcome)
}
