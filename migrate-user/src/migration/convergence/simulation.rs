//! Guests that write in different ways, on a simulated link, under the policy.

use std::time::Duration;

use migrate_common::PAGE_SIZE;

use super::{Convergence, Decision, Policy, RoundFigures, Throttle, TimeoutAction, on_the_way};

/// Pages of a GiB.
const GIB: u64 = (1 << 30) / PAGE_SIZE as u64;
/// Pages per second that the usual link carries: 1 GiB/s.
const LINK: f64 = GIB as f64;
/// What begins and ends a round, however small.
const ROUND: Duration = Duration::from_millis(2);
/// Rounds after which a simulation has no end.
const ENDLESS: usize = 10_000;

/// How a guest writes.
#[derive(Clone, Copy, Debug)]
enum Guest {
    /// So many pages per second, anywhere in so many.
    Uniform { rate: f64, set: u64 },
    /// Most writes fall into a few pages, the others anywhere in a second set.
    HotSet { hot_rate: f64, hot: u64, rate: f64, set: u64 },
    /// All of so many pages, over and over, as fast as faults allow.
    WriteAll { set: u64 },
    /// Flat out for the first part of each period, idle for the rest.
    Bursts { period: f64, busy: f64, rate: f64, set: u64 },
    /// One way until a time, another from then on.
    Phases { until: f64, first: (f64, u64), then: (f64, u64) },
}

/// Different pages that `writes` anywhere in `set` touch.
fn touched(writes: f64, set: u64) -> f64 {
    set as f64 * (1.0 - (-writes / set.max(1) as f64).exp())
}

impl Guest {
    /// Pages written from `begin` to `end`, in seconds, by vCPUs that have `share` of their time.
    fn dirties(self, begin: f64, end: f64, share: f64) -> u64 {
        let time = (end - begin) * share;
        let pages = match self {
            Self::Uniform { rate, set } => touched(rate * time, set),
            Self::HotSet { hot_rate, hot, rate, set } => {
                touched(hot_rate * time, hot) + touched(rate * time, set)
            }
            // 7 µs a fault were measured: that alone holds it back.
            Self::WriteAll { set } => (142_000.0 * time).min(set as f64),
            Self::Bursts { period, busy, rate, set } => {
                let busy_until = |at: f64| (at / period).floor() * busy + (at % period).min(busy);
                touched(rate * share * (busy_until(end) - busy_until(begin)), set)
            }
            Self::Phases { until, first, then } => {
                let part = |(rate, set): (f64, u64), time: f64| touched(rate * time.max(0.0) * share, set);
                part(first, end.min(until) - begin) + part(then, end - begin.max(until))
            }
        };
        pages as u64
    }
}

/// A migration of a guest with 1 GiB.
#[derive(Clone, Copy, Debug)]
struct Case {
    guest: Guest,
    /// Pages per second.
    link: f64,
    wanted: Convergence,
    /// Each scan stops the VM for so long.
    stun: Duration,
    /// Share of the pages looked at that is sent: less than 1 with huge pages.
    sent: f64,
}

/// How it went.
#[derive(Debug)]
struct Outcome {
    decision: Decision,
    rounds: usize,
    seconds: f64,
    /// Pages left.
    remaining: u64,
    /// Predicted for them.
    predicted: Duration,
    /// What they take in truth, handover included.
    blackout: Duration,
    throttles: Vec<u8>,
}

fn case(guest: Guest) -> Case {
    let wanted = Convergence {
        downtime_limit: Duration::from_millis(300),
        timeout: None,
        timeout_action: TimeoutAction::Cancel,
        auto_converge: false,
    };
    Case { guest, link: LINK, wanted, stun: Duration::ZERO, sent: 1.0 }
}

impl Case {
    fn auto_converge(mut self) -> Self {
        self.wanted.auto_converge = true;
        self
    }

    fn timeout(mut self, seconds: u64, action: TimeoutAction) -> Self {
        self.wanted.timeout = Some(Duration::from_secs(seconds));
        self.wanted.timeout_action = action;
        self
    }

    fn takes(&self, pages: u64) -> Duration {
        ROUND + Duration::from_secs_f64(pages as f64 * self.sent / self.link)
    }

    fn run(self) -> Outcome {
        let mut policy = Policy::new(self.wanted);
        let mut throttle = Throttle::NONE;
        let (mut now, mut pages, mut throttles) = (0.0, GIB, Vec::new());
        for rounds in 1..=ENDLESS {
            let duration = self.takes(pages);
            let end = now + duration.as_secs_f64();
            let share = f64::from(100 - throttle.percent()) / 100.0;
            let dirtied = self.guest.dirties(now, end, share);
            now = end + self.stun.as_secs_f64();
            let figures = RoundFigures {
                looked_at: pages,
                bytes: (pages as f64 * self.sent) as u64 * PAGE_SIZE as u64,
                duration,
                dirtied,
                remaining: dirtied,
                stun: self.stun,
                way: Duration::ZERO,
                limit: None,
            };
            let judgement = policy.after(&figures, Duration::from_secs_f64(now));
            pages = dirtied;
            match judgement.decision {
                Decision::Continue => {}
                Decision::Throttle(stronger) => {
                    assert!(stronger > throttle, "a throttle only grows");
                    throttle = stronger;
                    throttles.push(stronger.percent());
                }
                decision => {
                    // Between the throttle's end and the stop.
                    let outburst = self.guest.dirties(now, now + 0.003, 1.0 - share);
                    return Outcome {
                        decision,
                        rounds,
                        seconds: now,
                        remaining: dirtied,
                        predicted: judgement.blackout.expected,
                        blackout: self.takes(dirtied + outburst) + Duration::from_millis(6) + self.stun,
                        throttles,
                    };
                }
            }
        }
        panic!("no end: {self:?}");
    }

    /// It switches over within the limit, and the prediction was right.
    fn converges(self) -> Outcome {
        let outcome = self.run();
        assert_eq!(outcome.decision, Decision::SwitchOver, "{outcome:?}");
        assert!(outcome.blackout <= self.wanted.downtime_limit, "{outcome:?}");
        let off = outcome.blackout.abs_diff(outcome.predicted);
        assert!(off <= outcome.blackout.mul_f64(0.1) + Duration::from_millis(3), "{outcome:?}");
        outcome
    }
}

#[test]
fn idle_guests_switch_after_one_round() {
    let outcome = case(Guest::Uniform { rate: 0.0, set: GIB }).converges();
    assert_eq!((outcome.rounds, outcome.remaining), (1, 0));
}

#[test]
fn slow_writers_converge_quickly_to_a_short_blackout() {
    for (rate, rounds) in [(1000.0, 3), (5000.0, 4), (50_000.0, 8)] {
        let outcome = case(Guest::Uniform { rate, set: GIB / 4 }).converges();
        assert!(outcome.rounds <= rounds, "{outcome:?}");
        assert!(outcome.blackout < Duration::from_millis(10), "{outcome:?}");
        assert!(outcome.throttles.is_empty());
    }
}

#[test]
fn a_hot_set_that_fits_switches_when_it_stalls() {
    let guest = Guest::HotSet { hot_rate: 1e9, hot: GIB / 10, rate: 2000.0, set: GIB };
    let outcome = case(guest).converges();
    assert!(outcome.rounds <= 4, "{outcome:?}");
    assert!(outcome.remaining >= GIB / 10);
}

#[test]
fn a_hot_set_that_does_not_fit_is_given_up_without_a_throttle() {
    let guest = Guest::HotSet { hot_rate: 1e9, hot: GIB * 8 / 10, rate: 0.0, set: GIB };
    let outcome = case(guest).run();
    assert_eq!(outcome.decision, Decision::GiveUp);
    assert!((30..35).contains(&outcome.rounds), "{outcome:?}");
}

/// 256 MiB at 200 MiB/s: what is written again and again takes more than a second.
fn flat_out() -> Case {
    Case { link: LINK / 5.0, ..case(Guest::WriteAll { set: GIB / 4 }) }
}

#[test]
fn a_guest_that_writes_flat_out_converges_under_a_throttle() {
    assert_eq!(flat_out().run().decision, Decision::GiveUp);
    let outcome = flat_out().auto_converge().converges();
    assert_eq!(outcome.throttles[..2], [20, 52], "gently first");
    assert!(outcome.throttles.iter().all(|&percent| percent <= 99));
    assert!(outcome.seconds < 30.0, "{outcome:?}");
}

/// A round in which as much was written as was sent.
const STANDSTILL: RoundFigures = RoundFigures {
    looked_at: GIB,
    bytes: GIB * PAGE_SIZE as u64,
    duration: Duration::from_secs(1),
    dirtied: GIB,
    remaining: GIB,
    stun: Duration::ZERO,
    way: Duration::ZERO,
    limit: None,
};

#[test]
fn what_no_throttle_helps_is_given_up_with_all_of_it() {
    // DMA, say: it does not need vCPUs.
    struct Dma;
    impl Dma {
        fn run(mut policy: Policy) -> (Decision, Vec<u8>) {
            let mut throttles = Vec::new();
            for second in 1.. {
                match policy.after(&STANDSTILL, Duration::from_secs(second)).decision {
                    Decision::Continue => {}
                    Decision::Throttle(throttle) => throttles.push(throttle.percent()),
                    decision => return (decision, throttles),
                }
            }
            unreachable!()
        }
    }
    let (decision, throttles) = Dma::run(Policy::new(flat_out().auto_converge().wanted));
    assert_eq!((decision, throttles.last()), (Decision::GiveUp, Some(&99)));
}

#[test]
fn where_nothing_can_be_throttled_it_is_as_without() {
    let mut policy = Policy::new(flat_out().auto_converge().timeout(1, TimeoutAction::Throttle).wanted);
    policy.cannot_throttle();
    let decisions: Vec<Decision> =
        (0..2).map(|second| policy.after(&STANDSTILL, Duration::from_secs(second)).decision).collect();
    assert_eq!(decisions, [Decision::Continue, Decision::TimeIsUp]);
}

#[test]
fn between_bursts_is_when_to_switch() {
    // A second of 0.35 GiB at full speed, then two of rest.
    let guest = Guest::Bursts { period: 3.0, busy: 1.0, rate: 300_000.0, set: GIB };
    let outcome = case(guest).timeout(60, TimeoutAction::Cancel).converges();
    assert!(outcome.blackout < Duration::from_millis(12), "{outcome:?}");
}

#[test]
fn a_peak_that_fits_is_not_taken_when_less_was_seen() {
    // Rounds of 100 ms leave 30 pages, then one leaves 60,000, as a burst begins that still fits 300 ms.
    let mut policy = Policy::new(case(Guest::WriteAll { set: 1 }).wanted);
    let mut after = |remaining, ms| {
        let figures = RoundFigures {
            looked_at: 26_214,
            bytes: 26_214 * PAGE_SIZE as u64,
            duration: Duration::from_millis(ms),
            dirtied: remaining,
            remaining,
            ..RoundFigures::default()
        };
        policy.after(&figures, Duration::ZERO).decision
    };
    assert_eq!(after(2000, 100), Decision::Continue);
    assert_eq!(after(40_000, 100), Decision::Continue, "it stalls and fits, but is far from the least");
    assert_eq!(after(2100, 100), Decision::Continue);
    assert_eq!(after(2100, 100), Decision::SwitchOver, "the minimum again");
}

#[test]
fn a_guest_that_calms_down_is_waited_for_until_the_time_is_up() {
    let guest = Guest::Phases { until: 40.0, first: (1e9, GIB), then: (2000.0, GIB / 8) };
    let outcome = case(guest).timeout(60, TimeoutAction::Cancel).converges();
    assert!((40.0..45.0).contains(&outcome.seconds), "{outcome:?}");
    let outcome = case(guest).timeout(20, TimeoutAction::Cancel).run();
    assert_eq!(outcome.decision, Decision::TimeIsUp);
    assert!((20.0..22.0).contains(&outcome.seconds), "{outcome:?}");
}

#[test]
fn a_guest_that_wakes_up_is_throttled_from_then_on() {
    let guest = Guest::Phases { until: 0.5, first: (1000.0, GIB / 8), then: (140_000.0, GIB) };
    let outcome = Case { link: LINK / 4.0, ..case(guest) }.auto_converge().converges();
    assert!(!outcome.throttles.is_empty(), "{outcome:?}");
}

#[test]
fn when_the_time_is_up_that_happens_which_was_wanted() {
    let cancelled = flat_out().timeout(10, TimeoutAction::Cancel).run();
    assert_eq!(cancelled.decision, Decision::TimeIsUp);

    let switched = flat_out().timeout(10, TimeoutAction::Switchover).run();
    assert_eq!(switched.decision, Decision::SwitchOver);
    assert!(switched.blackout > Duration::from_millis(300), "whatever it takes: {switched:?}");
    // At the end of the round that was under way.
    assert!((10.0..11.5).contains(&switched.seconds), "{switched:?}");

    let throttled = flat_out().timeout(10, TimeoutAction::Throttle).converges();
    assert!(throttled.seconds > 10.0 && throttled.throttles[0] == 20, "{throttled:?}");
}

#[test]
fn throttled_guests_have_time_for_the_handover_before_they_are_freed() {
    let outcome = flat_out().auto_converge().run();
    // 142,000 pages/s for 3 ms at 52,000 pages/s are 8 ms more than what is left.
    let left = flat_out().takes(outcome.remaining);
    assert!(outcome.predicted > left + Duration::from_millis(8 + 6), "{outcome:?}");
}

#[test]
fn rounds_that_cost_more_stun_than_they_save_are_not_made() {
    let guest = Guest::Uniform { rate: 20_000.0, set: GIB };
    let live = case(guest).converges();
    let quiesced = Case { stun: Duration::from_millis(20), ..case(guest) }.converges();
    assert!(quiesced.rounds < live.rounds, "{quiesced:?} {live:?}");
    // What is left takes no longer than one more stun.
    assert!(quiesced.blackout < Duration::from_millis(60), "{quiesced:?}");
}

#[test]
fn huge_pages_of_which_little_is_sent_converge() {
    // Every huge page is looked at, and 3 % of them sent, after a first round that sends all.
    let guest = Guest::HotSet { hot_rate: 1e9, hot: GIB / 2, rate: 0.0, set: 1 };
    assert_eq!(case(guest).run().decision, Decision::GiveUp);
    let outcome = Case { sent: 0.03, ..case(guest) }.converges();
    assert!(outcome.rounds <= 6, "{outcome:?}");
}

#[test]
fn a_long_way_is_part_of_the_blackout() {
    let ms = Duration::from_millis;
    assert_eq!(on_the_way(Duration::ZERO, Duration::ZERO), Duration::ZERO);
    // Pages there, and the word back; the state there, and the word back; the commit.
    assert_eq!(on_the_way(ms(150), ms(150)), ms(375));
    assert_eq!(on_the_way(ms(150), ms(0)), ms(75), "by a nearer network the words take no time");

    let figures = |way| RoundFigures {
        looked_at: GIB,
        bytes: GIB * PAGE_SIZE as u64,
        duration: Duration::from_secs(1),
        dirtied: 5000,
        remaining: 5000,
        way,
        ..RoundFigures::default()
    };
    let judged = |way| {
        let mut policy = Policy::new(case(Guest::Uniform { rate: 5000.0, set: GIB }).wanted);
        policy.after(&figures(way), Duration::from_secs(1)).blackout
    };
    assert_eq!(judged(ms(375)).expected, judged(ms(0)).expected + ms(375));
    assert!(judged(ms(375)).at_most > ms(300), "it does not fit the limit");

    // A guest that writes as much as is sent is throttled, unless the way alone is longer than what is allowed.
    let decided = |way| {
        let mut policy = Policy::new(flat_out().auto_converge().wanted);
        let round = RoundFigures { way, ..STANDSTILL };
        let decisions: Vec<Decision> =
            (1..=60).map(|second| policy.after(&round, Duration::from_secs(second)).decision).collect();
        decisions
    };
    let throttles = |decision: &Decision| matches!(decision, Decision::Throttle(_));
    assert!(decided(ms(299)).iter().any(throttles));
    let far = decided(ms(300));
    assert!(!far.iter().any(throttles) && far.contains(&Decision::GiveUp), "{far:?}");
}
