//! Choices that follow from a seed, the same on every machine.

use std::time::Duration;

/// Seeds have so many bits: short enough to be typed, and exact as a number in JSON.
const SEED_BITS: u32 = 48;

/// The seed of a campaign's run. That of the first is the campaign's own, so that a campaign of one run with the
/// seed of any run repeats that one.
pub(super) fn run_seed(campaign: u64, run: u64) -> u64 {
    if run == 0 { campaign } else { mix(mix(campaign).wrapping_add(run)) >> (u64::BITS - SEED_BITS) }
}

/// Spreads every bit of the input over the whole output (the finalizer of `SplitMix64`).
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// A source of choices.
#[derive(Debug)]
pub(super) struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number from 0 up to, but not including, 1.
    pub fn unit(&mut self) -> f64 {
        // As many bits as the fraction of a double has.
        (self.roll() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Whether something of this probability happens.
    pub fn happens(&mut self, probability: f64) -> bool {
        self.unit() < probability
    }

    /// One of several, each as often as its weight says.
    ///
    /// # Panics
    /// If there is none.
    pub fn pick<T: Copy>(&mut self, weighted: &[(u32, T)]) -> T {
        let total: u32 = weighted.iter().map(|(weight, _)| weight).sum();
        let mut point = self.unit() * f64::from(total);
        for &(weight, choice) in weighted {
            point -= f64::from(weight);
            if point < 0.0 {
                return choice;
            }
        }
        weighted[weighted.len() - 1].1
    }

    /// A duration up to `longest`, all alike, in whole microseconds.
    pub fn up_to(&mut self, longest: Duration) -> Duration {
        micros(longest.as_secs_f64() * self.unit())
    }

    /// A duration between the two; short ones are more frequent, by far.
    pub fn mostly_short(&mut self, shortest: Duration, longest: Duration) -> Duration {
        let ratio = longest.as_secs_f64() / shortest.as_secs_f64();
        let unit = self.unit();
        micros(shortest.as_secs_f64() * ratio.powf(unit * unit))
    }
}

fn micros(seconds: f64) -> Duration {
    Duration::from_micros((seconds * 1e6) as u64)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_first_run_has_the_campaigns_seed() {
        let seed = run_seed(77, 5);
        assert_eq!(run_seed(seed, 0), seed);
        assert!(seed < 1 << SEED_BITS);
        let seeds: HashSet<u64> = (0..10_000).map(|run| run_seed(77, run)).collect();
        assert_eq!(seeds.len(), 10_000);
        assert_ne!(run_seed(77, 1), run_seed(78, 1));
    }

    #[test]
    fn weights_are_kept() {
        let mut dice = Dice::new(1);
        let hits = (0..30_000).filter(|_| dice.pick(&[(1, false), (2, true), (0, false)])).count();
        assert!((19_500..20_500).contains(&hits), "{hits}");
    }

    #[test]
    fn durations_stay_within_their_bounds_and_long_ones_are_rare() {
        let mut dice = Dice::new(2);
        let (shortest, longest) = (Duration::from_millis(100), Duration::from_secs(25));
        let all: Vec<Duration> = (0..10_000).map(|_| dice.mostly_short(shortest, longest)).collect();
        assert!(all.iter().all(|lasts| (shortest..=longest).contains(lasts)));
        let short = all.iter().filter(|lasts| lasts.as_secs() < 1).count();
        let long = all.iter().filter(|lasts| lasts.as_secs() >= 12).count();
        assert!(short > 5 * long && long > 100, "{short} {long}");
        assert!((0..1000).all(|_| dice.up_to(longest) < longest));
    }
}
