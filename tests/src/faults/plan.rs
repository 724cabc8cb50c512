//! What is to happen in one run: a pure function of its seed.

use std::fmt;
use std::time::Duration;

use super::dice::Dice;
use crate::lab::Side;

const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// How long it takes from the request to the first round.
const PREPARING: Duration = ms(80);
/// How long the first round takes at the bandwidth of a run.
const FIRST_ROUND: Duration = ms(280);
/// How long those after it take.
const LATER_ROUNDS: Duration = ms(45);
/// How long a switchover usually takes.
const SWITCHOVER: Duration = ms(8);
/// The same with what comes right after it, and for one that takes longer.
const LONG_SWITCHOVER: Duration = ms(15);
/// Confirmation, the old QEMU's end, and the freeing of its memory.
const AFTERWARDS: Duration = ms(40);
/// How soon after RESUME a moment is as often as not: there the source learns that the VM is gone.
const SOON_AFTERWARDS: Duration = ms(3);

/// A full disk leaves so many bytes at most in the journal's last page: two records.
const JOURNAL_ROOM: f64 = 160.0;

/// A host by its part in the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Role {
    Source,
    Destination,
}

impl Role {
    /// The host that has this part when the VM leaves `source`.
    pub const fn side(self, source: Side) -> Side {
        match self {
            Self::Source => source,
            Self::Destination => source.other(),
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Fault {
    /// `kill -9` of an agent.
    KillAgent(Role),
    /// `kill -9` of both.
    KillAgents,
    /// `kill -9` of a QEMU.
    KillQemu(Role),
    /// Agent, QEMU and all else on a host end at once.
    Crash(Role),
    /// The control network's link goes down.
    CutControl,
    /// The control network takes packets and delivers none, with its links up.
    SilenceControl,
    /// The migration network's link goes down.
    CutMigration,
    /// Both links go down.
    CutBoth,
    /// The disk of an agent's journal is full.
    FillDisk(Role),
    /// SIGSTOP for an agent, later SIGCONT.
    Freeze(Role),
    /// `xferry cancel`.
    Cancel,
    /// `kill -9` of `xferry migrate`.
    KillCommand,
}

impl Fault {
    /// All of them and how often each is drawn.
    pub const WEIGHTED: [(u32, Self); 17] = [
        (10, Self::KillAgent(Role::Source)),
        (10, Self::KillAgent(Role::Destination)),
        (8, Self::KillAgents),
        (4, Self::KillQemu(Role::Source)),
        (7, Self::KillQemu(Role::Destination)),
        (4, Self::Crash(Role::Source)),
        (6, Self::Crash(Role::Destination)),
        (6, Self::CutControl),
        (6, Self::SilenceControl),
        (5, Self::CutMigration),
        (5, Self::CutBoth),
        (4, Self::FillDisk(Role::Source)),
        (7, Self::FillDisk(Role::Destination)),
        (6, Self::Freeze(Role::Source)),
        (6, Self::Freeze(Role::Destination)),
        (6, Self::Cancel),
        (3, Self::KillCommand),
    ];
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KillAgent(role) => write!(f, "kill {role} agent"),
            Self::KillAgents => f.write_str("kill both agents"),
            Self::KillQemu(role) => write!(f, "kill {role} QEMU"),
            Self::Crash(role) => write!(f, "{role} host crashes"),
            Self::CutControl => f.write_str("control link down"),
            Self::SilenceControl => f.write_str("control network silent"),
            Self::CutMigration => f.write_str("migration link down"),
            Self::CutBoth => f.write_str("both links down"),
            Self::FillDisk(role) => write!(f, "{role} disk full"),
            Self::Freeze(role) => write!(f, "freeze {role} agent"),
            Self::Cancel => f.write_str("cancel"),
            Self::KillCommand => f.write_str("kill command"),
        }
    }
}

/// When it goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    /// So long after the migration was asked for.
    Preparing(Duration),
    /// So long after the first round began.
    FirstRound(Duration),
    /// So long after it ended.
    LaterRounds(Duration),
    /// So long after the source's QEMU said STOP.
    Stopped(Duration),
    /// So long after the destination's QEMU said RESUME.
    Resumed(Duration),
}

impl Moment {
    fn draw(dice: &mut Dice) -> Self {
        let of: fn(&mut Dice) -> Self = dice.pick(&[
            (9, |dice: &mut Dice| Self::Preparing(dice.up_to(PREPARING))),
            (9, |dice: &mut Dice| Self::FirstRound(dice.up_to(FIRST_ROUND))),
            (9, |dice: &mut Dice| Self::LaterRounds(dice.up_to(LATER_ROUNDS))),
            (30, |dice: &mut Dice| Self::Stopped(dice.up_to(SWITCHOVER))),
            (25, |dice: &mut Dice| Self::Stopped(dice.up_to(LONG_SWITCHOVER))),
            (9, |dice: &mut Dice| Self::Resumed(dice.up_to(SOON_AFTERWARDS))),
            (9, |dice: &mut Dice| Self::Resumed(dice.up_to(AFTERWARDS))),
        ]);
        of(dice)
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (after, what) = match self {
            Self::Preparing(after) => (after, "the request"),
            Self::FirstRound(after) => (after, "round 0 began"),
            Self::LaterRounds(after) => (after, "round 0 ended"),
            Self::Stopped(after) => (after, "STOP"),
            Self::Resumed(after) => (after, "RESUME"),
        };
        write!(f, "{:.2} ms after {what}", after.as_secs_f64() * 1e3)
    }
}

/// One run.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Plan {
    pub seed: u64,
    pub fault: Fault,
    pub moment: Moment,
    /// How long a fault lasts that passes.
    pub lasts: Duration,
    /// How long the supervisor of each host, source first, takes to start what was killed.
    pub restart: [Duration; 2],
    /// The host on which a link is taken down; the other end loses its carrier.
    pub end: Role,
    /// Bytes that still fit into the journal's last page when its disk is full.
    pub journal_room: u64,
    /// How the migration proves itself, as an option of `xferry migrate`.
    pub verify: Option<&'static str>,
    /// Whether both idle agents are killed and started again after the run: nothing may come of it.
    pub restart_after: bool,
}

impl Plan {
    pub fn of(seed: u64) -> Self {
        let dice = &mut Dice::new(seed);
        let fault = dice.pick(&Fault::WEIGHTED);
        let moment = Moment::draw(dice);
        let lasts = match fault {
            Fault::Freeze(_) => dice.mostly_short(ms(100), ms(25_000)),
            Fault::FillDisk(_) => dice.mostly_short(ms(1000), ms(10_000)),
            Fault::CutControl | Fault::SilenceControl | Fault::CutMigration | Fault::CutBoth => {
                dice.mostly_short(ms(200), ms(15_000))
            }
            _ => Duration::ZERO,
        };
        Self {
            seed,
            fault,
            moment,
            lasts,
            restart: [(); 2].map(|()| {
                if dice.happens(0.5) { Duration::ZERO } else { dice.mostly_short(ms(20), ms(3000)) }
            }),
            end: dice.pick(&[(1, Role::Source), (1, Role::Destination)]),
            journal_room: (dice.unit() * JOURNAL_ROOM) as u64,
            verify: dice.pick(&[(6, None), (2, Some("--verify=hash")), (1, Some("--verify=full"))]),
            restart_after: dice.happens(0.2) || matches!(fault, Fault::FillDisk(_)),
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.fault)?;
        if !self.lasts.is_zero() {
            write!(f, " for {:.1} s", self.lasts.as_secs_f64())?;
        }
        write!(f, ", {}", self.moment)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::dice::run_seed;
    use super::*;

    fn plans() -> Vec<Plan> {
        (0..5000).map(|run| Plan::of(run_seed(42, run))).collect()
    }

    #[test]
    fn a_seed_gives_the_same_plan_again() {
        for (run, plan) in plans().into_iter().enumerate() {
            // What a failing run says: a campaign of one run with its seed.
            assert_eq!(Plan::of(run_seed(plan.seed, 0)), plan, "run {run}");
        }
    }

    #[test]
    fn every_fault_is_drawn_about_as_often_as_its_weight_says() {
        let mut counts = BTreeMap::new();
        for plan in plans() {
            *counts.entry(plan.fault).or_insert(0_u32) += 1;
        }
        let total: u32 = Fault::WEIGHTED.iter().map(|(weight, _)| weight).sum();
        for (weight, fault) in Fault::WEIGHTED {
            let expected = 5000 * weight / total;
            let count = counts[&fault];
            assert!(count.abs_diff(expected) < expected / 2, "{fault}: {count}, expected {expected}");
        }
    }

    #[test]
    fn most_faults_hit_the_switchover_to_a_fraction_of_a_millisecond() {
        let offsets: Vec<Duration> = plans()
            .into_iter()
            .filter_map(|plan| match plan.moment {
                Moment::Stopped(after) => Some(after),
                _ => None,
            })
            .collect();
        assert!(offsets.len() > 2500, "{}", offsets.len());
        assert!(offsets.iter().all(|offset| *offset < LONG_SWITCHOVER));
        assert!(offsets.iter().any(|offset| offset.subsec_micros() % 1000 != 0));
    }

    #[test]
    fn only_faults_that_pass_last_and_long_ones_are_rare() {
        let plans = plans();
        for plan in &plans {
            let passes = !matches!(
                plan.fault,
                Fault::KillAgent(_)
                    | Fault::KillAgents
                    | Fault::KillQemu(_)
                    | Fault::Crash(_)
                    | Fault::Cancel
                    | Fault::KillCommand
            );
            assert_eq!(passes, !plan.lasts.is_zero(), "{plan}");
            assert!(
                plan.lasts <= ms(25_000) && plan.restart.iter().all(|wait| *wait <= ms(3000)),
                "{plan:?}"
            );
        }
        let all: f64 = plans.iter().map(|plan| plan.lasts.as_secs_f64()).sum();
        assert!(all / (plans.len() as f64) < 1.5, "{all} s");
    }
}
