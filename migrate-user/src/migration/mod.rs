//! The migration itself: one state machine for each role. No sockets and no ioctls of its own: everything
//! outside is a trait, so that every fault can be tested in memory.
//!
//! At every instant at most one side may run the VM. Until the source sends [`Commit`](crate::control::Commit)
//! the VM is the source's, and any failure, cancel or time-out there ends with the VM running at the source;
//! from the commit on it is the destination's.

mod convergence;
mod destination;
mod handover;
mod journal;
mod limits;
mod source;
#[cfg(test)]
mod tests;

#[cfg(any(test, fuzzing))]
pub(crate) use journal::fuzz as fuzz_journal;

pub use convergence::{
    Convergence, Decision, Estimate, Judgement, Policy, Prediction, RoundFigures, Throttle, TimeoutAction,
};
pub use destination::{DestinationHost, DestinationMigration, DestinationRecord, Preparation, Unprepared};
pub use handover::{
    Answer, Change, DestinationHandover, DestinationStep, Recorded, Resolution, Seen, SessionState,
    SourceHandover, SourceStep, Verdict, Word,
};
pub use journal::{Journal, OpenSession, Role, Session};
pub use limits::Limits;
pub use source::{
    Cancel, PageStream, RoundSent, SourceHost, SourceMemory, SourceMigration, SourcePlan, SourceRecord,
};

use crate::{
    control::ControlError,
    datapath::{KeyError, SendError},
    memory::MemoryError,
    network::NetworkError,
    vmm::VmmError,
};

fn convergence_hint(way_ms: f64, limit_ms: u64) -> String {
    if way_ms < limit_ms as f64 {
        return "allow --auto-converge, raise --downtime-limit or --bandwidth, or migrate when the guest is quieter"
            .into();
    }
    format!(
        "pages, state and commit are on their way between the hosts for {way_ms:.0} ms: raise --downtime-limit"
    )
}

impl MigrationError {
    /// For something that came instead of what was awaited, by its name.
    pub fn unexpected(got: &str, awaited: &'static str) -> Self {
        Self::Unexpected { got: got.into(), awaited }
    }
}

/// Why a migration did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// Somebody said stop.
    #[error("cancelled")]
    Cancelled,
    /// The limit set with `--timeout`.
    #[error("not finished within {0} s (--timeout)")]
    Deadline(u64),
    /// The guest writes faster than the network carries.
    #[error(
        "it does not converge: after {rounds} rounds {remaining_mib:.1} MiB are left, which takes {predicted_ms:.0} ms, more than the \
         {limit_ms} ms allowed; {}", convergence_hint(*.way_ms, *.limit_ms)
    )]
    NotConverging {
        /// Rounds tried.
        rounds: u32,
        /// Still dirty, MiB.
        remaining_mib: f64,
        /// Predicted blackout, ms.
        predicted_ms: f64,
        /// What of it is the way between the hosts, ms.
        way_ms: f64,
        /// Allowed, ms.
        limit_ms: u64,
    },
    /// The other side does not want or cannot.
    #[error("{host} refuses: {reason}")]
    Peer {
        /// The other host.
        host: String,
        /// Its reason.
        reason: String,
    },
    /// A message that does not belong here.
    #[error("unexpected {got} while waiting for {awaited}")]
    Unexpected {
        /// What came.
        got: String,
        /// What was due.
        awaited: &'static str,
    },
    /// The preflight found reasons against it: all of them.
    #[error("{0}")]
    Preflight(String),
    /// Frames of full size do not get through.
    #[error("{0}")]
    Path(String),
    /// The two hosts do not fit together.
    #[error("{0}")]
    Mismatch(String),
    /// RAM differs.
    #[error(
        "RAM differs between source and destination while the VM is stopped ({source_digest} and {destination_digest})"
    )]
    Differs {
        /// Digest here.
        source_digest: crate::memory::Digest,
        /// Digest there.
        destination_digest: crate::memory::Digest,
    },
    /// The last pages did not get through.
    #[error(
        "after {0} attempts pages of the last round are still missing: the migration network loses too much"
    )]
    Lossy(u32),
    /// The control channel.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The VMM.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The page stream.
    #[error(transparent)]
    Send(#[from] SendError),
    /// Keys of the page stream.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A network interface.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// AF_XDP.
    #[error(transparent)]
    Xsk(#[from] crate::xsk::XskError),
    /// UDP sockets.
    #[error(transparent)]
    Udp(#[from] crate::datapath::UdpError),
    /// This host.
    #[error("{0}")]
    Host(String),
}
