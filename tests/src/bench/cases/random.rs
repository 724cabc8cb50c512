//! The usual guest against everybody.

use anyhow::Result;

use super::{agent_limit, agent_mib, best, ours, pre_copy, qemus, total};
use crate::bench::figures::Figures;
use crate::bench::peers::{Mover, Qemu, Xferry, af_xdp, iperf};
use crate::bench::results::Outcome;
use crate::bench::row::Row;
use crate::bench::session::{Network, Session};

pub(super) fn run(session: &mut Session<'_>, outcome: &mut Outcome) -> Result<()> {
    let (network, guest) = (session.usual_network(), session.usual_guest());
    let movers = [vec![ours()], qemus()].concat();
    session.compare(network, &guest, &movers, session.args.runs())?;
    let value = |of: fn(&Figures) -> f64| session.median(network, &guest, &ours(), of);
    let ours_total = value(total).unwrap_or(f64::NAN);
    let (name, least) = session.least(network, &guest, &qemus(), total);
    outcome.rows.push(Row::at_most("total time against QEMU's best", "ms", ours_total, (&name, least), 0.5));
    // Both moved the same memory, whatever they made of it on the wire.
    let per_gib = |figures: &Figures| figures.cpu_s / guest.filled_gib();
    let multifd = Mover::Qemu(Qemu::Multifd(2));
    let peer = session.median(network, &guest, &multifd, per_gib);
    let cpu = session.median(network, &guest, &ours(), per_gib).unwrap_or(f64::NAN);
    let name = multifd.to_string();
    outcome.rows.push(Row::at_most("CPU of both hosts per GiB of the guest", "s", cpu, (&name, peer), 0.5));
    let memory = value(agent_mib).unwrap_or(f64::NAN);
    let limit = agent_limit(&guest, 8);
    outcome.rows.push(Row::within("an agent's own memory, against 64 MiB + 8 B/page", "MiB", memory, limit));
    link(session, outcome, network, 1.2)
}

/// What the link carries in other ways, beside the pre-copy's payload; `bar` is that against TCP.
pub(super) fn link(
    session: &mut Session<'_>,
    outcome: &mut Outcome,
    network: Network,
    bar: f64,
) -> Result<()> {
    let guest = session.usual_guest();
    let ours_rate = session.median(network, &guest, &ours(), pre_copy).unwrap_or(f64::NAN);
    if let Some(reason) = iperf::missing() {
        outcome.skipped.push(reason.to_owned());
    } else {
        outcome.rates.extend(iperf::measure(&session.bed(network.mtu)?.lab)?);
    }
    if let Some(tcp) = best(&outcome.rates) {
        let name = "pre-copy payload against the best of TCP";
        outcome.rows.push(Row::at_least(name, "MiB/s", ours_rate, (&tcp.name, tcp.mib_s), bar));
    }
    let pair = af_xdp::measure(&session.bed(network.mtu)?.lab)?;
    let af_xdp = Mover::Xferry(Xferry::AF_XDP);
    session.compare(network, &guest, std::slice::from_ref(&af_xdp), 1)?;
    let rate = session.median(network, &guest, &af_xdp, pre_copy).unwrap_or(f64::NAN);
    let name = "pre-copy payload by AF_XDP against a bare AF_XDP pair";
    outcome.rows.push(Row::at_least(name, "MiB/s", rate, (&pair.name, pair.mib_s), 0.9));
    outcome.rates.push(pair);
    Ok(())
}
