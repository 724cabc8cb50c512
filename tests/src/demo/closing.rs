//! The closing report of a migration, and the summary of all.

use super::crossing::Migration;
use crate::lab::Report;

/// Prints what one migration did and whether each check holds.
pub(super) fn print_report(migration: &Migration) {
    let report = &migration.report;
    println!();
    for (name, value) in figures(report) {
        println!("  {name:<16}{value}");
    }
    println!();
    for verdict in migration.checks.verdicts(report, migration.source) {
        let sign = if verdict.holds { '✓' } else { '✗' };
        println!("  {sign} {:<30}{}", verdict.what, verdict.seen);
    }
    println!();
}

fn figures(report: &Report) -> Vec<(&'static str, String)> {
    let ms =
        |pointer| report.milliseconds(pointer).map_or_else(|| "?".to_owned(), |ms| format!("{ms:.1} ms"));
    let rounds = report.rounds();
    let lost: u64 = rounds.iter().map(|round| round.lost_frames).sum();
    let phases: Vec<String> =
        report.downtime_phases().iter().map(|(name, ms)| format!("{name} {ms:.1}")).collect();
    let mut list = vec![
        ("total time", format!("{} (set-up {})", ms("/total-time"), ms("/setup-time"))),
        ("rounds", format!("{}, {lost} frames lost and sent again", rounds.len())),
        ("RAM", memory(report)),
        ("transport", transport(report)),
        ("blackout", ms("/downtime")),
    ];
    if !phases.is_empty() {
        list.push(("", phases.join(" · ")));
    }
    list
}

fn memory(report: &Report) -> String {
    let mib =
        |pointer| report.count(pointer).map_or_else(|| "?".to_owned(), |bytes| (bytes >> 20).to_string());
    let pages = |pointer| report.count(pointer).map_or_else(|| "?".to_owned(), |pages| pages.to_string());
    format!(
        "{} of {} MiB transferred, {} pages sent, {} known to be zero",
        mib("/ram/transferred"),
        mib("/ram/total"),
        pages("/ram/normal"),
        pages("/ram/duplicate")
    )
}

fn transport(report: &Report) -> String {
    let text = |pointer| report.text(pointer).unwrap_or("?");
    let zero_copy = match report.get("/transport/zero-copy").and_then(serde_json::Value::as_bool) {
        Some(true) => "zero-copy",
        Some(false) => "copy",
        None => "copy mode unknown",
    };
    let mtu = report.count("/transport/mtu").map_or_else(|| "?".to_owned(), |mtu| mtu.to_string());
    if text("/transport/mode") == "udp" {
        return format!("udp, MTU {mtu}; receiver {}", text("/transport/receiver"));
    }
    format!("{}, XDP {}, {zero_copy}, MTU {mtu}", text("/transport/mode"), text("/transport/xdp-mode"))
}

/// Prints one line per migration and the median blackout.
pub(super) fn print_summary(migrations: &[Migration]) {
    println!(
        "  {:<6}{:<20}{:>12}{:>14}{:>12}{:>16}",
        "", "", "total ms", "blackout ms", "pings lost", "longest gap ms"
    );
    for (index, migration) in migrations.iter().enumerate() {
        let sign = if migration.holds() { '✓' } else { '✗' };
        let way = format!("{} → {}", migration.source, migration.source.other());
        let report = |pointer| dash(migration.report.milliseconds(pointer), |ms| format!("{ms:.1}"));
        let checks = &migration.checks;
        println!(
            "  {sign} {:<4}{way:<20}{:>12}{:>14}{:>12}{:>16}",
            index + 1,
            report("/total-time"),
            report("/downtime"),
            dash(checks.pings_lost, |lost| lost.to_string()),
            dash(checks.longest_gap_ms, |ms| format!("{ms:.1}")),
        );
    }
    let completed = migrations.iter().filter(|migration| migration.report.status() == Some("completed"));
    let blackouts: Vec<f64> =
        completed.filter_map(|migration| migration.report.milliseconds("/downtime")).collect();
    let count = blackouts.len();
    if let Some(median) = median(blackouts) {
        println!("\n  blackout median {median:.1} ms over {count} completed migrations");
    }
}

fn dash<T>(value: Option<T>, shown: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| "–".to_owned(), shown)
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    if values.len() % 2 == 1 {
        return Some(upper);
    }
    Some((values[values.len() / 2 - 1] + upper) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_and_even() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn incomplete_report_can_be_shown() {
        let report = Report::parse("{}").unwrap();
        assert!(figures(&report).iter().any(|(_, value)| value.contains('?')));
    }
}
