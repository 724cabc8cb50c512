//! `xferry set`: changes a migration that is under way.

use anyhow::Result;
use xferry::agent::{SetAnswer, SetRequest};

use super::client::Client;

#[derive(Debug, clap::Args)]
pub struct SetArgs {
    /// Id of the migration; `xferry status` lists them
    id: String,
    /// Limit on the wire from now on, MiB/s; 0 takes it away
    #[arg(long, value_name = "MIB/S")]
    bandwidth: u64,
}

pub async fn run(client: &Client, arguments: SetArgs) -> Result<u8> {
    let request = SetRequest { bandwidth_mib: arguments.bandwidth };
    let path = format!("/v1/migrations/{}/set", arguments.id);
    let SetAnswer { id, bandwidth_mib } = client.post(&path, &request).await?;
    match bandwidth_mib {
        0 => println!("{id}: no limit on the wire"),
        mib => println!("{id}: at most {mib} MiB/s on the wire"),
    }
    Ok(0)
}
