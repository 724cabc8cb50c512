//! How much of their time vCPUs are denied.

/// First step, percent (QEMU's `cpu-throttle-initial`).
const INITIAL: u8 = 20;
/// What each further step leaves to the guest of what it had: equal ratios are what a guest feels as equal steps. The last is
/// the ninth, as with QEMU's fixed ten percent (`cpu-throttle-increment`), of which the first do little and the last much.
const LEFT_BY_STEP: f64 = 0.6;
/// Most that is ever taken, percent (QEMU's `max-cpu-throttle`). The guest must go on, however slowly: timers, heartbeats
/// and the vCPUs' answer to a stop depend on it.
const MOST: u8 = 99;

/// A share of time that is taken from each vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Throttle(u8);

impl Throttle {
    /// Nothing is taken.
    pub const NONE: Self = Self(0);
    /// The most that is ever taken.
    pub const MOST: Self = Self(MOST);

    /// A share in percent; more than [`MOST`](Self::MOST) counts as that.
    pub const fn of(percent: u8) -> Self {
        Self(if percent > MOST { MOST } else { percent })
    }

    /// What is taken, percent, 0 to 99.
    pub const fn percent(self) -> u8 {
        self.0
    }

    /// Whether nothing is.
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }

    /// One step more; `None` when no more is ever taken.
    pub fn stronger(self) -> Option<Self> {
        if self.is_none() {
            return Some(Self(INITIAL));
        }
        let left = f64::from(100 - self.0) * LEFT_BY_STEP;
        // At least 1, or the last steps would go nowhere.
        let next = (100 - left.round() as u8).clamp(self.0 + 1, 100).min(MOST);
        (next > self.0).then_some(Self(next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn begins_gently_grows_and_ends() {
        let steps: Vec<u8> = std::iter::successors(Some(Throttle::NONE), |step| step.stronger())
            .map(Throttle::percent)
            .collect();
        assert_eq!(steps, [0, 20, 52, 71, 83, 90, 94, 96, 98, 99]);
    }

    #[test]
    fn some_time_is_always_left() {
        assert_eq!(Throttle::of(100), Throttle::MOST);
        assert!(Throttle::MOST.percent() < 100 && Throttle::MOST.stronger().is_none());
    }
}
