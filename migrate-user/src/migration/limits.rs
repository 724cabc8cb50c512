//! How long each wait may take.

use std::time::Duration;

use serde::Deserialize;

/// Time limits of one migration. Every wait has one; none is derived from hope.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Limits {
    /// First answer of a peer, s.
    pub hello: u64,
    /// Starting the destination's VMM and reserving its memory, s.
    pub prepare: u64,
    /// Closing a round, s.
    pub round: u64,
    /// Silence of a source whose frames have stopped too, s.
    pub silence: u64,
    /// Each step of the switchover, s.
    pub switchover: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { hello: 5, prepare: 120, round: 15, silence: 30, switchover: 20 }
    }
}

impl Limits {
    /// A limit as duration.
    pub const fn of(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }
}
