//! Everything that was measured, and as what it is kept.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::{Value, json};

use super::figures::Figures;
use super::figures::statistics::median;
use super::row::Row;

/// What a link or a core carries, in one way.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Rate {
    pub name: String,
    pub mib_s: f64,
}

impl Rate {
    pub fn new(name: &str, mib_s: f64) -> Self {
        Self { name: name.to_owned(), mib_s }
    }
}

/// All migrations of one guest by one mover on one migration network.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Series {
    pub guest: String,
    pub mover: String,
    /// MTU and whatever else the network is known by.
    pub network: String,
    /// Pages the guest writes a second; `None` is as many as it can.
    pub pages_per_second: Option<u64>,
    /// The guest's RAM, MiB, and how much of it is filled.
    pub memory_mib: [u64; 2],
    pub runs: Vec<Figures>,
    /// Why there are no more runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

impl Series {
    /// Median over the runs; `None` when a run failed: what did not come to an end has no time.
    pub fn median(&self, of: impl Fn(&Figures) -> f64) -> Option<f64> {
        (self.failed.is_none() && !self.runs.is_empty()).then(|| median(self.runs.iter().map(of)))
    }
}

/// What one case found.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Outcome {
    pub case: &'static str,
    pub rows: Vec<Row>,
    pub rates: Vec<Rate>,
    /// What was not measured, and why.
    pub skipped: Vec<String>,
}

/// All of a run of the program.
#[derive(Default)]
pub(super) struct Results {
    /// What was measured on, in words.
    pub setting: String,
    pub series: Vec<Series>,
    pub outcomes: Vec<Outcome>,
}

impl Results {
    /// `rows` are those of all cases, each with its `case`.
    pub fn to_json(&self, complete: bool) -> Result<Value> {
        let mut rows = Vec::new();
        for outcome in &self.outcomes {
            for row in &outcome.rows {
                let mut row = serde_json::to_value(row)?;
                row["case"] = outcome.case.into();
                rows.push(row);
            }
        }
        let cases: Vec<Value> = self
            .outcomes
            .iter()
            .map(
                |outcome| json!({ "case": outcome.case, "rates": outcome.rates, "skipped": outcome.skipped }),
            )
            .collect();
        Ok(json!({
            "setting": self.setting, "complete": complete, "rows": rows, "cases": cases, "series": self.series
        }))
    }

    /// Writes them so that a reader never sees half of them.
    pub fn write(&self, path: &Path, complete: bool) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.to_json(complete)?)? + "\n";
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
        }
        let draft = path.with_extension("json.new");
        fs::write(&draft, text)
            .and_then(|()| fs::rename(&draft, path))
            .with_context(|| format!("writing {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_all_cases_are_together() {
        let outcome = |case, name| Outcome {
            case,
            rows: vec![Row::within(name, "ms", 1.0, 2.0)],
            ..Outcome::default()
        };
        let results = Results {
            outcomes: vec![outcome("random", "one"), outcome("idle", "two")],
            ..Results::default()
        };
        let json = results.to_json(false).unwrap();
        let rows: Vec<_> =
            json["rows"].as_array().unwrap().iter().map(|row| (&row["case"], &row["name"])).collect();
        assert_eq!(rows, [(&json!("random"), &json!("one")), (&json!("idle"), &json!("two"))]);
        assert_eq!(json["complete"], json!(false));
    }
}
