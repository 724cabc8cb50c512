//! `--check`: whether bars that held when they were recorded still hold about as well.
//!
//! Coarse on purpose: ratios vary by tens of per cent from run to run on a small machine, and a guard that cries wolf is
//! switched off. What is found is a change that took a third of the speed away.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::results::Outcome;
use super::row::Better;

/// How good a ratio has to be beside the recorded one.
const KEPT: f64 = 0.7;

/// The bars that held on a machine, as kept in the repository.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Recorded {
    /// What they were measured on, in words.
    pub setting: String,
    pub rows: Vec<RecordedRow>,
}

/// One of them.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct RecordedRow {
    pub case: String,
    pub name: String,
    pub ratio: f64,
    pub better: Better,
}

impl Recorded {
    /// The bars that hold now.
    pub fn of(setting: &str, outcomes: &[Outcome]) -> Self {
        let mut rows = Vec::new();
        for outcome in outcomes {
            for row in outcome.rows.iter().filter(|row| row.holds) {
                // Without a ratio there is nothing to compare with later.
                if let Some(ratio) = row.ratio {
                    let (case, name) = (outcome.case.to_owned(), row.name.clone());
                    rows.push(RecordedRow { case, name, ratio, better: row.better });
                }
            }
        }
        Self { setting: setting.to_owned(), rows }
    }

    /// Reads what was recorded.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path)
            .with_context(|| format!("reading {}: record it first, with --record", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is not a record", path.display()))
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        fs::write(path, text).with_context(|| format!("writing {}", path.display()))
    }

    /// Names of the cases that have a bar to keep.
    pub fn cases(&self) -> Vec<String> {
        let mut cases: Vec<String> = self.rows.iter().map(|row| row.case.clone()).collect();
        cases.dedup();
        cases
    }

    /// What is worse than recorded, one line each. Bars of cases that were not asked for are not looked at.
    pub fn regressions(&self, outcomes: &[Outcome]) -> Vec<String> {
        let asked = |row: &&RecordedRow| outcomes.iter().any(|outcome| outcome.case == row.case);
        self.rows.iter().filter(asked).filter_map(|row| row.regression(outcomes)).collect()
    }
}

impl RecordedRow {
    fn regression(&self, outcomes: &[Outcome]) -> Option<String> {
        let outcome = outcomes.iter().find(|outcome| outcome.case == self.case)?;
        let Some(row) = outcome.rows.iter().find(|row| row.name == self.name) else {
            return Some(format!("{}: {}: was not measured", self.case, self.name));
        };
        // The peer did not end: we are better than ever.
        let ratio = row.ratio?;
        let kept = match self.better {
            Better::Higher => ratio / self.ratio,
            Better::Lower => self.ratio / ratio,
        };
        // Also when it is no number.
        (kept.is_nan() || kept < KEPT).then(|| {
            format!(
                "{}: {}: ratio {ratio:.2}, recorded {:.2}: {kept:.2} times as good, and {KEPT} is asked for",
                self.case, self.name, self.ratio
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::row::Row;
    use super::*;

    fn outcome(time: f64, rate: f64) -> Vec<Outcome> {
        let rows = vec![
            Row::at_most("time", "ms", time, ("QEMU", Some(100.0)), 0.5),
            Row::at_least("rate", "MiB/s", rate, ("iperf3", 100.0), 1.2),
        ];
        vec![Outcome { case: "random", rows, ..Outcome::default() }]
    }

    #[test]
    fn only_what_holds_is_recorded() {
        let recorded = Recorded::of("here", &outcome(40.0, 100.0));
        assert_eq!(recorded.rows.len(), 1);
        assert_eq!((recorded.rows[0].name.as_str(), recorded.cases()), ("time", vec!["random".to_owned()]));
        assert!(recorded.regressions(&outcome(40.0, 1.0)).is_empty());
    }

    #[test]
    fn a_third_worse_is_noticed_in_both_directions() {
        let recorded = Recorded::of("here", &outcome(40.0, 200.0));
        assert_eq!(recorded.rows.len(), 2);
        assert!(recorded.regressions(&outcome(57.0, 141.0)).is_empty());
        let lines = recorded.regressions(&outcome(58.0, 139.0));
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines[0].contains("time") && lines[1].contains("rate"));
        assert_eq!(recorded.regressions(&outcome(f64::NAN, 200.0)).len(), 1);
    }

    #[test]
    fn a_bar_that_is_gone_is_noticed_only_where_its_case_ran() {
        let recorded = Recorded::of("here", &outcome(40.0, 200.0));
        let nothing = vec![Outcome { case: "random", ..Outcome::default() }];
        assert_eq!(recorded.regressions(&nothing).len(), 2);
        assert!(recorded.regressions(&[]).is_empty());
    }
}
