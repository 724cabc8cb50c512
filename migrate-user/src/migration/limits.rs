//! How long each wait may take.

use std::time::Duration;

use serde::Deserialize;

/// Longest limit, s: whoever means "for ever" can say this, and no sum of it with a clock overflows.
const LONGEST: u64 = 30 * 24 * 3600;

/// Time limits, s. Every wait has one; none is derived from hope.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Limits {
    /// Connecting to a peer.
    pub connect: u64,
    /// Silence of a peer's kernel, after which a connection counts as broken.
    pub dead_peer: u64,
    /// First answer of a peer.
    pub hello: u64,
    /// Starting the destination's VMM and reserving its memory.
    pub prepare: u64,
    /// Closing a round.
    pub round: u64,
    /// Silence of a source whose frames have stopped too.
    pub silence: u64,
    /// Each step of the switchover.
    pub switchover: u64,
    /// Asking a destination that did not confirm, before the migration ends as unsettled (the agent goes on asking).
    pub settle: u64,
    /// Writing a record of the journal to disk.
    pub journal: u64,
    /// An answer of QEMU's monitor.
    pub vmm_answer: u64,
    /// QEMU's start, until its monitor answers. Pre-allocation of RAM (`prealloc=on`) is part of it.
    pub vmm_start: u64,
    /// Each step of QEMU's own migration: its stop, saving and loading the device state.
    pub vmm_step: u64,
    /// QEMU's end when told to.
    pub vmm_quit: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: 5,
            dead_peer: 10,
            hello: 5,
            prepare: 120,
            round: 15,
            silence: 30,
            switchover: 20,
            settle: 30,
            journal: 10,
            vmm_answer: 10,
            vmm_start: 60,
            vmm_step: 20,
            vmm_quit: 5,
        }
    }
}

impl Limits {
    /// A limit as duration.
    pub const fn of(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// What concerns QEMU.
    pub const fn vmm(&self) -> crate::vmm::VmmLimits {
        crate::vmm::VmmLimits {
            answer: Self::of(self.vmm_answer),
            start: Self::of(self.vmm_start),
            step: Self::of(self.vmm_step),
            quit: Self::of(self.vmm_quit),
        }
    }

    /// Whether all of them can be meant.
    ///
    /// # Errors
    /// Names one that is 0, in which nothing would ever succeed, or that is longer than clocks can be asked for.
    pub fn check(&self) -> Result<(), String> {
        let all = [
            ("connect", self.connect),
            ("dead-peer", self.dead_peer),
            ("hello", self.hello),
            ("prepare", self.prepare),
            ("round", self.round),
            ("silence", self.silence),
            ("switchover", self.switchover),
            ("settle", self.settle),
            ("journal", self.journal),
            ("vmm-answer", self.vmm_answer),
            ("vmm-start", self.vmm_start),
            ("vmm-step", self.vmm_step),
            ("vmm-quit", self.vmm_quit),
        ];
        for (name, seconds) in all {
            if seconds == 0 {
                return Err(format!("{name} is 0, in which nothing can be done: give seconds"));
            }
            if seconds > LONGEST {
                return Err(format!("{name} is {seconds} s: give at most {LONGEST}, which are 30 days"));
            }
        }
        Ok(())
    }
}
