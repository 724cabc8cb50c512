//! What one core can do with the data path in memory, as `cargo bench -p migrate-user --bench datapath` found it last.

use anyhow::Result;

use crate::bench::peers::criterion;
use crate::bench::results::Outcome;
use crate::bench::row::Row;
use crate::bench::session::Session;

/// What a link of 100 Gbit/s carries, GB/s.
const LINK: f64 = 12.5;
const MTUS: [u32; 2] = [9000, 65_535];

pub(super) fn run(_: &mut Session<'_>, outcome: &mut Outcome) -> Result<()> {
    for mtu in MTUS {
        let rate = |name: &str| criterion::rate(&format!("{name}/{mtu}"));
        if let Some(send) = rate("send/direct") {
            let name = format!("one core sending directly, in memory, MTU {mtu}");
            outcome.rows.push(Row::at_least(&name, "GB/s", send, ("100 Gbit/s", LINK), 1.0));
        }
        if let Some((receive, copy)) = rate("receive/crc32c").zip(rate("receive/memcpy")) {
            let name = format!("one core receiving, in memory, MTU {mtu}");
            outcome.rows.push(Row::at_least(&name, "GB/s", receive, ("memcpy", copy), 0.85));
        }
    }
    if outcome.rows.is_empty() {
        outcome.skipped.push("run `cargo bench -p migrate-user --bench datapath` before".to_owned());
    }
    Ok(())
}
