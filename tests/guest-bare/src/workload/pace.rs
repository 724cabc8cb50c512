//! Spreads work evenly over time.

/// Says how many units of work are due at a rate.
pub struct Pacer {
    per_second: u64,
    ticks_per_second: u64,
    last: u64,
    /// Units earned, times ticks per second.
    credit: u64,
}

impl Pacer {
    /// Starts at the time `now`.
    pub fn new(per_second: u64, ticks_per_second: u64, now: u64) -> Self {
        Pacer {
            // Bounds that keep the product below 64 bits.
            per_second: per_second.min(1 << 32),
            ticks_per_second: ticks_per_second.clamp(1, 1 << 34),
            last: now,
            credit: 0,
        }
    }

    /// Units that are due now, and not yet spent.
    ///
    /// Time that the guest did not run (it was being moved) is not made up for beyond a tenth of a second,
    /// nor does a clock that went back do harm.
    pub fn due(&mut self, now: u64) -> u64 {
        let limit = self.ticks_per_second / 10;
        let passed = now.saturating_sub(self.last).min(limit);
        self.last = now;
        let most = self.per_second * limit + self.ticks_per_second;
        self.credit = (self.credit + passed * self.per_second).min(most);
        self.credit / self.ticks_per_second
    }

    /// Takes off what was done.
    pub fn spend(&mut self, units: u64) {
        self.credit = self.credit.saturating_sub(units.saturating_mul(self.ticks_per_second));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_rate_over_uneven_steps() {
        let mut pacer = Pacer::new(5000, 1_000_000, 0);
        let (mut now, mut done) = (0, 0);
        for step in 0..10_000_u64 {
            now += 1 + step * 7 % 400;
            let due = pacer.due(now);
            pacer.spend(due);
            done += due;
        }
        assert_eq!(done, now * 5000 / 1_000_000);
    }

    #[test]
    fn forgives_a_gap_and_a_step_back() {
        let mut pacer = Pacer::new(1000, 1_000_000, 5_000_000);
        assert_eq!(pacer.due(4_000_000), 0);
        assert_eq!(pacer.due(60_000_000), 100);
        pacer.spend(100);
        assert_eq!(pacer.due(60_001_000), 1);
    }
}
