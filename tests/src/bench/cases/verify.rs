//! What comparing all RAM costs: `--verify`, and `--verify=full`, which reads it while the VM is stopped.

use anyhow::Result;

use super::{blackout_of, ours, total};
use crate::bench::figures::Figures;
use crate::bench::peers::{Mover, Xferry};
use crate::bench::results::Outcome;
use crate::bench::row::Row;
use crate::bench::session::Session;

const VERIFIED: Mover =
    Mover::Xferry(Xferry { name: "xferry --verify", options: &["--verify"], ..Xferry::DEFAULT });
const IN_FULL: Mover =
    Mover::Xferry(Xferry { name: "xferry --verify=full", options: &["--verify=full"], ..Xferry::DEFAULT });

pub(super) fn run(session: &mut Session<'_>, outcome: &mut Outcome) -> Result<()> {
    let (network, guest) = (session.usual_network(), session.usual_guest());
    session.compare(network, &guest, &[ours(), VERIFIED, IN_FULL], session.args.runs())?;
    let mut compare = |name, figure: fn(&Figures) -> f64| {
        let verified = session.median(network, &guest, &VERIFIED, figure).unwrap_or(f64::NAN);
        let without = session.median(network, &guest, &ours(), figure);
        outcome.rows.push(Row::at_most(name, "ms", verified, ("without", without), 1.5));
    };
    compare("--verify: total time", total);
    compare("--verify: blackout", blackout_of);
    Ok(())
}
