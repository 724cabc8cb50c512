//! The half of the host that the VM leaves.

use super::{Resolution, SessionState, Verdict};

/// Where the source is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Stage {
    /// Nothing is written and nothing of the VM is touched.
    #[default]
    Fresh,
    /// The VM is offered and still ours: pages and state go over.
    Offered,
    /// All of it went over; the commit is not written yet.
    StateSent,
    /// The commit is written and not sent: the destination has not loaded everything.
    Committed,
    /// The destination holds a whole VM.
    Ready,
    /// The commit is on its way.
    Sent,
    /// Nothing was heard: only the destination knows.
    Asking,
    /// A human said that the VM is ours; not written yet.
    Claiming,
    /// A human said that it is not; not written yet.
    Ceding,
    /// The VM is ours and may have been stopped.
    Kept,
    /// The VM is the destination's.
    Left,
    /// Only the end is not written yet.
    Ending(Verdict),
    /// Over.
    Closed(Verdict),
}

/// What the source has to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceStep {
    /// Write down that the VM is offered; then [`SourceHandover::recorded`].
    RecordOffer,
    /// Go on with pages, stop and device state, until [`SourceHandover::state_sent`] or [`SourceHandover::failed`].
    Move,
    /// Write down that the commit may be sent from now on; then [`SourceHandover::recorded`].
    RecordCommit,
    /// Wait until the destination has loaded the state: [`SourceHandover::loaded`] or [`SourceHandover::failed`].
    AwaitLoaded,
    /// Send the commit; then [`SourceHandover::sent`].
    SendCommit,
    /// Wait for the destination's word; then [`SourceHandover::heard`].
    Hear,
    /// Ask over a new connection until there is an answer, or a human decides: [`SourceHandover::answered`] or
    /// [`SourceHandover::resolved`].
    Ask,
    /// Write a human's decision down; then [`SourceHandover::recorded`].
    RecordVerdict(Verdict),
    /// Make the VM run here, if it does not; then [`SourceHandover::done`].
    LetRun,
    /// End the VM's stopped VMM here; then [`SourceHandover::done`].
    EndVm,
    /// Write down whose the VM is and that nothing is left to do; then [`SourceHandover::recorded`].
    RecordEnd(Verdict),
    /// Nothing; whose the VM is.
    Closed(Verdict),
}

/// What came back on the commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Word {
    /// The VM runs at the destination.
    Running,
    /// The destination has ended its half.
    Abort,
    /// Nothing, or nothing that can be understood.
    Nothing,
}

/// The source's half of one handover.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SourceHandover(Stage);

impl SourceHandover {
    /// For a session that the journal of an earlier life says has no end. A decision for *refused* is one of a human; one
    /// for *accepted* may also be what a destination was told that claimed the VM, and only the destination knows
    /// whether it came to run there.
    pub const fn recovered(journal: SessionState) -> Self {
        Self(match (journal.committed, journal.verdict) {
            (_, Some(Verdict::Refused)) | (false, None) => Stage::Kept,
            _ => Stage::Asking,
        })
    }

    /// What is to be done now.
    pub const fn step(&self) -> SourceStep {
        match self.0 {
            Stage::Fresh => SourceStep::RecordOffer,
            Stage::Offered => SourceStep::Move,
            Stage::StateSent => SourceStep::RecordCommit,
            Stage::Committed => SourceStep::AwaitLoaded,
            Stage::Ready => SourceStep::SendCommit,
            Stage::Sent => SourceStep::Hear,
            Stage::Asking => SourceStep::Ask,
            Stage::Claiming => SourceStep::RecordVerdict(Verdict::Refused),
            Stage::Ceding => SourceStep::RecordVerdict(Verdict::Accepted),
            Stage::Kept => SourceStep::LetRun,
            Stage::Left => SourceStep::EndVm,
            Stage::Ending(verdict) => SourceStep::RecordEnd(verdict),
            Stage::Closed(verdict) => SourceStep::Closed(verdict),
        }
    }

    /// Whether it can still be said that the VM stays here.
    pub const fn is_cancellable(&self) -> bool {
        matches!(self.0, Stage::Fresh | Stage::Offered | Stage::StateSent | Stage::Committed | Stage::Ready)
    }

    /// A record is on disk, or could not be written.
    pub const fn recorded(&mut self, written: bool) {
        self.0 = match (self.0, written) {
            (Stage::Fresh, true) => Stage::Offered,
            (Stage::Fresh, false) => Stage::Closed(Verdict::Refused),
            (Stage::StateSent, true) => Stage::Committed,
            (Stage::StateSent, false) => Stage::Kept,
            (Stage::Claiming, true) => Stage::Kept,
            (Stage::Ceding, true) => Stage::Left,
            // What is not written must not be acted on.
            (Stage::Claiming | Stage::Ceding, false) => Stage::Asking,
            // That nothing is left to do is true in any case; a later life finds out again.
            (Stage::Ending(verdict), _) => Stage::Closed(verdict),
            (other, _) => other,
        };
    }

    /// All pages and the device state were sent.
    pub const fn state_sent(&mut self) {
        if matches!(self.0, Stage::Offered) {
            self.0 = Stage::StateSent;
        }
    }

    /// The destination has loaded everything.
    pub const fn loaded(&mut self) {
        if matches!(self.0, Stage::Committed) {
            self.0 = Stage::Ready;
        }
    }

    /// Something went wrong, or somebody said stop. Heeded as long as the commit was not sent.
    pub const fn failed(&mut self) {
        self.0 = match self.0 {
            Stage::Fresh => Stage::Closed(Verdict::Refused),
            Stage::Offered | Stage::StateSent | Stage::Committed | Stage::Ready => Stage::Kept,
            other => other,
        };
    }

    /// The commit was sent, or perhaps not.
    pub const fn sent(&mut self, certainly: bool) {
        if matches!(self.0, Stage::Ready) {
            self.0 = if certainly { Stage::Sent } else { Stage::Asking };
        }
    }

    /// What came back on the commit.
    pub const fn heard(&mut self, word: Word) {
        if matches!(self.0, Stage::Sent) {
            self.0 = match word {
                Word::Running => Stage::Left,
                Word::Abort => Stage::Kept,
                Word::Nothing => Stage::Asking,
            };
        }
    }

    /// What the destination says when asked.
    pub const fn answered(&mut self, verdict: Verdict) {
        if matches!(self.0, Stage::Asking) {
            self.0 = match verdict {
                Verdict::Accepted => Stage::Left,
                Verdict::Refused => Stage::Kept,
            };
        }
    }

    /// What a human says when the destination cannot be asked.
    pub const fn resolved(&mut self, resolution: Resolution) {
        if matches!(self.0, Stage::Asking) {
            self.0 = match resolution {
                Resolution::KeepHere => Stage::Claiming,
                Resolution::GiveUp => Stage::Ceding,
            };
        }
    }

    /// The VM runs, or its VMM has ended. Not called when that failed: then the step stays.
    pub const fn done(&mut self) {
        self.0 = match self.0 {
            Stage::Kept => Stage::Ending(Verdict::Refused),
            Stage::Left => Stage::Ending(Verdict::Accepted),
            other => other,
        };
    }
}
