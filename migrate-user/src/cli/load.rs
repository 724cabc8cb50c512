//! `xferry load`: the XDP program alone on a NIC.

use std::time::{Duration, Instant};

use anyhow::Result;
use xferry::{
    network::{Bouncer, Nic},
    privileges,
};

#[derive(Debug, clap::Args)]
pub struct LoadArgs {
    /// Interface
    interface: String,
    /// UDP port of the page stream
    #[arg(long, default_value_t = 4791)]
    port: u16,
    /// Detach after this many seconds; 0 is never
    #[arg(long, default_value_t = 0)]
    seconds: u64,
}

pub fn run(arguments: &LoadArgs) -> Result<u8> {
    privileges::check(&privileges::XDP)?;
    let nic = Nic::read(&arguments.interface)?;
    let bouncer = Bouncer::attach(&nic, arguments.port)?;
    println!(
        "attached to {} (index {}, MTU {}) in {:?} mode for UDP port {}; Ctrl-C detaches",
        nic.name,
        nic.index,
        nic.mtu,
        bouncer.mode(),
        arguments.port
    );
    let begun = Instant::now();
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let drops: Vec<String> =
            bouncer.drops().iter().map(|drop| format!("{} {}", drop.reason, drop.frames)).collect();
        println!("{:>5} s  dropped: {}", begun.elapsed().as_secs(), drops.join(", "));
        if arguments.seconds > 0 && begun.elapsed().as_secs() >= arguments.seconds {
            return Ok(0);
        }
    }
}
