//! What rounds tell about link and guest.

use std::time::Duration;

use migrate_common::PAGE_SIZE;

/// What a round adds to earlier ones' share in an average: the older half counts half.
const DECAY: f64 = 0.5;
/// A round that sends at least this share of what it looks at tells how fast the link is; one that sends less, how fast pages
/// are looked at.
const MOSTLY_SENT: f64 = 0.5;
/// Weight of the newest round in what is known of the guest.
const NEWEST: f64 = 0.6;
/// How far the first prediction may be off, before any was put to the test.
const UNTRIED: f64 = 0.25;
/// A round shorter than this is mostly its own begin and end (one way there and back, a scan), and tells nothing of rates.
const TELLING: Duration = Duration::from_millis(20);

/// What one round did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RoundFigures {
    /// Pages that were looked at. Those of huge pages that did not change are, and are not sent.
    pub looked_at: u64,
    /// Bytes of page content sent.
    pub bytes: u64,
    /// Time it took, scan included.
    pub duration: Duration,
    /// Pages that the guest wrote meanwhile, less those that were sent as it had written them.
    pub dirtied: u64,
    /// Pages to look at in the next: those written and those lost.
    pub remaining: u64,
    /// How long the VM was stopped for the scan; 0 where it need not be.
    pub stun: Duration,
    /// What pages, state and words of a handover are on their way in all, however little there is to send.
    pub way: Duration,
    /// Limit of the wire at the round's end, bytes per second, when there is one.
    pub limit: Option<u64>,
}

/// A time, and how long it may be when the estimate is as wrong as the last ones were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prediction {
    /// Most likely.
    pub expected: Duration,
    /// With its error.
    pub at_most: Duration,
}

/// An average in which old samples fade; amounts per second.
#[derive(Clone, Copy, Debug, Default)]
struct Rate {
    amount: f64,
    seconds: f64,
}

impl Rate {
    /// Long rounds say more than short ones, of which the most is fixed cost: each counts by its time.
    fn add(&mut self, amount: f64, seconds: f64) {
        self.amount = self.amount * DECAY + amount;
        self.seconds = self.seconds * DECAY + seconds;
    }

    /// `None` before anything was measured.
    fn per_second(self) -> Option<f64> {
        (self.seconds > 0.0 && self.amount > 0.0).then(|| self.amount / self.seconds)
    }
}

/// Link and guest as the rounds so far show them.
#[derive(Clone, Debug)]
pub struct Estimate {
    /// Bytes of page content on the link.
    link: Rate,
    /// Pages looked at, beside the time that sending takes.
    looking: Rate,
    /// Share of the pages looked at that is sent, 0 to 1.
    sent_share: f64,
    /// Pages written per second.
    dirty_rate: Option<f64>,
    /// Mean deviation of the dirty rate, as a share of it.
    dirty_deviation: f64,
    /// Mean error of the predicted duration of rounds, as a share of what was predicted.
    error: f64,
    limit: Option<u64>,
    rounds: u32,
}

impl Default for Estimate {
    fn default() -> Self {
        Self {
            link: Rate::default(),
            looking: Rate::default(),
            sent_share: 1.0,
            dirty_rate: None,
            dirty_deviation: UNTRIED,
            error: UNTRIED,
            limit: None,
            rounds: 0,
        }
    }
}

impl Estimate {
    /// Takes note of a round.
    pub fn learn(&mut self, round: &RoundFigures) {
        if self.rounds > 0 && round.limit != self.limit {
            // What was measured under another limit, this round's mixture included, says nothing of the next.
            *self = Self { dirty_rate: self.dirty_rate, sent_share: self.sent_share, ..Self::default() };
        }
        self.put_to_the_test(round);
        self.limit = round.limit;
        self.learn_link(round);
        self.learn_guest(round);
        self.rounds += 1;
    }

    /// How far off what was expected of this round is.
    fn put_to_the_test(&mut self, round: &RoundFigures) {
        let Some(expected) = self.sending(round.looked_at) else { return };
        let (expected, took) = (expected.as_secs_f64(), round.duration.as_secs_f64());
        if self.rounds == 0 || expected.max(took) < TELLING.as_secs_f64() {
            return;
        }
        // Sooner than expected is an error too, but one that costs nobody: it counts half.
        let off = (took - expected) / expected.max(1e-6);
        let off = if off < 0.0 { -off / 2.0 } else { off };
        self.error = self.error * (1.0 - NEWEST) + off.min(1.0) * NEWEST;
    }

    fn learn_link(&mut self, round: &RoundFigures) {
        let seconds = round.duration.as_secs_f64();
        if round.looked_at == 0 || seconds <= 0.0 {
            return;
        }
        let (looked_at, bytes) = (round.looked_at as f64, round.bytes as f64);
        let share = (bytes / (looked_at * PAGE_SIZE as f64)).min(1.0);
        // The first round is of all memory, the next ones of what a guest writes: another kind of pages.
        let weight = if self.rounds < 2 { 1.0 } else { NEWEST };
        self.sent_share = self.sent_share * (1.0 - weight) + share * weight;
        let on_link = self.link.per_second().map(|rate| bytes / rate);
        match on_link {
            Some(on_link) if share < MOSTLY_SENT => {
                self.looking.add(looked_at, (seconds - on_link).max(0.0));
            }
            _ => {
                let looking = self.looking.per_second().map_or(0.0, |rate| looked_at / rate);
                self.link.add(bytes, (seconds - looking).max(seconds * 0.1));
            }
        }
    }

    fn learn_guest(&mut self, round: &RoundFigures) {
        let seconds = round.duration.as_secs_f64();
        if seconds <= 0.0 {
            return;
        }
        let rate = round.dirtied as f64 / seconds;
        let Some(before) = self.dirty_rate else {
            self.dirty_rate = Some(rate);
            return;
        };
        let off = (rate - before).abs() / before.max(1.0);
        self.dirty_deviation = self.dirty_deviation * (1.0 - NEWEST) + off.min(1.0) * NEWEST;
        self.dirty_rate = Some(before * (1.0 - NEWEST) + rate * NEWEST);
    }

    /// Bytes of page content per second that the link carries; `None` before any were sent.
    pub fn bandwidth(&self) -> Option<f64> {
        let measured = self.link.per_second()?;
        Some(self.limit.map_or(measured, |limit| measured.min(limit as f64)))
    }

    /// Pages per second that the guest writes and that have to be sent again; 0 before the first round.
    pub fn dirty_rate(&self) -> f64 {
        self.dirty_rate.unwrap_or(0.0)
    }

    /// How much the bandwidth is to be trusted, 0 to 1: 1 when rounds took what was predicted.
    pub fn bandwidth_confidence(&self) -> f64 {
        1.0 / (1.0 + self.error)
    }

    /// The same for the dirty rate: 1 when the guest writes steadily.
    pub fn dirty_rate_confidence(&self) -> f64 {
        1.0 / (1.0 + self.dirty_deviation)
    }

    /// Time to look at `pages` and send those of them that need it; `None` before anything was measured.
    pub fn sending(&self, pages: u64) -> Option<Duration> {
        if pages == 0 {
            return Some(Duration::ZERO);
        }
        let looking = self.looking.per_second().map_or(0.0, |rate| pages as f64 / rate);
        let bytes = pages as f64 * PAGE_SIZE as f64 * self.sent_share;
        let seconds = match self.bandwidth() {
            Some(bandwidth) => looking + bytes / bandwidth,
            None if looking > 0.0 => looking,
            None => return None,
        };
        Some(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
    }

    /// The same with its error. What takes no time to speak of has none.
    pub fn predict(&self, pages: u64) -> Prediction {
        let expected = self.sending(pages).unwrap_or(Duration::MAX);
        let at_most = Duration::try_from_secs_f64(expected.as_secs_f64() * (1.0 + self.error));
        Prediction { expected, at_most: at_most.unwrap_or(Duration::MAX) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(looked_at: u64, bytes: u64, ms: u64) -> RoundFigures {
        RoundFigures { looked_at, bytes, duration: Duration::from_millis(ms), ..RoundFigures::default() }
    }

    fn milliseconds(estimate: &Estimate, pages: u64) -> f64 {
        estimate.sending(pages).unwrap().as_secs_f64() * 1e3
    }

    #[test]
    fn nothing_is_known_before_the_first_round() {
        let estimate = Estimate::default();
        assert_eq!((estimate.bandwidth(), estimate.sending(1)), (None, None));
        assert_eq!(estimate.predict(1).expected, Duration::MAX);
        assert_eq!(estimate.predict(0).at_most, Duration::ZERO);
    }

    #[test]
    fn short_rounds_do_not_hide_what_long_ones_told() {
        let mut estimate = Estimate::default();
        estimate.learn(&round(100_000, 409_600_000, 1000));
        // Fixed costs: 100 pages in 8 ms.
        for _ in 0..3 {
            estimate.learn(&round(100, 409_600, 8));
        }
        assert!(milliseconds(&estimate, 1000) < 12.0, "{}", milliseconds(&estimate, 1000));
    }

    #[test]
    fn a_link_that_became_slower_is_believed_soon() {
        let mut estimate = Estimate::default();
        estimate.learn(&round(100_000, 409_600_000, 1000));
        let before = estimate.bandwidth_confidence();
        estimate.learn(&round(100_000, 409_600_000, 2000));
        assert!(estimate.bandwidth_confidence() < before);
        for _ in 0..3 {
            estimate.learn(&round(100_000, 409_600_000, 2000));
        }
        assert!((1900.0..2001.0).contains(&milliseconds(&estimate, 100_000)));
        assert!(estimate.bandwidth_confidence() > before, "it is steady again");
    }

    #[test]
    fn looking_and_sending_are_told_apart() {
        let mut estimate = Estimate::default();
        // All sent at 100,000 pages/s, then huge pages of which 3 % changed, at a million pages/s of hashing.
        estimate.learn(&round(100_000, 409_600_000, 1000));
        estimate.learn(&round(100_000, 409_600_000 * 3 / 100, 30 + 100));
        let predicted = milliseconds(&estimate, 100_000);
        assert!((125.0..135.0).contains(&predicted), "{predicted}");
        // The link is not taken for slow because little was sent.
        assert!((estimate.bandwidth().unwrap() / 409_600_000.0 - 1.0).abs() < 0.01);
    }

    #[test]
    fn another_limit_makes_old_samples_void() {
        let mut estimate = Estimate::default();
        let limit = Some(50 << 20);
        for _ in 0..3 {
            estimate.learn(&RoundFigures { limit, ..round(100_000, 409_600_000, 7_800) });
        }
        estimate.learn(&round(100_000, 409_600_000, 1000));
        assert!((990.0..1010.0).contains(&milliseconds(&estimate, 100_000)));
        // A lower one holds at once.
        estimate.learn(&RoundFigures { limit, ..round(100_000, 409_600_000, 1000) });
        assert!(milliseconds(&estimate, 100_000) > 7_700.0);
    }

    #[test]
    fn steady_guests_are_trusted_more_than_moody_ones() {
        let dirtied = |dirtied| RoundFigures { dirtied, ..round(1000, 4_096_000, 100) };
        let (mut steady, mut moody) = (Estimate::default(), Estimate::default());
        for n in 0..6 {
            steady.learn(&dirtied(500));
            moody.learn(&dirtied(if n % 2 == 0 { 50 } else { 5000 }));
        }
        assert!((steady.dirty_rate() - 5000.0).abs() < 1.0);
        assert!(steady.dirty_rate_confidence() > 0.95 && moody.dirty_rate_confidence() < 0.7);
    }
}
