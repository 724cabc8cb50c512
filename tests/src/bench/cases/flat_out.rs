//! Guests that write as fast as they can: without throttling they would never be done.

use anyhow::Result;

use super::{blackout_of, total};
use crate::bench::figures::Figures;
use crate::bench::guests::{Backing, Guest};
use crate::bench::peers::{LIMIT, Mover, Xferry, xferry};
use crate::bench::results::Outcome;
use crate::bench::row::Row;
use crate::bench::session::Session;
use crate::guest::{GuestKind, Rate};

/// The default of `--downtime-limit`, ms.
const BLACKOUT_LIMIT: f64 = 300.0;
/// How much of their RAM the guests write, MiB.
const AREA: u64 = 256;

/// The option that this is about.
const THROTTLED: Xferry =
    Xferry { name: "xferry, auto-converge", options: &["--auto-converge"], ..Xferry::DEFAULT };

/// A guest of the usual one's size.
pub(super) fn guest(session: &Session<'_>, kind: GuestKind, backing: Backing) -> Guest {
    Guest { kind, backing, area: AREA, rate: Rate::Max, ..session.usual_guest() }
}

/// Millions of pages a second.
pub(super) fn native(session: &mut Session<'_>, outcome: &mut Outcome) -> Result<()> {
    let guest = guest(session, GuestKind::Bare, Backing::Tmpfs);
    moves(session, outcome, guest)
}

/// An operating system, with an instruction set that is translated.
pub(super) fn linux(session: &mut Session<'_>, outcome: &mut Outcome) -> Result<()> {
    let guest = guest(session, GuestKind::Linux, Backing::Tmpfs);
    moves(session, outcome, guest)
}

/// Such a guest comes to an end, and in time.
pub(super) fn moves(session: &mut Session<'_>, outcome: &mut Outcome, guest: Guest) -> Result<()> {
    let network = session.usual_network();
    if !xferry::knows(&session.bed(network.mtu)?.lab, "--auto-converge")? {
        outcome.skipped.push(format!("{guest}: `xferry migrate` has no --auto-converge"));
        return Ok(());
    }
    let mover = Mover::Xferry(THROTTLED);
    session.compare(network, &guest, std::slice::from_ref(&mover), session.args.runs())?;
    let value = |of: fn(&Figures) -> f64| session.median(network, &guest, &mover, of).unwrap_or(f64::NAN);
    let limit_ms = LIMIT.as_secs_f64() * 1e3;
    outcome.rows.push(Row::within(&format!("{guest}: total time"), "ms", value(total), limit_ms));
    outcome.rows.push(Row::within(&format!("{guest}: blackout"), "ms", value(blackout_of), BLACKOUT_LIMIT));
    Ok(())
}
