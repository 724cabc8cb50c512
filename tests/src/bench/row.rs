//! One comparison with a bar.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Which of two ratios is the better one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Better {
    /// Times, processor time, memory.
    Lower,
    /// Rates.
    Higher,
}

/// A figure of ours beside a peer's, or beside a number that is asked for.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Row {
    /// What it is; no other row of the case has this name.
    pub name: String,
    pub ours: f64,
    /// `None` when the peer did not come to an end.
    pub peer: Option<f64>,
    pub peer_name: String,
    pub unit: &'static str,
    /// ours / peer.
    pub ratio: Option<f64>,
    /// What the ratio should be at most, or at least.
    pub bar: f64,
    pub better: Better,
    pub holds: bool,
}

impl Row {
    /// A row whose ratio should be at most `bar`. A peer that has no figure has failed where we have not.
    pub fn at_most(
        name: &str,
        unit: &'static str,
        ours: f64,
        (peer_name, peer): (&str, Option<f64>),
        bar: f64,
    ) -> Self {
        let ratio = peer.map(|peer| ours / peer);
        let holds = ratio.is_none_or(|ratio| ratio <= bar);
        let (name, peer_name) = (name.to_owned(), peer_name.to_owned());
        Self { name, ours, peer, peer_name, unit, ratio, bar, better: Better::Lower, holds }
    }

    /// A row whose ratio should be at least `bar`.
    pub fn at_least(
        name: &str,
        unit: &'static str,
        ours: f64,
        (peer_name, peer): (&str, f64),
        bar: f64,
    ) -> Self {
        let ratio = ours / peer;
        Self {
            name: name.to_owned(),
            ours,
            peer: Some(peer),
            peer_name: peer_name.to_owned(),
            unit,
            ratio: Some(ratio),
            bar,
            better: Better::Higher,
            holds: ratio >= bar,
        }
    }

    /// A row with a limit that is a number and no peer's figure.
    pub fn within(name: &str, unit: &'static str, ours: f64, limit: f64) -> Self {
        Self::at_most(name, unit, ours, ("limit", Some(limit)), 1.0)
    }

    /// The table's heading.
    pub fn heading() -> String {
        format!("{:<62} {:>9} {:>9} {:>6}   {:<5} peer, unit", "", "xferry", "peer", "ratio", "bar")
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |value: Option<f64>, digits: usize| {
            value.map_or_else(|| "–".to_owned(), |value| format!("{value:.digits$}"))
        };
        write!(
            f,
            "{} {:<60} {:>9} {:>9} {:>6} {} {:<5} {}, {}",
            if self.holds { '✓' } else { '✗' },
            self.name,
            number(Some(self.ours), 1),
            number(self.peer, 1),
            number(self.ratio, 2),
            if self.better == Better::Lower { '≤' } else { '≥' },
            self.bar,
            self.peer_name,
            self.unit
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn less_time_and_more_rate_hold() {
        assert!(Row::at_most("time", "ms", 50.0, ("QEMU", Some(100.0)), 0.5).holds);
        assert!(!Row::at_most("time", "ms", 51.0, ("QEMU", Some(100.0)), 0.5).holds);
        assert!(Row::at_least("rate", "MiB/s", 120.0, ("iperf3", 100.0), 1.2).holds);
        assert!(!Row::at_least("rate", "MiB/s", 119.0, ("iperf3", 100.0), 1.2).holds);
        assert!(Row::within("blackout", "ms", 15.0, 15.0).holds);
    }

    #[test]
    fn a_peer_that_never_ended_is_beaten_and_has_no_ratio() {
        let row = Row::at_most("time", "ms", 50.0, ("QEMU", None), 0.5);
        assert!(row.holds && row.ratio.is_none());
        // Not even a peer beats a figure that we do not have.
        assert!(!Row::at_most("time", "ms", f64::NAN, ("QEMU", Some(1.0)), 0.5).holds);
    }

    #[test]
    fn json_has_the_agreed_names() {
        let row = serde_json::to_value(Row::at_most("time", "ms", 50.0, ("QEMU", Some(100.0)), 0.5)).unwrap();
        for name in ["name", "ours", "peer", "peer-name", "unit", "ratio", "bar", "holds"] {
            assert!(row.get(name).is_some(), "{name}");
        }
        assert_eq!((row["ratio"].as_f64(), row["better"].as_str()), (Some(0.5), Some("lower")));
    }
}
