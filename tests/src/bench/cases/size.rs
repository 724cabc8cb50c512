//! Guests of other sizes.

use anyhow::Result;

use super::{ours, total};
use crate::bench::guests::Guest;
use crate::bench::peers::{Mover, Qemu};
use crate::bench::results::Outcome;
use crate::bench::row::Row;
use crate::bench::session::Session;

/// RAM of the guest that is mostly untouched, MiB.
const SPARSE: u64 = 16 * 1024;
/// The same, for the plot.
const LESS_SPARSE: u64 = 4 * 1024;
/// RAM of guests that are as full as the usual one, MiB.
const FULL: [u64; 3] = [256, 512, 2048];

/// A large guest that has touched no more than the usual one.
pub(super) fn sparse(session: &mut Session<'_>, outcome: &mut Outcome) -> Result<()> {
    let (network, runs) = (session.usual_network(), session.args.runs());
    let small = session.usual_guest();
    let large = Guest { memory: SPARSE, ..small };
    session.compare(network, &small, &[ours()], runs)?;
    session.compare(network, &large, &[ours()], runs)?;
    let time = |guest: &Guest| session.median(network, guest, &ours(), total);
    let ours = time(&large).unwrap_or(f64::NAN);
    let peer = format!("xferry, {} MiB", small.memory);
    // A peer that failed must not make this one hold.
    let small = time(&small).unwrap_or(f64::NAN);
    outcome.rows.push(Row::at_most(
        "16 GiB mostly untouched: total time",
        "ms",
        ours,
        (&peer, Some(small)),
        1.3,
    ));
    Ok(())
}

/// Figures for the plot.
pub(super) fn sizes(session: &mut Session<'_>, _: &mut Outcome) -> Result<()> {
    let (network, runs, usual) = (session.usual_network(), session.args.runs(), session.usual_guest());
    for memory in FULL {
        let guest = Guest { memory, area: memory * usual.area / usual.memory, ..usual };
        session.compare(network, &guest, &[ours(), Mover::Qemu(Qemu::Multifd(2))], runs)?;
    }
    session.compare(network, &Guest { memory: LESS_SPARSE, ..usual }, &[ours()], runs)
}
