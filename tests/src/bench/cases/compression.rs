//! Guests whose memory compresses.

use anyhow::{Context, Result, bail};

use super::{ours, total};
use crate::bench::figures::MIB;
use crate::bench::guests::Guest;
use crate::bench::peers::{Mover, Qemu, Xferry, xferry};
use crate::bench::results::Outcome;
use crate::bench::row::Row;
use crate::bench::session::{Network, Session};
use crate::guest::Fill;

/// As `tc` says it, and in MiB/s.
const SLOW: (&str, f64) = ("1gbit", 1e9 / 8.0 / MIB);
/// How much more than its rate a shaped link may seem to have let through: what it lets through at once counts for a short
/// migration, and not all of a migration's time is measured.
const TOLERANCE: f64 = 1.15;

/// A link that is slower than any compression. By UDP sockets: what AF_XDP sends from copies goes past a queueing discipline.
pub(super) fn shaped(session: &mut Session<'_>, outcome: &mut Outcome) -> Result<()> {
    let network = Network { shape: Some(SLOW.0), ..session.usual_network() };
    let guest = Guest { fill: Fill::Records, ..session.usual_guest() };
    let (ours, peer) = (Mover::Xferry(Xferry::UDP), Mover::Qemu(Qemu::MultifdZstd(2)));
    session.compare(network, &guest, &[ours.clone(), peer.clone()], session.args.runs())?;
    for mover in [&ours, &peer] {
        let rate = session.median(network, &guest, mover, |figures| {
            figures.wire_bytes as f64 / MIB / ((figures.total_ms - figures.setup_ms) / 1e3)
        });
        if let Some(rate) = rate.filter(|rate| *rate > SLOW.1 * TOLERANCE) {
            bail!("{mover} had {rate:.0} MiB/s of a link shaped to {:.0}: it went past the shaping", SLOW.1);
        }
    }
    let time = |mover| session.median(network, &guest, mover, total);
    let row = Row::at_most(
        "1 Gbit/s, compressible guest: total time",
        "ms",
        time(&ours).unwrap_or(f64::NAN),
        (&peer.to_string(), time(&peer)),
        0.5,
    );
    outcome.rows.push(row);
    Ok(())
}

/// The slow link by each way of packing, whatever would be chosen.
pub(super) fn codecs(session: &mut Session<'_>, _: &mut Outcome) -> Result<()> {
    const CODECS: [Xferry; 4] = [
        Xferry { name: "xferry, auto", ..Xferry::UDP },
        Xferry { name: "xferry, lz4", options: &["--compression", "lz4"], ..Xferry::UDP },
        Xferry { name: "xferry, zstd", options: &["--compression", "zstd"], ..Xferry::UDP },
        Xferry { name: "xferry, none", options: &["--compression", "none"], ..Xferry::UDP },
    ];
    let network = Network { shape: Some(SLOW.0), ..session.usual_network() };
    let guest = Guest { fill: Fill::Records, ..session.usual_guest() };
    session.compare(network, &guest, &CODECS.map(Mover::Xferry), session.args.runs())
}

/// A link that is faster than compression may be: choosing must not cost.
pub(super) fn fast(session: &mut Session<'_>, outcome: &mut Outcome) -> Result<()> {
    const NONE: Xferry =
        Xferry { name: "xferry, no compression", options: &["--compression", "none"], ..Xferry::DEFAULT };
    let (network, runs) = (session.usual_network(), session.args.runs());
    let guest = Guest { fill: Fill::Records, ..session.usual_guest() };
    if !xferry::knows(&session.bed(network.mtu)?.lab, "--compression")? {
        session.compare(network, &guest, &[ours()], runs)?;
        outcome.skipped.push("choosing compression: `xferry migrate` has no --compression".to_owned());
        return Ok(());
    }
    let none = Mover::Xferry(NONE);
    session.compare(network, &guest, &[ours(), none.clone()], runs)?;
    let time = |mover| session.median(network, &guest, mover, total);
    let plain = time(&none).context("the guest could not be moved without compression")?;
    let name = "compressible guest, fast link: total time with compression chosen";
    let chosen = time(&ours()).unwrap_or(f64::NAN);
    // "Never slower", and as much as runs of the same differ.
    outcome.rows.push(Row::at_most(name, "ms", chosen, (&none.to_string(), Some(plain)), 1.1));
    Ok(())
}
