//! The figures side by side.

use std::{collections::BTreeMap, fmt};

use serde::Serialize;
use serde_json::{Value, json};

use super::{Args, Figures};

/// One comparison.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Row {
    pub name: String,
    pub ours: f64,
    pub peer: f64,
    pub peer_name: String,
    pub unit: &'static str,
    /// ours / peer.
    pub ratio: f64,
    pub bar: f64,
    pub holds: bool,
}

/// All figures of a benchmark.
pub struct Table {
    setting: String,
    figures: BTreeMap<&'static str, Vec<Figures>>,
    rows: Vec<Row>,
}

pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Table {
    pub(super) fn new(args: &Args) -> Self {
        let setting = format!(
            "{} MiB guest, {} MiB random data, {} dirty pages/s, veth with MTU {}, {} queue(s), medians of {} runs",
            args.memory, args.fill, args.rate, args.mtu, args.queues, args.runs
        );
        println!("{setting}");
        Self { setting, figures: BTreeMap::new(), rows: Vec::new() }
    }

    pub(super) fn add(&mut self, who: &'static str, figures: Figures) {
        let rate = figures.rate_mib.map(|rate| format!(", round 0 at {rate:.0} MiB/s")).unwrap_or_default();
        println!("  {who:<15} {:>7.0} ms, blackout {:>6.1} ms{rate}", figures.total_ms, figures.downtime_ms);
        self.figures.entry(who).or_default().push(figures);
    }

    fn median_of(&self, who: &str, of: impl Fn(&Figures) -> f64) -> f64 {
        median(self.figures.get(who).map(|all| all.iter().map(of).collect()).unwrap_or_default())
    }

    /// The peer whose median is least.
    fn best_peer(&self, of: impl Fn(&Figures) -> f64 + Copy) -> (&'static str, f64) {
        let peers = self.figures.keys().filter(|who| **who != "xferry");
        let medians = peers.map(|&who| (who, self.median_of(who, of)));
        medians.min_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or(("nobody", f64::NAN))
    }

    /// Makes the rows; `tcp` is the best rate of TCP on the link.
    pub(super) fn compare(&mut self, tcp: Option<(String, f64)>) {
        let total = |figures: &Figures| figures.total_ms;
        let downtime = |figures: &Figures| figures.downtime_ms;
        let ours = self.median_of("xferry", total);
        let default = ("QEMU default", self.median_of("QEMU default", total));
        self.rows.push(Row::at_most("total time against QEMU's default", "ms", ours, default, 1.0));
        self.rows.push(Row::at_most(
            "total time against QEMU's best",
            "ms",
            ours,
            self.best_peer(total),
            0.5,
        ));
        let blackout = self.median_of("xferry", downtime);
        self.rows.push(Row::at_most(
            "blackout against QEMU's shortest",
            "ms",
            blackout,
            self.best_peer(downtime),
            1.0,
        ));
        if let Some((name, rate)) = tcp {
            let ours = self.median_of("xferry", |figures| figures.rate_mib.unwrap_or(f64::NAN));
            self.rows.push(Row::at_least(
                "payload rate of round 0 against TCP",
                "MiB/s",
                ours,
                (&name, rate),
                1.2,
            ));
        }
    }

    pub(super) fn to_json(&self) -> Value {
        let figures: BTreeMap<_, Vec<Value>> = self
            .figures
            .iter()
            .map(|(who, all)| {
                let all = all.iter().map(
                    |f| json!({ "total-time": f.total_ms, "downtime": f.downtime_ms, "rate": f.rate_mib }),
                );
                (*who, all.collect())
            })
            .collect();
        json!({ "setting": self.setting, "rows": self.rows, "figures": figures })
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{:<38} {:>9} {:>9} {:>6} {:>6}  peer", "", "xferry", "peer", "ratio", "bar")?;
        for row in &self.rows {
            writeln!(
                f,
                "{} {:<36} {:>9.1} {:>9.1} {:>6.2} {:>6.2}  {}, {}",
                if row.holds { '✓' } else { '✗' },
                row.name,
                row.ours,
                row.peer,
                row.ratio,
                row.bar,
                row.peer_name,
                row.unit
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn the_middle_one_counts() {
        assert!((median(vec![9.0, 1.0, 5.0]) - 5.0).abs() < f64::EPSILON);
    }
}
