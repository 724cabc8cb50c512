//! The same guest at several paces.

use anyhow::Result;

use super::{blackout_of, ours, qemus, total};
use crate::bench::peers::{Mover, Qemu};
use crate::bench::results::Outcome;
use crate::bench::row::Row;
use crate::bench::session::Session;
use crate::guest::Rate;

/// Pages a second with one peer, for the plot.
const PACES: [u64; 3] = [0, 5_000, 20_000];
/// Pages a second with all peers, for the bar.
const FAST: u64 = 100_000;

pub(super) fn run(session: &mut Session<'_>, outcome: &mut Outcome) -> Result<()> {
    let (network, runs) = (session.usual_network(), session.args.runs());
    let fast = session.usual_guest().at(Rate::PerSecond(FAST));
    let movers = [vec![ours()], qemus()].concat();
    session.compare(network, &fast, &movers, runs)?;
    let time = session.median(network, &fast, &ours(), total).unwrap_or(f64::NAN);
    let (name, least) = session.least(network, &fast, &qemus(), total);
    outcome.rows.push(Row::at_most("100,000 pages/s: total time", "ms", time, (&name, least), 0.5));
    let blackout = session.median(network, &fast, &ours(), blackout_of).unwrap_or(f64::NAN);
    let (name, least) = session.least(network, &fast, &qemus(), blackout_of);
    outcome.rows.push(Row::at_most("100,000 pages/s: blackout", "ms", blackout, (&name, least), 0.5));
    for pace in PACES {
        let guest = session.usual_guest().at(Rate::PerSecond(pace));
        session.compare(network, &guest, &[ours(), Mover::Qemu(Qemu::Multifd(2))], runs)?;
    }
    Ok(())
}
