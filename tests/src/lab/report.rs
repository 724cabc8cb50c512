//! The report of a migration, as `xferry report --json` prints it.

use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A report, unchanged, with accessors for what the lab looks at. A field that is missing reads as
/// `None`, never as a default: a check on it then fails.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Report(pub Value);

/// One pre-copy round.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Round {
    /// Number, from 0.
    pub round: u64,
    /// Pages sent.
    pub pages: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// Milliseconds it took.
    pub duration_ms: f64,
    /// Pages the guest dirtied meanwhile.
    #[serde(default)]
    pub dirtied_pages: u64,
    /// Frames that did not arrive.
    #[serde(default)]
    pub lost_frames: u64,
}

impl Report {
    /// Reads the command's output.
    ///
    /// # Errors
    /// If it is not JSON.
    pub fn parse(text: &str) -> Result<Self> {
        serde_json::from_str(text).map(Self).with_context(|| format!("not a JSON report: {text:?}"))
    }

    /// The value at a path such as `/ram/total`.
    pub fn get(&self, pointer: &str) -> Option<&Value> {
        self.0.pointer(pointer)
    }

    /// Text at a path.
    pub fn text(&self, pointer: &str) -> Option<&str> {
        self.get(pointer)?.as_str()
    }

    /// A count at a path.
    pub fn count(&self, pointer: &str) -> Option<u64> {
        self.get(pointer)?.as_u64()
    }

    /// Milliseconds at a path.
    pub fn milliseconds(&self, pointer: &str) -> Option<f64> {
        self.get(pointer)?.as_f64()
    }

    /// `completed`, `cancelled` or `failed`.
    pub fn status(&self) -> Option<&str> {
        self.text("/status")
    }

    /// Whether all RAM was equal on both sides; `None` if that was not looked at.
    pub fn verified(&self) -> Option<bool> {
        self.get("/verified")?.as_bool()
    }

    /// How long no side ran the VM, by the agents' own measure.
    pub fn downtime(&self) -> Option<Duration> {
        let milliseconds = self.milliseconds("/downtime")?;
        Duration::try_from_secs_f64(milliseconds / 1000.0).ok()
    }

    /// The phases of the downtime with their milliseconds.
    pub fn downtime_phases(&self) -> Vec<(String, f64)> {
        let phases = self.get("/downtime-phases").and_then(Value::as_object);
        let pairs = phases.into_iter().flatten().filter_map(|(name, ms)| Some((name.clone(), ms.as_f64()?)));
        pairs.collect()
    }

    /// The pre-copy rounds.
    pub fn rounds(&self) -> Vec<Round> {
        self.get("/rounds").and_then(|rounds| Vec::deserialize(rounds).ok()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accessors_read_the_fields() {
        let report = Report::parse(
            r#"{"status":"completed","verified":null,"downtime":12.5,
                "downtime-phases":{"stop":1.0,"load":2.5},"ram":{"total":42},
                "rounds":[{"round":0,"pages":3,"bytes":12288,"duration-ms":1.5,"dirtied-pages":7,"lost-frames":0}]}"#,
        )
        .unwrap();
        assert_eq!(report.status(), Some("completed"));
        assert_eq!(report.verified(), None);
        assert_eq!(report.downtime(), Some(Duration::from_micros(12_500)));
        assert_eq!(report.count("/ram/total"), Some(42));
        assert_eq!(report.rounds()[0].dirtied_pages, 7);
        assert_eq!(report.downtime_phases().len(), 2);
    }

    #[test]
    fn missing_fields_are_none() {
        let report = Report::parse("{}").unwrap();
        assert!(report.status().is_none() && report.downtime().is_none() && report.rounds().is_empty());
        assert!(Report::parse("no").is_err());
    }
}
