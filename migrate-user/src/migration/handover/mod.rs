//! Who may run the VM: the rules of the handover, without anything that carries them out.
//!
//! Each side is a small state machine. It says which step comes next, is told how that went or what was heard, and
//! says the next. A step that is written down is always a step of its own, before the one it allows. The same two
//! machines drive a migration to its end ([`super::SourceMigration`], [`super::DestinationMigration`]), settle what a
//! dead agent left (`agent/settle`), and are explored exhaustively, with a fault between any two steps, by `model`.
//!
//! The rules in short. Until the source has written *commit*, the VM is the source's, whatever happens. The destination
//! decides about a session once, and writes the decision down before the VM runs: *accepted* or *refused*. A source
//! that wrote *commit* and heard nothing does not guess: it asks.

mod destination;
#[cfg(test)]
mod explorer;
#[cfg(test)]
mod model;
mod session;
mod source;

pub use destination::{DestinationHandover, DestinationStep, Recorded, Seen};
pub use session::{Answer, Change, SessionState};
pub use source::{SourceHandover, SourceStep, Word};

use serde::{Deserialize, Serialize};

/// What was decided about a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The VM is the destination's.
    Accepted,
    /// The VM stays the source's, for good.
    Refused,
}

/// What a human decided about a VM that the two hosts cannot settle, seen from the host where it was said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resolution {
    /// The VM is this host's.
    KeepHere,
    /// The VM is not this host's.
    GiveUp,
}
