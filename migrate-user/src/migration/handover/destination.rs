//! The half of the host that the VM comes to.

use super::{Resolution, SessionState, Verdict};
use crate::vmm::Destroyed;

/// Where the destination is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Stage {
    /// Nothing is written and nothing is here.
    #[default]
    Fresh,
    /// A VMM may wait here; pages and state come.
    Waiting,
    /// The source committed; not decided yet.
    Committed,
    /// Decided: the VM is ours. It does not run yet.
    Accepted,
    /// It runs; the source does not know.
    Runs,
    /// An earlier life decided that the VM is ours; what became of it is not known.
    Found,
    /// The same, and it is here and never ran: may it, or was the source told otherwise meanwhile?
    Claiming,
    /// It was ours and nothing is left of it; whether it ever ran is not known here.
    Doubtful,
    /// What is here must go.
    Condemned,
    /// Nothing of it is left; that is not written yet.
    Gone,
    /// Written; the source does not know.
    Refused,
    /// Only the end is not written yet.
    Ending(Verdict),
    /// Over.
    Closed(Verdict),
}

/// What the destination has to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestinationStep {
    /// Write down that a VMM is going to wait here; then [`DestinationHandover::recorded`].
    RecordWaiting,
    /// Take pages and state, until [`DestinationHandover::committed`] or [`DestinationHandover::failed`].
    Receive,
    /// Decide for *accepted*, unless it is decided, and write it down; then [`DestinationHandover::recorded`].
    RecordAccepted,
    /// Start the vCPUs; then [`DestinationHandover::ran`].
    Run,
    /// Tell the source that the VM runs, if it listens; then [`DestinationHandover::told`].
    Confirm,
    /// See what became of the VM; then [`DestinationHandover::seen`].
    Look,
    /// Ask the source, until it answers or a human decides, whether the VM may run here:
    /// [`DestinationHandover::claimed`] or [`DestinationHandover::resolved`].
    Claim,
    /// Ask the source what it heard, until it knows or a human does: [`DestinationHandover::claimed`] or
    /// [`DestinationHandover::resolved`].
    Inquire,
    /// End the VM here; then [`DestinationHandover::destroyed`].
    Destroy,
    /// Write down that it never ran here and never will; then [`DestinationHandover::recorded`].
    RecordRefused,
    /// Tell the source so, if it listens; then [`DestinationHandover::told`].
    Abort,
    /// Write down whose the VM is and that nothing is left to do; then [`DestinationHandover::recorded`].
    RecordEnd(Verdict),
    /// Nothing; what was decided.
    Closed(Verdict),
}

/// What became of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Recorded {
    /// It is on disk.
    Written,
    /// Something else had been decided before, and stands.
    Otherwise,
    /// It could not be written.
    Failed,
}

/// What is found of a VM after a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Seen {
    /// It runs.
    Running,
    /// It is whole and stopped.
    Stopped,
    /// Nothing is left of it.
    Gone,
}

/// The destination's half of one handover.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DestinationHandover(Stage);

impl DestinationHandover {
    /// For a session that the journal of an earlier life says has no end.
    pub const fn recovered(journal: SessionState) -> Self {
        Self(match journal.verdict {
            Some(Verdict::Accepted) => Stage::Found,
            Some(Verdict::Refused) | None => Stage::Condemned,
        })
    }

    /// What is to be done now.
    pub const fn step(&self) -> DestinationStep {
        match self.0 {
            Stage::Fresh => DestinationStep::RecordWaiting,
            Stage::Waiting => DestinationStep::Receive,
            Stage::Committed => DestinationStep::RecordAccepted,
            Stage::Accepted => DestinationStep::Run,
            Stage::Runs => DestinationStep::Confirm,
            Stage::Found => DestinationStep::Look,
            Stage::Claiming => DestinationStep::Claim,
            Stage::Doubtful => DestinationStep::Inquire,
            Stage::Condemned => DestinationStep::Destroy,
            Stage::Gone => DestinationStep::RecordRefused,
            Stage::Refused => DestinationStep::Abort,
            Stage::Ending(verdict) => DestinationStep::RecordEnd(verdict),
            Stage::Closed(verdict) => DestinationStep::Closed(verdict),
        }
    }

    /// A record is on disk, or is not.
    pub const fn recorded(&mut self, recorded: Recorded) {
        self.0 = match (self.0, recorded) {
            (Stage::Fresh, Recorded::Written) => Stage::Waiting,
            (Stage::Fresh, _) => Stage::Closed(Verdict::Refused),
            (Stage::Committed, Recorded::Written) => Stage::Accepted,
            // A source that asked meanwhile was told that it is not taken; or nobody would know that it was.
            (Stage::Committed, _) => Stage::Condemned,
            // Until it is on disk the source must not hear it: an acceptance may stand there, and a source that comes
            // back from the dead would be told that.
            (Stage::Gone, Recorded::Failed) => Stage::Gone,
            (Stage::Gone, _) => Stage::Refused,
            (Stage::Ending(verdict), _) => Stage::Closed(verdict),
            (other, _) => other,
        };
    }

    /// The source committed.
    pub const fn committed(&mut self) {
        if matches!(self.0, Stage::Waiting) {
            self.0 = Stage::Committed;
        }
    }

    /// Something went wrong before the decision, or the source is gone.
    pub const fn failed(&mut self) {
        self.0 = match self.0 {
            Stage::Fresh => Stage::Closed(Verdict::Refused),
            Stage::Waiting | Stage::Committed => Stage::Condemned,
            other => other,
        };
    }

    /// The vCPUs run, or starting them failed.
    pub const fn ran(&mut self, runs: bool) {
        if matches!(self.0, Stage::Accepted) {
            self.0 = if runs { Stage::Runs } else { Stage::Condemned };
        }
    }

    /// The source was told, or does not listen.
    pub const fn told(&mut self) {
        self.0 = match self.0 {
            Stage::Runs => Stage::Ending(Verdict::Accepted),
            Stage::Refused => Stage::Ending(Verdict::Refused),
            other => other,
        };
    }

    /// What a restarted agent sees of a VM that was decided to be ours.
    pub const fn seen(&mut self, seen: Seen) {
        if matches!(self.0, Stage::Found) {
            self.0 = match seen {
                Seen::Running => Stage::Runs,
                Seen::Stopped => Stage::Claiming,
                // If it ran, it died here and that is that. If it did not, the source still has it, whole: not a
                // thing to throw away on a guess.
                Seen::Gone => Stage::Doubtful,
            };
        }
    }

    /// The source says whose the VM is.
    pub const fn claimed(&mut self, verdict: Verdict) {
        self.0 = match (self.0, verdict) {
            (Stage::Claiming, Verdict::Accepted) => Stage::Accepted,
            (Stage::Claiming, Verdict::Refused) => Stage::Condemned,
            (Stage::Doubtful, Verdict::Accepted) => Stage::Ending(Verdict::Accepted),
            (Stage::Doubtful, Verdict::Refused) => Stage::Gone,
            (other, _) => other,
        };
    }

    /// A human says so when the source cannot.
    pub const fn resolved(&mut self, resolution: Resolution) {
        self.claimed(match resolution {
            Resolution::KeepHere => Verdict::Accepted,
            Resolution::GiveUp => Verdict::Refused,
        });
    }

    /// The VM is gone from here. Not called as long as that is not certain: then the step stays.
    pub const fn destroyed(&mut self, destroyed: Destroyed) {
        if matches!(self.0, Stage::Condemned) {
            self.0 = match destroyed {
                Destroyed::NeverRan => Stage::Gone,
                // What a VM that ran may have written to its disks, an older one at the source does not know.
                Destroyed::MayHaveRun => Stage::Ending(Verdict::Accepted),
            };
        }
    }
}
