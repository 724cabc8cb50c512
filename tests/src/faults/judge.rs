//! From what was seen of a run to a verdict: what became of the VM, and what must never happen.

use std::fmt;
use std::time::{Duration, SystemTime};

use super::moment::Progress;
use super::settle::End;
use crate::lab::Side;
use crate::probe::VmEvent;

/// What became of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Outcome {
    /// It runs at the destination.
    Moved,
    /// It runs where it was.
    Stayed,
    /// The fault killed the QEMU that had the VM. No migration can help that.
    OwnFailure,
    /// Something that must never happen.
    Failed,
}

impl Outcome {
    pub const ALL: [Self; 4] = [Self::Moved, Self::Stayed, Self::OwnFailure, Self::Failed];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Moved => "moved",
            Self::Stayed => "stayed",
            Self::OwnFailure => "own-failure",
            Self::Failed => "failed",
        }
    }
}

/// Kinds of what must never happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Kind {
    /// Nobody runs the VM, and that was not the fault's own doing.
    LostVm,
    /// Both hosts ran it at one time, or it went on at the source after it had run at the destination.
    DoubledVm,
    /// The guest found memory that was not what it had written.
    GuestErrors,
    /// The run did not end in time.
    Hang,
    /// Something of the migration is left, or in the next one's way.
    Leftovers,
    /// Not all of the VM's memory is there.
    IncompleteRam,
    /// An agent or a command said what is not so.
    WrongAnswer,
}

impl Kind {
    pub const ALL: [Self; 7] = [
        Self::LostVm,
        Self::DoubledVm,
        Self::GuestErrors,
        Self::Hang,
        Self::Leftovers,
        Self::IncompleteRam,
        Self::WrongAnswer,
    ];

    /// Its name in the results.
    pub const fn name(self) -> &'static str {
        match self {
            Self::LostVm => "lost-vms",
            Self::DoubledVm => "doubled-vms",
            Self::GuestErrors => "guest-errors",
            Self::Hang => "hangs",
            Self::Leftovers => "leftovers",
            Self::IncompleteRam => "incomplete-ram",
            Self::WrongAnswer => "wrong-answers",
        }
    }
}

/// One of them, and how it showed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub kind: Kind,
    pub what: String,
}

impl Failure {
    pub fn new(kind: Kind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind.name(), self.what)
    }
}

/// Where in the migration a fault hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Phase {
    Prepare,
    FirstRound,
    LaterRounds,
    /// From the source's STOP to the destination's RESUME.
    Switchover,
    After,
}

impl Phase {
    pub const ALL: [Self; 5] =
        [Self::Prepare, Self::FirstRound, Self::LaterRounds, Self::Switchover, Self::After];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::FirstRound => "round 0",
            Self::LaterRounds => "later rounds",
            Self::Switchover => "switchover",
            Self::After => "after",
        }
    }
}

/// Everything that was seen of a run.
#[derive(Clone, Debug)]
pub(super) struct Evidence {
    /// Where the VM was.
    pub source: Side,
    /// What both QEMUs said, and where.
    pub events: Vec<(Side, VmEvent)>,
    /// On which host the fault killed a QEMU, and when that certainly did not run any more.
    pub killed: Option<(Side, SystemTime)>,
    /// Both QEMUs were seen running when they were asked.
    pub doubled: bool,
    pub end: End,
    /// The destination's journal says that it took the VM.
    pub accepted: bool,
    /// Whether `xferry migrate` ended well; `None` if it was killed.
    pub command: Option<bool>,
    /// How the source's agent says that the migration ended, if it lived to know.
    pub report: Option<String>,
}

impl Evidence {
    fn times(&self, side: Side, name: &str) -> impl Iterator<Item = SystemTime> {
        let of_side = self.events.iter().filter(move |(of, event)| *of == side && event.name == name);
        of_side.map(|(_, event)| event.at)
    }

    /// When the VM was first stopped at the source.
    pub fn stopped(&self) -> Option<SystemTime> {
        self.times(self.source, "STOP").min()
    }

    /// When the VM first ran at the destination.
    pub fn arrived(&self) -> Option<SystemTime> {
        self.times(self.source.other(), "RESUME").min()
    }

    /// Where in the migration something happened at `at`; `progress` is what the agent had said until then.
    pub fn phase(&self, at: SystemTime, progress: Progress) -> Phase {
        let stopped = self.stopped();
        let over = self.arrived().into_iter().chain(self.times(self.source, "RESUME")).min();
        match (stopped, over, progress) {
            (_, Some(over), _) if over <= at => Phase::After,
            (Some(stopped), ..) if stopped <= at => Phase::Switchover,
            (.., Progress::Preparing) => Phase::Prepare,
            (.., Progress::FirstRound) => Phase::FirstRound,
            (.., Progress::LaterRounds) => Phase::LaterRounds,
            // Without a STOP: it is being stopped, or it has failed before.
            (Some(_), _, Progress::Beyond) => Phase::LaterRounds,
            (None, _, Progress::Beyond) => Phase::After,
        }
    }

    /// When a host ran the VM: from and, if it ended, to.
    fn spans(&self, side: Side) -> Vec<(SystemTime, Option<SystemTime>)> {
        let mut changes: Vec<(SystemTime, bool)> = Vec::new();
        if side == self.source {
            changes.push((SystemTime::UNIX_EPOCH, true));
        }
        changes.extend(self.times(side, "RESUME").map(|at| (at, true)));
        // QEMU that ends says SHUTDOWN, and nothing more.
        changes.extend(
            ["STOP", "SHUTDOWN"].iter().flat_map(|name| self.times(side, name)).map(|at| (at, false)),
        );
        changes.extend(self.killed.iter().filter(|(of, _)| *of == side).map(|(_, at)| (*at, false)));
        changes.sort_by_key(|(at, _)| *at);
        let mut spans: Vec<(SystemTime, Option<SystemTime>)> = Vec::new();
        for (at, runs) in changes {
            match (runs, spans.last_mut().filter(|(_, to)| to.is_none())) {
                (true, None) => spans.push((at, None)),
                (false, Some((_, to))) => *to = Some(at),
                // It goes on as it was.
                _ => {}
            }
        }
        spans
    }

    /// The longest time for which nobody ran the VM, and somebody did before and after.
    pub fn blackout(&self) -> Duration {
        let mut spans: Vec<_> = Side::BOTH.into_iter().flat_map(|side| self.spans(side)).collect();
        spans.sort();
        let gaps = spans.windows(2).filter_map(|pair| pair[1].0.duration_since(pair[0].1?).ok());
        gaps.max().unwrap_or_default()
    }

    fn overlap(&self) -> bool {
        let ends_before = |to: Option<SystemTime>, from: SystemTime| to.is_some_and(|to| to <= from);
        let [source, destination] = [self.source, self.source.other()].map(|side| self.spans(side));
        source.iter().any(|one| {
            destination.iter().any(|other| !ends_before(one.1, other.0) && !ends_before(other.1, one.0))
        })
    }

    fn doubled(&self) -> Option<String> {
        if self.overlap() {
            return Some(format!(
                "by the events of both QEMUs they ran the VM at the same time: {}",
                self.story()
            ));
        }
        if self.doubled {
            return Some("both QEMUs said at the same time that they run the VM".to_owned());
        }
        let arrived = self.arrived()?;
        let later = self.times(self.source, "RESUME").any(|at| at > arrived);
        later.then(|| {
            format!("the VM went on at the source after it had run at the destination: {}", self.story())
        })
    }

    /// Who began and ceased to run the VM, in that order, for a message.
    fn story(&self) -> String {
        let told =
            self.events.iter().filter(|(_, event)| ["STOP", "RESUME", "SHUTDOWN"].contains(&&*event.name));
        let mut all: Vec<(SystemTime, String)> =
            told.map(|(side, event)| (event.at, format!("{side} {}", event.name))).collect();
        all.extend(self.killed.map(|(side, at)| (at, format!("{side} killed"))));
        all.sort();
        let first = all.first().map_or(SystemTime::UNIX_EPOCH, |(at, _)| *at);
        let since = |at: SystemTime| at.duration_since(first).unwrap_or_default().as_secs_f64() * 1e3;
        let told: Vec<String> = all.iter().map(|(at, what)| format!("{:.2} ms {what}", since(*at))).collect();
        told.join(", ")
    }

    /// There is no QEMU any more. Whether the fault itself killed the one that had the VM.
    fn own_failure(&self) -> bool {
        let decided = self.accepted || self.arrived().is_some();
        match self.killed {
            // Once the destination has taken the VM, the old QEMU is nobody's.
            Some((side, _)) if side == self.source => !decided,
            // Before that, the one that waits is nobody's yet.
            Some(_) => decided,
            None => false,
        }
    }

    /// What became of the VM, and what went wrong.
    pub fn judge(&self) -> (Outcome, Vec<Failure>) {
        let mut failures: Vec<Failure> =
            self.doubled().map(|what| Failure::new(Kind::DoubledVm, what)).into_iter().collect();
        let outcome = match &self.end {
            End::Runs(side) if *side == self.source => Outcome::Stayed,
            End::Runs(_) => Outcome::Moved,
            End::Gone if self.own_failure() => Outcome::OwnFailure,
            End::Gone => {
                failures.push(Failure::new(Kind::LostVm, format!("no QEMU is left: {}", self.story())));
                Outcome::Failed
            }
            End::Never(open) => {
                failures.push(Failure::new(Kind::Hang, open.clone()));
                Outcome::Failed
            }
        };
        failures.extend(self.wrong_answers(outcome).map(|what| Failure::new(Kind::WrongAnswer, what)));
        (if failures.is_empty() { outcome } else { Outcome::Failed }, failures)
    }

    fn wrong_answers(&self, outcome: Outcome) -> impl Iterator<Item = String> {
        let arrived = self.arrived().is_some();
        let command = (self.command == Some(true) && !arrived)
            .then(|| "`xferry migrate` ended well, and the VM never ran at the destination".to_owned());
        let report = self.report.as_deref().filter(|status| match *status {
            "completed" => !arrived && !self.accepted,
            "failed" | "cancelled" => arrived,
            _ => false,
        });
        let report = report.map(|status| {
            format!(
                "the report says {status}, and the VM did {}run at the destination",
                if arrived { "" } else { "not " }
            )
        });
        let journal = (outcome == Outcome::Stayed && self.accepted).then(|| {
            "the VM runs at the source, and the destination's journal says that it was taken".to_owned()
        });
        [command, report, journal].into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: Side = Side::A;
    const DESTINATION: Side = Side::B;

    fn at(ms: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1000) + Duration::from_millis(ms)
    }

    fn event(side: Side, name: &str, ms: u64) -> (Side, VmEvent) {
        (side, VmEvent { name: name.to_owned(), at: at(ms), pid: 1 })
    }

    fn moved() -> Vec<(Side, VmEvent)> {
        vec![event(SOURCE, "STOP", 10), event(DESTINATION, "RESUME", 20), event(SOURCE, "SHUTDOWN", 25)]
    }

    fn evidence(events: Vec<(Side, VmEvent)>, end: End) -> Evidence {
        Evidence {
            source: SOURCE,
            events,
            killed: None,
            doubled: false,
            end,
            accepted: false,
            command: None,
            report: None,
        }
    }

    fn kinds(evidence: &Evidence) -> Vec<Kind> {
        evidence.judge().1.into_iter().map(|failure| failure.kind).collect()
    }

    #[test]
    fn a_vm_moves_or_stays() {
        let mut seen = evidence(moved(), End::Runs(DESTINATION));
        seen.accepted = true;
        assert_eq!(seen.judge(), (Outcome::Moved, vec![]));
        assert_eq!(seen.blackout(), Duration::from_millis(10));
        let stays = vec![event(SOURCE, "STOP", 10), event(SOURCE, "RESUME", 15)];
        assert_eq!(evidence(stays, End::Runs(SOURCE)).judge(), (Outcome::Stayed, vec![]));
    }

    #[test]
    fn two_that_run_are_seen_by_events_and_by_asking() {
        let events =
            vec![event(SOURCE, "STOP", 10), event(DESTINATION, "RESUME", 20), event(SOURCE, "RESUME", 21)];
        assert_eq!(kinds(&evidence(events, End::Runs(DESTINATION))), [Kind::DoubledVm]);
        // The source never stopped.
        let events = vec![event(DESTINATION, "RESUME", 20)];
        assert_eq!(kinds(&evidence(events, End::Runs(DESTINATION))), [Kind::DoubledVm]);
        let mut seen = evidence(moved(), End::Runs(DESTINATION));
        seen.doubled = true;
        assert_eq!(kinds(&seen), [Kind::DoubledVm]);
    }

    #[test]
    fn a_vm_that_ran_at_the_destination_must_not_go_on_at_the_source() {
        let events =
            vec![event(SOURCE, "STOP", 10), event(DESTINATION, "RESUME", 20), event(SOURCE, "RESUME", 30)];
        let mut seen = evidence(events, End::Runs(SOURCE));
        // It never ran twice at once: the destination's was dead by then.
        seen.killed = Some((DESTINATION, at(25)));
        assert!(!seen.overlap());
        assert_eq!(kinds(&seen), [Kind::DoubledVm]);
    }

    #[test]
    fn whose_qemu_died_decides_whether_the_vm_is_lost() {
        let stop = || vec![event(SOURCE, "STOP", 10)];
        let judge = |events, killed: Option<Side>, accepted| {
            let mut seen = evidence(events, End::Gone);
            seen.killed = killed.map(|side| (side, at(15)));
            seen.accepted = accepted;
            seen.judge().0
        };
        assert_eq!(judge(stop(), None, false), Outcome::Failed);
        assert_eq!(judge(stop(), Some(SOURCE), false), Outcome::OwnFailure);
        // It had been taken: the source's end must not matter.
        assert_eq!(judge(stop(), Some(SOURCE), true), Outcome::Failed);
        assert_eq!(judge(moved(), Some(SOURCE), true), Outcome::Failed);
        // The source still had it.
        assert_eq!(judge(stop(), Some(DESTINATION), false), Outcome::Failed);
        assert_eq!(judge(stop(), Some(DESTINATION), true), Outcome::OwnFailure);
        assert_eq!(judge(moved(), Some(DESTINATION), true), Outcome::OwnFailure);
    }

    #[test]
    fn what_was_said_must_be_so() {
        let mut seen = evidence(vec![], End::Runs(SOURCE));
        seen.command = Some(true);
        assert_eq!(kinds(&seen), [Kind::WrongAnswer]);
        seen.command = Some(false);
        seen.report = Some("failed".to_owned());
        assert_eq!(kinds(&seen), []);
        seen.accepted = true;
        assert_eq!(kinds(&seen), [Kind::WrongAnswer]);
        let mut seen = evidence(moved(), End::Runs(DESTINATION));
        seen.report = Some("failed".to_owned());
        assert_eq!(kinds(&seen), [Kind::WrongAnswer]);
    }

    #[test]
    fn a_run_without_an_end_hangs() {
        let seen = evidence(vec![], End::Never("the command runs".to_owned()));
        assert_eq!(seen.judge(), (Outcome::Failed, vec![Failure::new(Kind::Hang, "the command runs")]));
    }

    #[test]
    fn phases_follow_from_events_and_progress() {
        let seen = evidence(moved(), End::Runs(DESTINATION));
        assert_eq!(seen.phase(at(5), Progress::Preparing), Phase::Prepare);
        assert_eq!(seen.phase(at(5), Progress::FirstRound), Phase::FirstRound);
        assert_eq!(seen.phase(at(5), Progress::Beyond), Phase::LaterRounds);
        assert_eq!(seen.phase(at(10), Progress::LaterRounds), Phase::Switchover);
        assert_eq!(seen.phase(at(20), Progress::Beyond), Phase::After);
        let resumed = vec![event(SOURCE, "STOP", 10), event(SOURCE, "RESUME", 15)];
        assert_eq!(evidence(resumed, End::Runs(SOURCE)).phase(at(16), Progress::Beyond), Phase::After);
    }
}
