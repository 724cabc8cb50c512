//! `xferry resolve`: a human decides whose a VM is that the agents cannot settle.

use std::io::{IsTerminal, Write};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use xferry::{
    agent::{Choice, ResolveRequest, Unsettled},
    migration::Resolution,
};

use super::client::Client;

#[derive(Debug, clap::Args)]
pub struct ResolveArgs {
    /// Id of the migration, as `xferry status` shows it under "unsettled"
    id: String,
    /// The VM is this host's
    #[arg(long, conflicts_with = "give_up")]
    keep_here: bool,
    /// The VM is not this host's
    #[arg(long)]
    give_up: bool,
    /// Do not ask: what must be true is true
    #[arg(long)]
    yes: bool,
}

pub async fn run(client: &Client, arguments: ResolveArgs) -> Result<u8> {
    let status: Value = client.get("/v1/status").await?;
    let unsettled: Vec<Unsettled> = serde_json::from_value(status["unsettled"].clone())
        .context("the agent's status is not understood")?;
    let Some(found) = unsettled.iter().find(|found| found.id == arguments.id) else {
        let known: Vec<&str> = unsettled.iter().map(|found| found.id.as_str()).collect();
        bail!(
            "no migration {:?} waits to be settled on this host ({})",
            arguments.id,
            if known.is_empty() { "none does".to_owned() } else { known.join(", ") }
        );
    };
    println!("{}: {}", found.id, found.state);
    let Some(choice) = &found.choice else {
        println!("The agents settle this themselves; there is nothing to decide.");
        return Ok(1);
    };
    let resolution = match (arguments.keep_here, arguments.give_up) {
        (true, _) => Resolution::KeepHere,
        (_, true) => Resolution::GiveUp,
        _ => {
            print!("{}", explained(choice));
            println!(
                "When the two hosts can talk again they settle it themselves. Only if that will not be, say one of the two."
            );
            return Ok(1);
        }
    };
    let warning = match resolution {
        Resolution::KeepHere => &choice.keep_here,
        Resolution::GiveUp => &choice.give_up,
    };
    println!("WARNING: {warning}.");
    if !arguments.yes && !confirmed(&found.vm)? {
        bail!("nothing was done");
    }
    let path = format!("/v1/migrations/{}/resolve", found.id);
    let _: Unsettled = client.post(&path, &ResolveRequest { resolution }).await?;
    println!("told the agent; `xferry status` shows what comes of it");
    Ok(0)
}

/// Both choices with what must be true.
pub fn explained(choice: &Choice) -> String {
    format!("  --keep-here  {}\n  --give-up    {}\n", choice.keep_here, choice.give_up)
}

fn confirmed(vm: &str) -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        bail!("nobody is there to confirm it: say --yes if all of that is true");
    }
    print!("Is all of that true? Type the VM's name ({vm}) to go on: ");
    std::io::stdout().flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(answer.trim() == vm)
}
