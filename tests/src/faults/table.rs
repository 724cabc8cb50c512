//! What all runs came to: counts, and fault by phase.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Map, Value, json};

use super::judge::{Kind, Outcome, Phase};
use super::plan::Fault;
use super::run::Run;

/// One cell: how often what became of the VM.
type Counts = BTreeMap<Outcome, u64>;

/// All runs so far.
#[derive(Debug, Default)]
pub struct Tally {
    runs: u64,
    cells: BTreeMap<Fault, BTreeMap<Phase, Counts>>,
    /// Runs with a failure of a kind; a run may have several.
    failures: BTreeMap<Kind, u64>,
}

impl Tally {
    pub(super) fn add(&mut self, fault: Fault, run: &Run) {
        self.runs += 1;
        let cell = self.cells.entry(fault).or_default().entry(run.phase).or_default();
        *cell.entry(run.outcome).or_default() += 1;
        for kind in Kind::ALL {
            if run.failures.iter().any(|failure| failure.kind == kind) {
                *self.failures.entry(kind).or_default() += 1;
            }
        }
    }

    /// Runs so far.
    pub fn runs(&self) -> u64 {
        self.runs
    }

    /// Whether nothing happened that must not.
    pub fn holds(&self) -> bool {
        self.failures.is_empty()
    }

    fn count(&self, kind: Kind) -> u64 {
        self.failures.get(&kind).copied().unwrap_or_default()
    }

    fn outcomes<'a>(&'a self, of: impl Iterator<Item = &'a Counts>) -> Counts {
        let mut sum = Counts::new();
        for (outcome, count) in of.flatten() {
            *sum.entry(*outcome).or_default() += count;
        }
        sum
    }

    /// What became of the VM in all runs.
    fn total(&self) -> Counts {
        self.outcomes(self.cells.values().flat_map(BTreeMap::values))
    }

    /// The counts and the table, as fields.
    pub(super) fn fields(&self) -> Map<String, Value> {
        let mut fields = Map::new();
        fields.insert("runs".to_owned(), self.runs.into());
        for kind in Kind::ALL {
            fields.insert(kind.name().to_owned(), self.count(kind).into());
        }
        let cells = self.cells.iter().flat_map(|(fault, phases)| {
            phases.iter().map(move |(phase, counts)| {
                let mut cell = json!({"fault": fault.to_string(), "phase": phase.name()});
                for outcome in Outcome::ALL {
                    cell[outcome.name()] = counts.get(&outcome).copied().unwrap_or_default().into();
                }
                cell
            })
        });
        fields.insert("table".to_owned(), cells.collect());
        fields
    }

    /// Rows of text: a heading, one for each fault, and the sums.
    fn rows(&self) -> Vec<Vec<String>> {
        let heading = ["fault"].into_iter().chain(Phase::ALL.map(Phase::name)).chain(["all"]);
        let mut rows = vec![heading.map(ToOwned::to_owned).collect()];
        let none = Counts::new();
        for (fault, phases) in &self.cells {
            let mut row = vec![fault.to_string()];
            row.extend(Phase::ALL.map(|phase| words(phases.get(&phase).unwrap_or(&none))));
            row.push(words(&self.outcomes(phases.values())));
            rows.push(row);
        }
        let mut sums = vec!["all".to_owned()];
        let of_phase =
            |phase| self.outcomes(self.cells.values().filter_map(move |phases| phases.get(&phase)));
        sums.extend(Phase::ALL.map(|phase| words(&of_phase(phase))));
        sums.push(words(&self.total()));
        rows.push(sums);
        rows
    }

    /// The table in Markdown.
    pub fn markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let rows = self.rows();
        let rule = vec!["---".to_owned(); rows[0].len()];
        let mut text = line(&rows[0]) + &line(&rule);
        text.extend(rows[1..].iter().map(|row| line(row)));
        text.push('\n');
        text.push_str(&self.totals());
        text.push('\n');
        text
    }

    fn totals(&self) -> String {
        let kinds = Kind::ALL.map(|kind| format!("{} {}", kind.name(), self.count(kind)));
        format!("{} runs: {}.", self.runs, kinds.join(", "))
    }
}

fn words(counts: &Counts) -> String {
    let parts: Vec<String> =
        counts.iter().map(|(outcome, count)| format!("{count} {}", outcome.name())).collect();
    parts.join(", ")
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = self.rows();
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
        for row in &rows {
            let cells: Vec<String> =
                row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
            writeln!(f, "{}", cells.join("  ").trim_end())?;
        }
        write!(f, "\n{}", self.totals())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::judge::Failure;
    use super::super::plan::Role;
    use super::*;
    use crate::lab::Side;

    fn run(phase: Phase, outcome: Outcome, kinds: &[Kind]) -> Run {
        Run {
            phase,
            outcome,
            failures: kinds.iter().map(|&kind| Failure::new(kind, "x")).collect(),
            settled_after: Duration::ZERO,
            after_stop: None,
            blackout: Duration::ZERO,
            owner: Side::A,
        }
    }

    fn tally() -> Tally {
        let mut tally = Tally::default();
        let fault = Fault::KillAgent(Role::Source);
        tally.add(fault, &run(Phase::Switchover, Outcome::Moved, &[]));
        tally.add(fault, &run(Phase::Switchover, Outcome::Moved, &[]));
        tally.add(Fault::Cancel, &run(Phase::Prepare, Outcome::Stayed, &[]));
        tally
    }

    #[test]
    fn cells_count_what_became_of_the_vm() {
        let tally = tally();
        let text = tally.markdown();
        assert!(text.contains("| kill source agent |  |  |  | 2 moved |  | 2 moved |"), "{text}");
        assert!(text.contains("| all | 1 stayed |  |  | 2 moved |  | 2 moved, 1 stayed |"), "{text}");
        assert_eq!(text.lines().next().unwrap().matches('|').count(), 8);
        assert!(tally.to_string().contains("3 runs: lost-vms 0"), "{tally}");
    }

    #[test]
    fn a_failure_of_a_kind_counts_once_for_each_run() {
        let mut tally = tally();
        assert!(tally.holds());
        tally.add(Fault::Cancel, &run(Phase::After, Outcome::Failed, &[Kind::Leftovers, Kind::Leftovers]));
        assert!(!tally.holds());
        let fields = tally.fields();
        assert_eq!(
            (&fields["runs"], &fields["leftovers"], &fields["hangs"]),
            (&json!(4), &json!(1), &json!(0))
        );
        assert_eq!(fields["table"].as_array().map(Vec::len), Some(3));
    }
}
