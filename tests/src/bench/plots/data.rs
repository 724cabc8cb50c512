//! Which figures make which plot.

use crate::bench::figures::Figures;
use crate::bench::results::{Results, Series};

/// A page is 4 KiB: so many are 1 MiB.
const PAGES_PER_MIB: f64 = 256.0;

/// How the vertical axis is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scale {
    Linear,
    Logarithmic,
}

/// A plot of lines.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Plot {
    pub title: &'static str,
    pub across: &'static str,
    pub up: &'static str,
    pub scale: Scale,
    pub lines: Vec<Line>,
}

/// One of its lines.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Line {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// Rounds over time: what each has to send, for xferry's first run at each pace.
pub(super) fn rounds(results: &Results) -> Plot {
    let mut ours: Vec<&Series> =
        results.series.iter().filter(|series| usual(series) && series.mover == OURS).collect();
    ours.sort_by_key(|series| series.pages_per_second);
    let line = |series: &&Series| {
        Some(Line { name: pace(series.pages_per_second), points: steps(series.runs.first()?) })
    };
    Plot {
        title: "Rounds over time: what each has to send",
        across: "time, ms",
        up: "MiB",
        scale: Scale::Logarithmic,
        lines: ours.iter().filter_map(line).collect(),
    }
}

/// A step for each round: its time, and its size throughout. What is nothing cannot be shown on a logarithmic scale, and is shown
/// as one page.
fn steps(figures: &Figures) -> Vec<(f64, f64)> {
    let mut at = figures.setup_ms;
    let mut points = Vec::new();
    for round in &figures.rounds {
        let size = round.pages.max(1) as f64 / PAGES_PER_MIB;
        points.push((at, size));
        at += round.duration_ms;
        points.push((at, size));
    }
    points
}

/// Blackout by dirty rate, by mover.
pub(super) fn blackout(results: &Results) -> Plot {
    let lines = by_mover(results, usual, |series| {
        // Without the one that writes as fast as it can: it has no place on the axis.
        let pages = series.pages_per_second? as f64 / 1e3;
        Some((pages, series.median(|figures| figures.blackout_ms)?))
    });
    Plot {
        title: "Blackout by dirty rate",
        across: "thousand pages a second",
        up: "ms",
        scale: Scale::Logarithmic,
        lines,
    }
}

/// Total time by guest size, by mover; guests that are mostly untouched are a line of their own.
pub(super) fn sizes(results: &Results) -> Plot {
    let at_usual_pace = |series: &Series| is_cable(series) && is_random(series) && at(series, 5000);
    let point = |series: &Series| {
        let gib = series.memory_mib[0] as f64 / 1024.0;
        Some((gib, series.median(|figures| figures.total_ms)? / 1e3))
    };
    let mut lines = by_mover(results, |series| at_usual_pace(series) && full(series), point);
    // Where the guest is full it is the same guest.
    let touched = |series: &Series| at_usual_pace(series) && series.memory_mib[1] == USUAL_AREA;
    let mut untouched = by_mover(results, |series| touched(series) && series.mover == OURS, point);
    for line in &mut untouched {
        line.name = format!("{}, {USUAL_AREA} MiB touched", line.name);
    }
    lines.extend(untouched);
    Plot { title: "Total time by guest size", across: "GiB", up: "s", scale: Scale::Linear, lines }
}

/// The mover that is xferry as installed.
const OURS: &str = "xferry";
/// Filled memory of the usual guest, MiB.
const USUAL_AREA: u64 = 900;

/// The usual guest, at any pace.
fn usual(series: &Series) -> bool {
    is_cable(series) && is_random(series) && full(series) && series.memory_mib[1] == USUAL_AREA
}

fn is_cable(series: &Series) -> bool {
    series.network == "MTU 9000"
}

fn is_random(series: &Series) -> bool {
    series.guest.contains("random") && !series.guest.contains("huge")
}

/// At least half of it filled.
fn full(series: &Series) -> bool {
    series.memory_mib[1] * 2 >= series.memory_mib[0]
}

fn at(series: &Series, pages: u64) -> bool {
    series.pages_per_second == Some(pages)
}

/// A line for each mover that has more than a point, in the order in which they first come up, its points in order.
fn by_mover(
    results: &Results,
    wanted: impl Fn(&Series) -> bool,
    point: impl Fn(&Series) -> Option<(f64, f64)>,
) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for series in results.series.iter().filter(|series| wanted(series)) {
        let Some(point) = point(series) else { continue };
        match lines.iter_mut().find(|line| line.name == series.mover) {
            Some(line) => line.points.push(point),
            None => lines.push(Line { name: series.mover.clone(), points: vec![point] }),
        }
    }
    lines.retain(|line| line.points.len() > 1);
    for line in &mut lines {
        line.points.sort_by(|one, other| one.0.total_cmp(&other.0));
    }
    lines
}

fn pace(pages: Option<u64>) -> String {
    match pages {
        Some(0) => "idle".to_owned(),
        Some(pages) => format!("{pages} pages/s"),
        None => "flat out".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::figures::Round;
    use super::*;

    fn series(mover: &str, memory_mib: [u64; 2], pages: u64, total_ms: f64) -> Series {
        Series {
            guest: "bare, random".into(),
            mover: mover.into(),
            network: "MTU 9000".into(),
            pages_per_second: Some(pages),
            memory_mib,
            runs: vec![Figures::sample(total_ms, Vec::new())],
            failed: None,
        }
    }

    #[test]
    fn rounds_are_steps() {
        let round = |pages, duration_ms| Round {
            pages,
            bytes: 0,
            duration_ms,
            mib_s: 0.0,
            dirtied_pages: 0,
            last: false,
        };
        let points = steps(&Figures::sample(100.0, vec![round(512, 50.0), round(0, 5.0)]));
        let page = 1.0 / 256.0;
        assert_eq!(points, [(10.0, 2.0), (60.0, 2.0), (60.0, page), (65.0, page)]);
    }

    #[test]
    fn movers_are_lines_in_order_of_pace() {
        let results = Results {
            series: vec![
                series("xferry", [1024, 900], 20_000, 1.0),
                series("xferry", [1024, 900], 0, 1.0),
                series("QEMU default", [1024, 900], 0, 1.0),
                series("QEMU multifd 2", [1024, 900], 0, 1.0),
                series("QEMU multifd 2", [1024, 900], 5_000, 1.0),
                series("xferry", [16_384, 900], 5_000, 1.0),
            ],
            ..Results::default()
        };
        let lines = blackout(&results).lines;
        assert_eq!(
            lines.iter().map(|line| line.name.as_str()).collect::<Vec<_>>(),
            ["xferry", "QEMU multifd 2"]
        );
        assert_eq!(lines[0].points, [(0.0, 8.0), (20.0, 8.0)]);
    }

    #[test]
    fn mostly_untouched_guests_are_a_line_of_their_own() {
        let results = Results {
            series: vec![
                series("xferry", [1024, 900], 5_000, 1000.0),
                series("xferry", [512, 450], 5_000, 500.0),
                series("xferry", [16_384, 900], 5_000, 1200.0),
            ],
            ..Results::default()
        };
        let lines = sizes(&results).lines;
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0].points, [(0.5, 0.5), (1.0, 1.0)]);
        assert_eq!((lines[1].points[0], lines[1].points[1]), ((1.0, 1.0), (16.0, 1.2)));
    }
}
