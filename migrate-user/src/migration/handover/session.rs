//! What a journal says about one session, and what follows from it.

use super::{Recorded, Verdict};

/// One record, as far as it concerns the handover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Change {
    /// The source offers the VM.
    Offered,
    /// The source may send the commit from here on.
    Committed,
    /// The destination is going to have a VMM wait.
    Waiting,
    /// It is decided whose the VM is.
    Decided(Verdict),
    /// Nothing is left to do, and, if known, whose the VM is.
    Concluded(Option<Verdict>),
}

/// What the records of one session add up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SessionState {
    /// Whether this host began it, in either part.
    pub begun: bool,
    /// Whether the commit may have been sent.
    pub committed: bool,
    /// The decision.
    pub verdict: Option<Verdict>,
    /// Whether nothing is left to do.
    pub concluded: bool,
}

/// What a host that is asked about a session says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// This, for good.
    Stands(Verdict),
    /// This, once it is written down.
    Decide(Verdict),
}

impl SessionState {
    /// Adds a record.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Offered | Change::Waiting => self.begun = true,
            Change::Committed => self.committed = true,
            Change::Decided(verdict) => self.verdict = Some(verdict),
            Change::Concluded(verdict) => {
                self.verdict = verdict.or(self.verdict);
                self.concluded = true;
            }
        }
    }

    /// Whether it has begun and has no end yet.
    pub const fn is_open(&self) -> bool {
        self.begun && !self.concluded
    }

    /// Whether `verdict` may still be decided: the first decision stands.
    pub fn decide(&self, verdict: Verdict) -> Option<Recorded> {
        match self.verdict {
            None => None,
            Some(before) if before == verdict => Some(Recorded::Written),
            Some(_) => Some(Recorded::Otherwise),
        }
    }

    /// What the destination answers a source whose commit was not confirmed. What it has not taken by now, it never
    /// takes. `None` when there is no answer: the VM is taken and does not run yet (should it fail to start, the source
    /// must have it back), or this host has forgotten the session, or never heard of it.
    pub const fn asked_by_source(&self) -> Option<Answer> {
        match self.verdict {
            _ if !self.begun => None,
            None => Some(Answer::Decide(Verdict::Refused)),
            Some(Verdict::Accepted) if self.is_open() => None,
            Some(verdict) => Some(Answer::Stands(verdict)),
        }
    }

    /// What the source answers a destination that took the VM and died before it wrote that it ran. One whose VM is
    /// `whole` wants to run it now; one whose VM is gone wants to know what the source has heard. `None` when this host
    /// does not know.
    pub const fn claimed_by_destination(&self, whole: bool) -> Option<Answer> {
        match self.verdict {
            _ if !self.committed => None,
            None if whole => Some(Answer::Decide(Verdict::Accepted)),
            None => None,
            // What another claim was told, before that one died too, says nothing about whether the VM ran.
            Some(Verdict::Accepted) if !whole && !self.concluded => None,
            Some(verdict) => Some(Answer::Stands(verdict)),
        }
    }
}
