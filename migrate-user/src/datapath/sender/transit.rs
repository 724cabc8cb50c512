//! How long frames are on their way.

use std::time::{Duration, Instant};

/// Longest way there and back that is believed: a receiver that was stopped for a while must not slow down the rest.
const LONGEST_TRANSIT: Duration = Duration::from_millis(500);

/// Way that no busy processor explains when it is the shortest of [`SAMPLES`], and one that none explains at all. On two processors that were
/// both full, the first frames of a migration were seen to take 5 to 11 ms to a receiver that had to be woken.
const SURELY_LONG: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(20)];
/// Measurements that are enough to be sure.
const SAMPLES: u32 = 4;

/// How long it takes from a frame's sending until the receiver's word that it came is here.
#[derive(Debug, Default)]
pub(super) struct Transit {
    /// Of late.
    longest: Duration,
    /// Ever: one that met no queue.
    shortest: Option<Duration>,
    /// Measurements so far.
    measured: u32,
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

    pub(super) const fn shortest(&self) -> Option<Duration> {
        self.shortest
    }

    /// Whether that is for sure a long way, and not a short one that was measured badly.
    pub(super) fn is_surely_long(&self) -> bool {
        let [long, longest] = SURELY_LONG;
        let least = if self.measured < SAMPLES { longest } else { long };
        self.shortest.is_some_and(|shortest| shortest >= least)
    }

    pub(super) fn on_sent(&mut self, frames: u32) {
        if self.timed.is_none() {
            self.timed = Some((frames, Instant::now()));
        }
    }

    /// The receiver has seen so many frames.
    pub(super) fn on_seen(&mut self, seen: u32, now: Instant) {
        let Some((_, begun)) = self.timed.take_if(|(frames, _)| seen >= *frames) else { return };
        let took = now.saturating_duration_since(begun);
        self.longest = (self.longest * 7 / 8).max(took).min(LONGEST_TRANSIT);
        self.shortest = Some(self.shortest.map_or(took, |shortest| shortest.min(took)));
        self.measured += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_is_long_for_sure_once_it_was_measured_often() {
        let sure = |samples: &[u64]| {
            let mut transit = Transit::default();
            for (sent, &ms) in (1..).zip(samples) {
                transit.on_sent(sent);
                let begun = transit.timed.map_or_else(Instant::now, |(_, begun)| begun);
                transit.on_seen(sent, begun + Duration::from_millis(ms));
            }
            transit.is_surely_long()
        };
        assert!(!sure(&[]) && !sure(&[11]) && !sure(&[11, 9, 8]) && sure(&[11, 9, 8, 7]));
        assert!(!sure(&[11, 9, 8, 4]) && !sure(&[3, 3, 3, 3, 3]));
        assert!(sure(&[50]) && !sure(&[50, 2]));
    }

    #[test]
    fn one_frame_at_a_time_is_timed() {
        let mut transit = Transit::default();
        let start = Instant::now();
        transit.on_seen(9, start);
        assert_eq!((transit.longest(), transit.shortest()), (Duration::ZERO, None));
        for (sent, ms) in [(10, 30), (20, 10), (30, 20)] {
            transit.on_sent(sent);
            // Another frame is no other begin, and an earlier one no end.
            transit.on_sent(sent + 1);
            transit.on_seen(sent - 1, start + Duration::from_secs(9));
            let begun = transit.timed.map_or(start, |(_, begun)| begun);
            transit.on_seen(sent, begun + Duration::from_millis(ms));
            assert!(transit.timed.is_none());
        }
        assert_eq!(transit.shortest(), Some(Duration::from_millis(10)));
        assert!(transit.longest() > Duration::from_millis(20), "it fades");
        transit.on_sent(40);
        transit.begin();
        transit.on_seen(40, Instant::now() + Duration::from_secs(1));
        assert!(transit.longest() < Duration::from_millis(30));
    }
}
