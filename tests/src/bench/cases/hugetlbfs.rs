//! Guests in huge pages, where the kernel tells of changes by 2 MiB.

use anyhow::Result;

use super::{agent_limit, agent_mib, flat_out, ours};
use crate::bench::guests::{Backing, Guest};
use crate::bench::results::Outcome;
use crate::bench::row::Row;
use crate::bench::session::Session;
use crate::guest::{GuestKind, Rate};

/// Pages of 4 KiB that the guest writes a second.
const PACES: [u64; 4] = [5_000, 0, 20_000, 100_000];

pub(super) fn run(session: &mut Session<'_>, outcome: &mut Outcome) -> Result<()> {
    let network = session.usual_network();
    let usual = Guest { backing: Backing::Hugetlbfs, ..session.usual_guest() };
    for pace in PACES {
        session.compare(network, &usual.at(Rate::PerSecond(pace)), &[ours()], session.args.runs())?;
    }
    // With a table of what each page held.
    let first = usual.at(Rate::PerSecond(PACES[0]));
    if let Some(memory) = session.median(network, &first, &ours(), agent_mib) {
        let name = "huge pages: an agent's own memory, against 64 MiB + 24 B/page";
        outcome.rows.push(Row::within(name, "MiB", memory, agent_limit(&usual, 24)));
    }
    let flat_out = flat_out::guest(session, GuestKind::Bare, Backing::Hugetlbfs);
    flat_out::moves(session, outcome, flat_out)
}
