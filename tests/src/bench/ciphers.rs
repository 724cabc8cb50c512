//! What encryption costs whole migrations, by cipher. What it costs one core in memory says
//! `cargo bench -p migrate-user --bench protection`.

use std::fs;

use anyhow::{Context, Result};

use super::{Figures, table::median};
use crate::lab::Host;

/// Clock ticks of `/proc/PID/stat` in a second (`USER_HZ`, 100 on every Linux that this runs on).
const TICKS: f64 = 100.0;

/// A way of guarding frames: its name and the agent's settings for it.
pub(super) struct Guarding {
    pub name: &'static str,
    pub settings: &'static str,
}

/// All of them; the first is what the others are compared with.
pub(super) const ALL: [Guarding; 4] = [
    Guarding { name: "CRC32C (off)", settings: "encryption = \"off\"" },
    Guarding { name: "aes-128-gcm", settings: "ciphers = [\"aes-128-gcm\"]" },
    Guarding { name: "aes-256-gcm", settings: "ciphers = [\"aes-256-gcm\"]" },
    Guarding { name: "chacha20-poly1305", settings: "ciphers = [\"chacha20-poly1305\"]" },
];

/// One migration, and what the agents worked for it.
pub(super) struct Cost {
    pub figures: Figures,
    /// Processor time of the agents of source and destination, s.
    pub cpu: [f64; 2],
}

/// Processor time that the agent of a host has used, s.
pub(super) fn agent_cpu(host: &Host) -> Result<f64> {
    let pid = host.agent_pid().context("no agent runs")?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Fields 14 and 15, counted from behind the name (proc_pid_stat(5)).
    let behind = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks = behind.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<f64>().ok());
    Ok(ticks.sum::<f64>() / TICKS)
}

/// Prints the migrations, medians by way of guarding.
pub(super) fn print(costs: &[Vec<Cost>]) {
    println!(
        "\n{:<18} {:>9} {:>9} {:>12} {:>12} {:>14} {:>12}",
        "", "total ms", "ratio", "round 0 MiB/s", "blackout ms", "source CPU s", "dest. CPU s"
    );
    let of = |costs: &[Cost], of: &dyn Fn(&Cost) -> f64| median(costs.iter().map(of).collect());
    let total = |cost: &Cost| cost.figures.total_ms;
    let first = costs.first().map_or(f64::NAN, |costs| of(costs, &total));
    for (guarding, costs) in ALL.iter().zip(costs) {
        println!(
            "{:<18} {:>9.0} {:>9.2} {:>12.0} {:>12.1} {:>14.2} {:>12.2}",
            guarding.name,
            of(costs, &total),
            of(costs, &total) / first,
            of(costs, &|cost| cost.figures.rate_mib.unwrap_or(f64::NAN)),
            of(costs, &|cost| cost.figures.downtime_ms),
            of(costs, &|cost| cost.cpu[0]),
            of(costs, &|cost| cost.cpu[1]),
        );
    }
}
