//! Holding the rate below a configured one.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Credit is kept for at most this long, so that a pause is not followed by a flood.
const BURST: Duration = Duration::from_millis(2);

/// Limit of a page stream on the wire. Clones are of the same limit, which can change at any time.
#[derive(Clone, Debug)]
pub struct Bandwidth {
    /// Bytes per second in all; 0 is unlimited.
    limit: Arc<AtomicU64>,
    /// How many share it, at least 1.
    shares: u64,
}

impl Default for Bandwidth {
    fn default() -> Self {
        Self { limit: Arc::default(), shares: 1 }
    }
}

impl Bandwidth {
    /// A limit in bytes per second; `None` and 0 are none.
    pub fn new(limit: Option<u64>) -> Self {
        let this = Self::default();
        this.set(limit);
        this
    }

    /// The part of one of `lanes` that share it.
    #[must_use]
    pub fn shared_by(&self, lanes: usize) -> Self {
        Self { limit: Arc::clone(&self.limit), shares: lanes.max(1) as u64 }
    }

    /// Changes the limit for all that share it, from their next frames on.
    pub fn set(&self, limit: Option<u64>) {
        // Nothing else depends on it: no order is needed.
        self.limit.store(limit.unwrap_or(0), Ordering::Relaxed);
    }

    /// Bytes per second for all that share it; `None` when there is no limit.
    pub fn limit(&self) -> Option<u64> {
        Some(self.limit.load(Ordering::Relaxed)).filter(|&limit| limit > 0)
    }

    /// Bytes per second for each, at least 1.
    fn share(&self) -> Option<u64> {
        Some((self.limit()? / self.shares).max(1))
    }
}

/// A token bucket over wire bytes. Time is passed in, so that it is tested without waiting.
#[derive(Debug)]
pub struct Pacer {
    bandwidth: Bandwidth,
    /// When the bytes sent so far will have been paid for.
    paid: Option<Instant>,
}

impl Pacer {
    /// Keeps one lane to its share.
    pub fn new(bandwidth: Bandwidth) -> Self {
        Self { bandwidth, paid: None }
    }

    /// Notes `bytes` sent at `now`; returns how long to wait before the next frame.
    pub fn on_sent(&mut self, bytes: usize, now: Instant) -> Duration {
        let Some(rate) = self.bandwidth.share() else { return Duration::ZERO };
        let cost = Duration::from_nanos((bytes as u64).saturating_mul(1_000_000_000) / rate);
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let paid = self.paid.map_or(now, |paid| paid.max(earliest)) + cost;
        self.paid = Some(paid);
        paid.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pacer(limit: Option<u64>) -> Pacer {
        Pacer::new(Bandwidth::new(limit))
    }

    #[test]
    fn a_limit_changes_while_it_is_kept_to_and_lanes_share_it() {
        let limit = Bandwidth::new(None);
        let (mut pacer, now) = (Pacer::new(limit.shared_by(2)), Instant::now());
        assert_eq!(pacer.on_sent(1 << 20, now), Duration::ZERO);
        limit.set(Some(20_000_000));
        assert_eq!(pacer.on_sent(1_000_000, now), Duration::from_millis(100));
        limit.set(None);
        assert_eq!(pacer.on_sent(1 << 20, now), Duration::ZERO);
        assert_eq!((limit.limit(), Bandwidth::new(Some(0)).limit()), (None, None));
    }

    #[test]
    fn keeps_the_rate_over_time() {
        let mut pacer = pacer(Some(100_000_000));
        let start = Instant::now();
        let mut now = start;
        for _ in 0..1000 {
            now += pacer.on_sent(9000, now);
        }
        let seconds = (now - start).as_secs_f64();
        assert!((0.085..0.095).contains(&seconds), "9 MB at 100 MB/s took {seconds} s");
    }

    #[test]
    fn a_pause_earns_only_a_short_burst() {
        let mut pacer = pacer(Some(1_000_000));
        let now = Instant::now();
        pacer.on_sent(1000, now);
        let later = now + Duration::from_secs(60);
        assert_eq!(pacer.on_sent(1000, later), Duration::ZERO);
        assert!(pacer.on_sent(5000, later) > Duration::ZERO);
    }

    #[test]
    fn unlimited_never_waits() {
        assert_eq!(pacer(None).on_sent(1 << 30, Instant::now()), Duration::ZERO);
        assert_eq!(pacer(Some(0)).on_sent(1 << 30, Instant::now()), Duration::ZERO);
    }
}
