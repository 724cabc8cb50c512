//! Holding the rate below a configured one.

use std::time::{Duration, Instant};

/// Credit is kept for at most this long, so that a pause is not followed by a flood.
const BURST: Duration = Duration::from_millis(2);

/// A token bucket over wire bytes. Time is passed in, so that it is tested without waiting.
#[derive(Debug)]
pub struct Pacer {
    /// Bytes per second; `None` is unlimited.
    rate: Option<u64>,
    /// When the bytes sent so far will have been paid for.
    paid: Option<Instant>,
}

impl Pacer {
    /// Limits to `rate` bytes per second, or not at all.
    pub fn new(rate: Option<u64>) -> Self {
        Self { rate: rate.filter(|&rate| rate > 0), paid: None }
    }

    /// Notes `bytes` sent at `now`; returns how long to wait before the next frame.
    pub fn on_sent(&mut self, bytes: usize, now: Instant) -> Duration {
        let Some(rate) = self.rate else { return Duration::ZERO };
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

    #[test]
    fn keeps_the_rate_over_time() {
        let mut pacer = Pacer::new(Some(100_000_000));
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
        let mut pacer = Pacer::new(Some(1_000_000));
        let now = Instant::now();
        pacer.on_sent(1000, now);
        let later = now + Duration::from_secs(60);
        assert_eq!(pacer.on_sent(1000, later), Duration::ZERO);
        assert!(pacer.on_sent(5000, later) > Duration::ZERO);
    }

    #[test]
    fn unlimited_never_waits() {
        assert_eq!(Pacer::new(None).on_sent(1 << 30, Instant::now()), Duration::ZERO);
        assert_eq!(Pacer::new(Some(0)).on_sent(1 << 30, Instant::now()), Duration::ZERO);
    }
}
