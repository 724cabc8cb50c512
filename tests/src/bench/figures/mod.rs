//! The figures of one migration, and how they are come by. All but the mover's own words are taken from outside, in the
//! same way whoever migrates.

pub(super) mod guest;
mod memory;
mod observer;
pub(super) mod processor;
pub(super) mod statistics;

use anyhow::{Context, Result};
use serde::Serialize;

pub(super) use observer::{Observed, Observer};

use crate::lab::Report;
use guest::Pace;

pub(super) const MIB: f64 = 1024.0 * 1024.0;

/// What the mover says of its migration.
#[derive(Clone, Debug, Default)]
pub(super) struct Told {
    /// From the request to the end, ms. With xferry everything: preflight, the start of the QEMU at the destination, closing. QEMU does
    /// not count the start of the other QEMU, which somebody else has to do.
    pub total_ms: f64,
    /// Of that, until the first page left, ms.
    pub setup_ms: f64,
    /// The blackout, ms.
    pub blackout_ms: f64,
    /// Round by round; only xferry tells.
    pub rounds: Vec<Round>,
    /// By what pages travelled; only xferry tells.
    pub transport: Option<String>,
}

/// One pass over memory.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Round {
    /// Pages to send.
    pub pages: u64,
    /// Page content sent, bytes.
    pub bytes: u64,
    /// ms.
    pub duration_ms: f64,
    /// Page content a second.
    pub mib_s: f64,
    /// Pages that the guest wrote meanwhile.
    pub dirtied_pages: u64,
    /// Whether the VM was stopped.
    pub last: bool,
}

/// One migration's figures.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Figures {
    /// See [`Told::total_ms`].
    pub total_ms: f64,
    /// See [`Told::setup_ms`].
    pub setup_ms: f64,
    /// From the source's STOP to the destination's RESUME, ms.
    pub blackout_ms: f64,
    /// The same in the mover's own words, ms.
    pub told_blackout_ms: f64,
    /// Page content of all rounds while the VM ran, by their time, MiB/s; only xferry tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pre_copy_mib_s: Option<f64>,
    /// Bytes on the migration network, both directions.
    pub wire_bytes: u64,
    /// Processor time of the machine less the guest's, s.
    pub cpu_s: f64,
    /// Softirqs in it that ran in nobody's time, s.
    pub softirq_s: f64,
    /// Of the processes at the source and at the destination, less the guest's, s.
    pub side_cpu_s: [f64; 2],
    /// Most memory of their own that the agents had, source and destination, bytes; 0 without agents.
    pub agent_bytes: [u64; 2],
    /// The guest's pace, where it writes enough to tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest: Option<Pace>,
    /// By what pages travelled; only xferry tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transport: Option<String>,
    /// Only xferry tells.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rounds: Vec<Round>,
}

impl Figures {
    pub fn new(told: Told, seen: Observed) -> Self {
        Self {
            pre_copy_mib_s: pre_copy_rate(&told.rounds),
            total_ms: told.total_ms,
            setup_ms: told.setup_ms,
            blackout_ms: seen.blackout_ms,
            told_blackout_ms: told.blackout_ms,
            wire_bytes: seen.wire_bytes,
            cpu_s: seen.cpu_s,
            softirq_s: seen.softirq_s,
            side_cpu_s: seen.side_cpu_s,
            agent_bytes: seen.agent_bytes,
            guest: seen.guest,
            transport: told.transport,
            rounds: told.rounds,
        }
    }
}

#[cfg(test)]
impl Figures {
    /// A migration of which little is known.
    pub fn sample(total_ms: f64, rounds: Vec<Round>) -> Self {
        Self {
            total_ms,
            setup_ms: 10.0,
            blackout_ms: 8.0,
            told_blackout_ms: 8.0,
            pre_copy_mib_s: None,
            wire_bytes: 0,
            cpu_s: 0.0,
            softirq_s: 0.0,
            side_cpu_s: [0.0; 2],
            agent_bytes: [0; 2],
            guest: None,
            transport: None,
            rounds,
        }
    }
}

impl Told {
    /// What xferry's report says.
    pub fn from_report(report: &Report) -> Result<Self> {
        let ms = |path: &str| report.milliseconds(path).with_context(|| format!("a report without {path}"));
        let rounds = report.rounds();
        anyhow::ensure!(!rounds.is_empty(), "a report without rounds");
        let last =
            |index: usize| report.get(&format!("/rounds/{index}/last")).and_then(|last| last.as_bool());
        let rounds = rounds.iter().enumerate().map(|(index, round)| Round {
            pages: round.pages,
            bytes: round.bytes,
            duration_ms: round.duration_ms,
            mib_s: round.bytes as f64 / MIB / (round.duration_ms / 1e3),
            dirtied_pages: round.dirtied_pages,
            last: last(index) == Some(true),
        });
        Ok(Self {
            total_ms: ms("/total-time")?,
            setup_ms: ms("/setup-time")?,
            blackout_ms: ms("/downtime")?,
            rounds: rounds.collect(),
            transport: report.text("/transport/mode").map(str::to_owned),
        })
    }
}

/// Page content of the rounds while the VM ran, by their time, MiB/s.
pub(super) fn pre_copy_rate(rounds: &[Round]) -> Option<f64> {
    let running = rounds.iter().filter(|round| !round.last);
    let (bytes, ms) =
        running.fold((0, 0.0), |(bytes, ms), round| (bytes + round.bytes, ms + round.duration_ms));
    (ms > 0.0).then(|| bytes as f64 / MIB / (ms / 1e3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_round_is_not_pre_copy() {
        let report = Report::parse(
            r#"{"total-time":900.0,"setup-time":10.5,"downtime":8.0,"transport":{"mode":"udp"},"something-new":{},
                "rounds":[{"round":0,"pages":512,"bytes":2097152,"duration-ms":1000.0,"dirtied-pages":7,"last":false},
                          {"round":1,"pages":7,"bytes":28672,"duration-ms":1.0,"last":true}]}"#,
        )
        .unwrap();
        let told = Told::from_report(&report).unwrap();
        assert_eq!((told.rounds.len(), told.rounds[1].last), (2, true));
        assert_eq!(told.transport.as_deref(), Some("udp"));
        assert!((pre_copy_rate(&told.rounds).unwrap() - 2.0).abs() < 1e-9);
        assert!((told.rounds[0].mib_s - 2.0).abs() < 1e-9);
        assert_eq!(pre_copy_rate(&told.rounds[1..]), None);
    }

    #[test]
    fn a_report_without_figures_is_refused() {
        assert!(Told::from_report(&Report::parse(r#"{"total-time":1.0,"rounds":[]}"#).unwrap()).is_err());
    }
}
