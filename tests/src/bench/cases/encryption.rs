//! Encrypted beside encrypted, and plain beside plain; guests in pages of 4 KiB, and in huge pages of tmpfs, which is how
//! operations.md recommends to set hosts up.

use anyhow::Result;

use super::{ours, qemus, total};
use crate::bench::guests::{Backing, Guest};
use crate::bench::peers::{Mover, Qemu, Xferry};
use crate::bench::results::Outcome;
use crate::bench::row::Row;
use crate::bench::session::Session;

const PLAIN: Mover =
    Mover::Xferry(Xferry { name: "xferry, plain", settings: "encryption = \"off\"", ..Xferry::DEFAULT });

pub(super) fn run(session: &mut Session<'_>, outcome: &mut Outcome) -> Result<()> {
    let network = session.usual_network();
    let encrypted = [2, 4].map(|channels| Mover::Qemu(Qemu::MultifdTls(channels)));
    for backing in [Backing::Tmpfs, Backing::HugeTmpfs] {
        let guest = Guest { backing, ..session.usual_guest() };
        let movers = [vec![ours(), PLAIN], qemus(), encrypted.to_vec()].concat();
        session.compare(network, &guest, &movers, session.args.runs())?;
        for (what, own, peers) in
            [("encrypted", ours(), encrypted.to_vec()), ("not encrypted", PLAIN, qemus())]
        {
            let time = session.median(network, &guest, &own, total).unwrap_or(f64::NAN);
            let (name, least) = session.least(network, &guest, &peers, total);
            let row = format!("{guest}, {what}: total time against QEMU's best");
            outcome.rows.push(Row::at_most(&row, "ms", time, (&name, least), 0.5));
        }
    }
    Ok(())
}
