//! The decisions.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Estimate, Prediction, RoundFigures, Throttle};

/// Pages that are predicted to take less than this are not worth another pre-copy round. Small rounds take several
/// times what is predicted from large ones (8 ms instead of 2 were measured); stopping and moving the
/// device state takes several times as long.
const QUICK: Duration = Duration::from_micros(500);
/// What a blackout takes beside pages: QEMU's stop, its device state, the commit (4–10 ms were measured, docs/performance.md).
const HANDOVER: Duration = Duration::from_millis(8);
/// From the moment that a throttle is lifted until the vCPUs have stopped, in which the guest writes as it likes.
const STOPPING: Duration = Duration::from_millis(3);
/// Smallest share of time that is believed when the rate of a throttled guest is scaled up to all of its time.
const LEAST_SHARE: f64 = 0.1;
/// A round that leaves more than this share of what the one before left has gained little.
const STALLED: f64 = 0.7;
/// What is left counts as the least there will be when it is no more than this multiple of the least that was.
const NEAR_MINIMUM: f64 = 1.25;
/// Rounds that are waited for a better moment than one that would do.
const PATIENCE: u32 = 4;
/// Rounds in a row that bring no new minimum, after which a guest that does not fit the limit is given up.
const BARREN: u32 = 30;
/// A new minimum is one by at least this factor.
const GAIN: f64 = 0.9;

/// What a handover is on its way, however little there is to send, where a frame and the word of it take `pages`, and a message and
/// its answer `words`: the last pages and that all came, the state and that it is loaded, and the commit.
pub(in crate::migration) fn on_the_way(pages: Duration, words: Duration) -> Duration {
    (pages.max(words) + words) / 2 + words + words / 2
}

/// What to do when the time is up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum TimeoutAction {
    /// Give up: the VM stays.
    #[default]
    Cancel,
    /// Stop the VM and send the rest, whatever it takes.
    Switchover,
    /// Throttle the guest from here on.
    Throttle,
}

/// What the operator wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Convergence {
    /// Longest blackout that may be predicted.
    pub downtime_limit: Duration,
    /// Time for everything up to the stop.
    pub timeout: Option<Duration>,
    /// What to do then.
    pub timeout_action: TimeoutAction,
    /// Whether the guest may be throttled when it does not converge.
    pub auto_converge: bool,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Another round while the VM runs.
    Continue,
    /// The same, with so much of the vCPUs' time taken.
    Throttle(Throttle),
    /// Stop the VM, send the rest.
    SwitchOver,
    /// The time is up, and that is what was to be done then.
    TimeIsUp,
    /// It leads nowhere.
    GiveUp,
}

/// A decision and what it rests on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Judgement {
    /// What to do.
    pub decision: Decision,
    /// The blackout if the VM were stopped now.
    pub blackout: Prediction,
}

/// The rule.
#[derive(Clone, Debug)]
pub struct Policy {
    wanted: Convergence,
    estimate: Estimate,
    throttle: Throttle,
    may_throttle: bool,
    /// Highest rate of writes seen, pages per second: what it may be again when a throttle is lifted.
    free_dirty_rate: f64,
    /// Pages that the last round left.
    previous: Option<u64>,
    /// The fewest that any round left.
    least: u64,
    /// Rounds since that was so.
    barren: u32,
    /// Rounds in which a better moment was waited for.
    waited: u32,
}

impl Policy {
    /// A policy for one migration.
    pub fn new(wanted: Convergence) -> Self {
        Self {
            wanted,
            estimate: Estimate::default(),
            throttle: Throttle::NONE,
            may_throttle: wanted.auto_converge,
            free_dirty_rate: 0.0,
            previous: None,
            least: u64::MAX,
            barren: 0,
            waited: 0,
        }
    }

    /// What is known of link and guest.
    pub fn estimate(&self) -> &Estimate {
        &self.estimate
    }

    /// The vCPUs cannot be throttled: what was decided is not so, and will not be decided again.
    pub fn cannot_throttle(&mut self) {
        self.throttle = Throttle::NONE;
        self.may_throttle = false;
        self.wanted.timeout_action = match self.wanted.timeout_action {
            // It was to end there with the VM moved or not; without a throttle it would not end.
            TimeoutAction::Throttle => TimeoutAction::Cancel,
            other => other,
        };
    }

    /// Takes note of a round that ended `elapsed` after the migration had begun, and decides.
    pub fn after(&mut self, round: &RoundFigures, elapsed: Duration) -> Judgement {
        self.estimate.learn(round);
        if !round.duration.is_zero() {
            // A guest that writes the same pages again and again shows its rate only when it is slowed down.
            let share = (f64::from(100 - self.throttle.percent()) / 100.0).max(LEAST_SHARE);
            let rate = round.dirtied as f64 / round.duration.as_secs_f64() / share;
            self.free_dirty_rate = self.free_dirty_rate.max(rate);
        }
        let blackout = self.blackout(round);
        let decision = self.decide(round, blackout, elapsed);
        if let Decision::Throttle(throttle) = decision {
            self.throttle = throttle;
        }
        Judgement { decision, blackout }
    }

    /// The blackout if the VM were stopped after this round.
    fn blackout(&self, round: &RoundFigures) -> Prediction {
        // A throttle is lifted before the stop, so that the vCPUs stop at once.
        let outburst =
            if self.throttle.is_none() { 0.0 } else { self.free_dirty_rate * STOPPING.as_secs_f64() };
        let pages = self.estimate.predict(round.remaining.saturating_add(outburst as u64));
        // What a scan's stop took, the last one takes too: its I/O has to end in both.
        let fixed = HANDOVER + round.stun + round.way;
        Prediction {
            expected: pages.expected.saturating_add(fixed),
            at_most: pages.at_most.saturating_add(fixed),
        }
    }

    fn decide(&mut self, round: &RoundFigures, blackout: Prediction, elapsed: Duration) -> Decision {
        let stalled = self
            .previous
            .replace(round.remaining)
            .is_some_and(|previous| round.remaining as f64 > STALLED * previous as f64);
        let (remaining, least) = (round.remaining as f64, self.least as f64);
        self.barren = if remaining < GAIN * least { 0 } else { self.barren + 1 };
        self.least = self.least.min(round.remaining);

        let quick = self.estimate.sending(round.remaining).is_some_and(|time| time <= QUICK);
        if quick {
            return Decision::SwitchOver;
        }
        let time_is_up = self.wanted.timeout.is_some_and(|timeout| elapsed >= timeout);
        if blackout.at_most <= self.wanted.downtime_limit {
            return if time_is_up { Decision::SwitchOver } else { self.fitting(round, stalled) };
        }
        if time_is_up {
            match self.wanted.timeout_action {
                TimeoutAction::Cancel => return Decision::TimeIsUp,
                TimeoutAction::Switchover => return Decision::SwitchOver,
                TimeoutAction::Throttle => self.may_throttle = true,
            }
        }
        // What is on its way for longer than is allowed gets there no sooner from a guest that rests.
        let in_reach = round.way < self.wanted.downtime_limit;
        if stalled
            && in_reach
            && self.may_throttle
            && let Some(stronger) = self.throttle.stronger()
        {
            self.barren = 0;
            return Decision::Throttle(stronger);
        }
        if self.barren < BARREN || self.time_will_tell(elapsed) {
            Decision::Continue
        } else {
            Decision::GiveUp
        }
    }

    /// What is left fits the limit: whether to take it.
    fn fitting(&mut self, round: &RoundFigures, stalled: bool) -> Decision {
        if self.not_worth_its_stun(round) {
            return Decision::SwitchOver;
        }
        if !stalled {
            return Decision::Continue;
        }
        let at_minimum = round.remaining as f64 <= NEAR_MINIMUM * self.least as f64;
        // A guest that is being throttled has waited enough.
        if at_minimum || self.waited >= PATIENCE || !self.throttle.is_none() {
            return Decision::SwitchOver;
        }
        self.waited += 1;
        Decision::Continue
    }

    /// Whether another round would shorten the blackout by less than its scan stops the VM.
    fn not_worth_its_stun(&self, round: &RoundFigures) -> bool {
        let Some(now) = self.estimate.sending(round.remaining).filter(|_| !round.stun.is_zero()) else {
            return false;
        };
        let later = (self.estimate.dirty_rate() * now.as_secs_f64()) as u64;
        let after = self.estimate.sending(later).unwrap_or(now);
        now.saturating_sub(after) <= round.stun
    }

    /// Whether the operator gave a time that is not over, after which something else happens.
    fn time_will_tell(&self, elapsed: Duration) -> bool {
        self.wanted.timeout.is_some_and(|timeout| elapsed < timeout)
    }
}
