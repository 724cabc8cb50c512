//! What was measured, for the terminal.

use std::fmt::Write;

use super::figures::Figures;
use super::figures::statistics::median;
use super::results::{Results, Series};
use super::row::Row;

/// Medians of all series, rates, and the bars.
pub(super) fn render(results: &Results) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = write_all(&mut text, results);
    text
}

fn write_all(text: &mut String, results: &Results) -> std::fmt::Result {
    if !results.series.is_empty() {
        writeln!(text, "\nmedians (of the runs in brackets)")?;
    }
    let mut heading = String::new();
    for series in &results.series {
        let group = format!("{}; {}", series.guest, series.network);
        if group != heading {
            write_heading(text, &group)?;
            heading = group;
        }
        write_series(text, series)?;
    }
    for outcome in &results.outcomes {
        for rate in &outcome.rates {
            writeln!(text, "{}: {} {:.0} MiB/s", outcome.case, rate.name, rate.mib_s)?;
        }
    }
    if results.outcomes.iter().any(|outcome| !outcome.rows.is_empty()) {
        writeln!(text, "\n{}", Row::heading())?;
    }
    for outcome in &results.outcomes {
        for row in &outcome.rows {
            writeln!(text, "{row}")?;
        }
        for reason in &outcome.skipped {
            writeln!(text, "– {}: not measured: {reason}", outcome.case)?;
        }
    }
    Ok(())
}

fn write_heading(text: &mut String, group: &str) -> std::fmt::Result {
    writeln!(text, "\n{group}")?;
    writeln!(
        text,
        "  {:<30} {:>8} {:>8} {:>9} {:>7} {:>8} {:>15} {:>9} {:>6}",
        "", "total", "blackout", "pre-copy", "CPU", "softirq", "by side", "wire", "guest"
    )?;
    writeln!(
        text,
        "  {:<30} {:>8} {:>8} {:>9} {:>7} {:>8} {:>15} {:>9} {:>6}",
        "", "ms", "ms", "MiB/s", "s", "s", "s", "MiB", "%"
    )
}

fn write_series(text: &mut String, series: &Series) -> std::fmt::Result {
    let of = |of: &dyn Fn(&Figures) -> f64| median(series.runs.iter().map(of));
    let known = |value: f64, digits: usize| {
        if value.is_nan() { "–".to_owned() } else { format!("{value:.digits$}") }
    };
    let mover = format!("{} ({})", series.mover, series.runs.len());
    if let Some(reason) = &series.failed {
        // Before it stands what led there, and all of it in the JSON.
        let reason = reason.lines().last().unwrap_or_default();
        return writeln!(text, "  {mover:<30} failed: {reason}");
    }
    let sides = format!("{:.2} + {:.2}", of(&|f| f.side_cpu_s[0]), of(&|f| f.side_cpu_s[1]));
    writeln!(
        text,
        "  {mover:<30} {:>8.0} {:>8.1} {:>9} {:>7.2} {:>8.2} {:>15} {:>9.0} {:>6}",
        of(&|f| f.total_ms),
        of(&|f| f.blackout_ms),
        known(of(&|f| f.pre_copy_mib_s.unwrap_or(f64::NAN)), 0),
        of(&|f| f.cpu_s),
        of(&|f| f.softirq_s),
        sides,
        of(&|f| f.wire_bytes as f64 / super::figures::MIB),
        known(of(&|f| f.guest.map_or(f64::NAN, |pace| pace.kept() * 100.0)), 0),
    )
}

#[cfg(test)]
mod tests {
    use super::super::results::{Outcome, Rate};
    use super::*;

    #[test]
    fn everything_is_shown() {
        let failed = Series {
            guest: "bare".into(),
            mover: "QEMU default".into(),
            network: "MTU 9000".into(),
            pages_per_second: Some(100_000),
            memory_mib: [1024, 900],
            runs: Vec::new(),
            failed: Some("the end of a log:\ntakes longer than 40 s".into()),
        };
        let outcome = Outcome {
            case: "dirtying",
            rows: vec![Row::at_most("blackout", "ms", 9.0, ("QEMU", None), 0.5)],
            rates: vec![Rate::new("iperf3", 1234.0)],
            skipped: vec!["no iperf3".into()],
        };
        let results = Results { series: vec![failed], outcomes: vec![outcome], ..Results::default() };
        let text = render(&results);
        for part in [
            "bare; MTU 9000\n",
            "failed: takes longer than 40 s\n",
            "iperf3 1234 MiB/s",
            "✓ blackout",
            "not measured: no iperf3",
        ] {
            assert!(text.contains(part), "{part:?} in {text}");
        }
    }
}
