//! How long frames are on their way.

use std::time::{Duration, Instant};

/// Longest way there and back that is believed: a receiver that was stopped for a while must not slow down the rest.
const LONGEST_TRANSIT: Duration = Duration::from_millis(200);

/// How long it takes from a frame's sending until the receiver's word that it came is here: the longest of late.
#[derive(Debug, Default)]
pub(super) struct Transit {
    longest: Duration,
    /// What is being measured: the number of frames seen that ends it, and its begin.
    timed: Option<(u32, Instant)>,
}

impl Transit {
    /// Frames are numbered anew: what was being measured is never seen.
    pub(super) fn begin(&mut self) {
        self.timed = None;
    }

    pub(super) const fn longest(&self) -> Duration {
        self.longest
    }

    pub(super) fn on_sent(&mut self, frames: u32) {
        if self.timed.is_none() {
            self.timed = Some((frames, Instant::now()));
        }
    }

    pub(super) fn on_seen(&mut self, seen: u32) {
        if let Some((_, begun)) = self.timed.take_if(|(frames, _)| seen >= *frames) {
            self.longest = (self.longest * 7 / 8).max(begun.elapsed()).min(LONGEST_TRANSIT);
        }
    }
}
