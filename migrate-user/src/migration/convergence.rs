//! When to stop copying and switch over.

use std::time::Duration;

/// A last round predicted to take less than this is not worth another pre-copy round. Small rounds take several
/// times what is predicted from large ones (8 ms instead of 2 were measured); stopping and moving the
/// device state takes several times as long.
const QUICK: Duration = Duration::from_micros(500);
/// Rounds after which a guest that does not fit the limit is given up.
const MAX_ROUNDS: u32 = 30;
/// A round that leaves more than this share of what it sent has gained little.
const STALLED: f64 = 0.7;

/// What one round did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RoundFigures {
    /// Bytes of pages sent.
    pub bytes: u64,
    /// Time it took.
    pub duration: Duration,
    /// Bytes to send in the next.
    pub remaining: u64,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Decision {
    /// Another round while the VM runs.
    Continue,
    /// Stop the VM, send the rest.
    SwitchOver,
    /// It leads nowhere: the predicted time of the last round.
    GiveUp(Duration),
}

/// The rule.
#[derive(Clone, Debug)]
pub struct Policy {
    downtime_limit: Duration,
    rounds: u32,
    /// Best rate seen, bytes per second: small rounds are dominated by fixed costs and say little.
    rate: f64,
    previous: Option<u64>,
}

impl Policy {
    /// A policy for one migration.
    pub fn new(downtime_limit: Duration) -> Self {
        Self { downtime_limit, rounds: 0, rate: 0.0, previous: None }
    }

    /// Takes note of a round and decides.
    pub fn after(&mut self, round: RoundFigures) -> Decision {
        self.rounds += 1;
        let seconds = round.duration.as_secs_f64();
        if seconds > 0.0 {
            self.rate = self.rate.max(round.bytes as f64 / seconds);
        }
        let predicted = self.predict(round.remaining);
        let stalled = self
            .previous
            .replace(round.remaining)
            .is_some_and(|previous| round.remaining as f64 > STALLED * previous as f64);
        if predicted <= QUICK || (stalled && predicted <= self.downtime_limit) {
            Decision::SwitchOver
        } else if self.rounds < MAX_ROUNDS {
            Decision::Continue
        } else if predicted <= self.downtime_limit {
            Decision::SwitchOver
        } else {
            Decision::GiveUp(predicted)
        }
    }

    /// Time that sending `bytes` will take.
    pub fn predict(&self, bytes: u64) -> Duration {
        if bytes == 0 {
            return Duration::ZERO;
        }
        if self.rate <= 0.0 {
            return Duration::MAX;
        }
        Duration::try_from_secs_f64(bytes as f64 / self.rate).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A guest that dirties `rate` bytes/s within `set` bytes, on a link of `link` bytes/s.
    fn simulate(memory: u64, set: u64, rate: f64, link: f64, limit_ms: u64) -> (u32, Decision) {
        let mut policy = Policy::new(Duration::from_millis(limit_ms));
        let mut to_send = memory;
        for round in 1.. {
            let seconds = to_send as f64 / link;
            // Writes fall anywhere in the set: some hit the same page.
            let touched = set as f64 * (1.0 - (-rate * seconds / set.max(1) as f64).exp());
            let remaining = touched as u64;
            let figures =
                RoundFigures { bytes: to_send, duration: Duration::from_secs_f64(seconds), remaining };
            match policy.after(figures) {
                Decision::Continue => to_send = remaining,
                decision => return (round, decision),
            }
        }
        unreachable!()
    }

    #[test]
    fn idle_guests_switch_after_one_round() {
        assert_eq!(simulate(1024 * MIB, MIB, 0.0, 1e9, 300), (1, Decision::SwitchOver));
    }

    #[test]
    fn slow_writers_converge_quickly_to_a_short_blackout() {
        let (rounds, decision) = simulate(1024 * MIB, 256 * MIB, 20e6, 1e9, 300);
        assert_eq!(decision, Decision::SwitchOver);
        assert!(rounds <= 4, "{rounds}");
    }

    #[test]
    fn a_hot_set_that_fits_the_limit_switches_when_it_stalls() {
        let (rounds, decision) = simulate(1024 * MIB, 100 * MIB, 1e12, 1e9, 300);
        assert_eq!(decision, Decision::SwitchOver);
        assert!(rounds <= 3, "{rounds}");
    }

    #[test]
    fn a_hot_set_that_does_not_fit_is_given_up() {
        let (rounds, decision) = simulate(1024 * MIB, 800 * MIB, 1e12, 1e9, 300);
        assert!(matches!(decision, Decision::GiveUp(predicted) if predicted > Duration::from_millis(300)));
        assert_eq!(rounds, MAX_ROUNDS);
    }
}
