//! AF_XDP and UDP sockets at either end, in turn.

use anyhow::{Context, Result, ensure};

use super::{MIB, migrate, table::median};
use crate::lab::{Host, Lab, Report, Side, VmConfig};

/// By what frames leave host-a, and by what they arrive at host-b.
const PAIRS: [[&str; 2]; 4] = [["af-xdp", "af-xdp"], ["af-xdp", "udp"], ["udp", "af-xdp"], ["udp", "udp"]];

/// Migrates `runs` times by each pair, by turns, and prints the medians.
///
/// # Errors
/// If a migration fails.
pub(super) fn compare(lab: &Lab, config: &VmConfig, runs: u32) -> Result<()> {
    let mut rates: [Vec<f64>; PAIRS.len()] = Default::default();
    let mut blackouts = rates.clone();
    // The first is not counted: it touches memory that the machine below has yet to find.
    for run in 0..=runs {
        for (index, pair) in PAIRS.into_iter().enumerate() {
            let start = |host: &Host| host.start_agent_on(pair[usize::from(host.side() == Side::B)]);
            let (report, _) = migrate(lab, config, start).with_context(|| format!("{pair:?}"))?;
            if run > 0 {
                rates[index].push(pre_copy(&report)?);
                blackouts[index].push(report.milliseconds("/downtime").context("a report without downtime")?);
            }
        }
    }
    println!("{:<18} {:>15} {:>7} {:>12}", "from → to", "pre-copy MiB/s", "ratio", "blackout ms");
    let best = median(rates[0].clone());
    for (index, [from, to]) in PAIRS.into_iter().enumerate() {
        let rate = median(std::mem::take(&mut rates[index]));
        let blackout = median(std::mem::take(&mut blackouts[index]));
        println!("{:<18} {rate:>15.0} {:>7.2} {blackout:>12.1}", format!("{from} → {to}"), rate / best);
    }
    Ok(())
}

/// Page content of the rounds while the VM ran, by their time, MiB/s.
fn pre_copy(report: &Report) -> Result<f64> {
    let last =
        |index: usize| report.get(&format!("/rounds/{index}/last")).and_then(serde_json::Value::as_bool);
    let rounds = report.rounds();
    let running = rounds.iter().enumerate().filter(|(index, _)| last(*index) != Some(true));
    let (bytes, ms) =
        running.fold((0, 0.0), |(bytes, ms), (_, round)| (bytes + round.bytes, ms + round.duration_ms));
    ensure!(ms > 0.0, "a report without rounds");
    Ok(bytes as f64 / MIB / (ms / 1e3))
}
