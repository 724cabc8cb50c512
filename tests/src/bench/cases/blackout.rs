//! Many cutovers of one guest that goes there and back.

use std::time::Duration;

use anyhow::{Context, Result};

use super::{blackout_of, ours, qemus};
use crate::bench::bed::Bed;
use crate::bench::figures::statistics::{median, percentile};
use crate::bench::figures::{Figures, Observer};
use crate::bench::guests::Guest;
use crate::bench::peers::Mover;
use crate::bench::results::{Outcome, Series};
use crate::bench::row::Row;
use crate::bench::session::{Session, series_of};
use crate::lab::Side;

/// How long the old VMM may take to end.
const GONE: Duration = Duration::from_secs(20);
/// One in so many of our cutovers is made by each of QEMU's ways too.
const PEERS_SHARE: u32 = 10;
/// What the median, and 99 of 100, should not exceed, ms.
const LIMITS: [f64; 2] = [15.0, 50.0];

pub(super) fn run(session: &mut Session<'_>, outcome: &mut Outcome) -> Result<()> {
    let (network, guest, cutovers) =
        (session.usual_network(), session.usual_guest(), session.args.cutovers());
    let mut best: Option<(String, f64)> = None;
    let mut ours_median = f64::NAN;
    for mover in [vec![ours()], qemus()].concat() {
        let own = mover == ours();
        let count = if own { cutovers } else { cutovers.div_ceil(PEERS_SHARE).max(3) };
        let mut series = series_of(network, &guest, &mover);
        series.network += ", there and back";
        let bed = session.bed(network.mtu)?;
        if let Err(error) = there_and_back(bed, &guest, &mover, count, &mut series) {
            println!("  {mover}: FAILED: {error:#}");
            series.failed = Some(format!("{error:#}"));
            bed.clear()?;
        }
        let blackouts = || series.runs.iter().map(blackout_of);
        let late = percentile(blackouts(), 99.0);
        println!(
            "  {mover:<22} {} cutovers: median {:.1} ms, 99 % {late:.1} ms, most {:.1} ms",
            series.runs.len(),
            median(blackouts()),
            percentile(blackouts(), 100.0)
        );
        if own {
            ours_median = series.median(blackout_of).unwrap_or(f64::NAN);
            let (name, limit) = ("blackout: median", LIMITS[0]);
            outcome.rows.push(Row::within(name, "ms", ours_median, limit));
            let late = if series.failed.is_none() { late } else { f64::NAN };
            outcome.rows.push(Row::within("blackout: 99th percentile", "ms", late, LIMITS[1]));
        } else if let Some(middle) = series.median(blackout_of)
            && best.as_ref().is_none_or(|(_, least)| middle < *least)
        {
            best = Some((mover.to_string(), middle));
        }
        session.results.series.push(series);
    }
    let (name, least) = best.unzip();
    let name = name.unwrap_or_else(|| "none came to an end".to_owned());
    outcome.rows.push(Row::at_most(
        "blackout: median against QEMU's",
        "ms",
        ours_median,
        (&name, least),
        1.0,
    ));
    Ok(())
}

fn there_and_back(bed: &Bed, guest: &Guest, mover: &Mover, cutovers: u32, series: &mut Series) -> Result<()> {
    mover.prepare(bed, guest)?;
    bed.boot(guest)?;
    let mut source = Side::A;
    for cutover in 0..cutovers {
        let begun = Observer::start(&bed.lab, source)?.begin()?;
        let told = mover.migrate(bed, guest, source).with_context(|| format!("cutover {cutover}"))?;
        series.runs.push(Figures::new(told, begun.finish()?));
        match mover {
            Mover::Xferry(_) => bed.lab.host(source).wait_vm_gone(GONE)?,
            // The old QEMU waits for somebody to end it.
            Mover::Qemu(_) => bed.clear_guest(source)?,
        }
        source = source.other();
    }
    bed.expect_sound()?;
    bed.clear()
}
