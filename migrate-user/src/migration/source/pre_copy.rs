//! The rounds while the VM runs: carries out what the policy decides.

use std::{sync::Arc, time::Duration};

use migrate_common::PAGE_SIZE;
use tokio::time::Instant;

use super::{RoundSent, SourceHost, SourceMemory, SourceMigration, SourceRecord};
use crate::{
    control::Channel,
    memory::PageSet,
    migration::{
        Decision, Judgement, MigrationError, Policy, RoundFigures, Throttle, convergence::on_the_way,
    },
    report::{Phase, Round, RoundEstimate},
    vmm::SourceVm,
};

/// A quiesced scan begins so many times its predecessor's length after that at the earliest: the VM is never stopped for more than
/// a tenth of the time.
const REST_BETWEEN_STUNS: u32 = 9;

/// The stops that quiesced scans need.
#[derive(Debug, Default)]
pub(super) struct Stuns {
    /// The VM is stopped for one, or may be.
    pub(super) now: bool,
    /// How long the last one was, and its end.
    last: Option<(Duration, Instant)>,
}

impl Stuns {
    /// When the next may begin.
    fn next(&self) -> Option<Instant> {
        self.last.map(|(stun, end)| end + stun * REST_BETWEEN_STUNS)
    }
}

/// A round as it was sent, and its scan.
pub(super) struct Sent<'a> {
    pub(super) number: u32,
    pub(super) pages: &'a PageSet,
    pub(super) sent: &'a RoundSent,
    pub(super) duration: Duration,
    pub(super) dirtied: u64,
    pub(super) lost_frames: u64,
    pub(super) last: bool,
}

impl<V: SourceVm, M: SourceMemory, H: SourceHost, C: Channel> SourceMigration<'_, V, M, H, C> {
    /// Rounds while the VM runs. Returns what is left to send.
    pub(super) async fn pre_copy(&mut self) -> Result<PageSet, MigrationError> {
        self.enter(Phase::PreCopy);
        let offered = self.host.record(SourceRecord::Offer).await;
        self.handover.recorded(offered.is_ok());
        offered?;
        let mut policy = Policy::new(self.plan.convergence);
        let mut pages = self.first_pages().await?;
        let setup = self.record.elapsed_ms();
        self.record.update(|report| report.setup_time = setup);
        for number in 0.. {
            let begun = Instant::now();
            let pending = Arc::new(pages);
            let (sent, mut again, lost_frames) = self.round(&pending, false).await?;
            let (written, stun) = self.scan().await?;
            let duration = begun.elapsed();
            let dirtied = sent.written_besides + written.count();
            again.union_with(&written);
            let figures = RoundFigures {
                looked_at: pending.count(),
                bytes: sent.data_pages * PAGE_SIZE as u64,
                duration,
                dirtied,
                remaining: again.count(),
                stun,
                way: on_the_way(sent.way, self.words),
                limit: sent.bandwidth_limit,
            };
            let judgement = policy.after(&figures, self.begun.elapsed());
            let round =
                Sent { number, pages: &pending, sent: &sent, duration, dirtied, lost_frames, last: false };
            self.record_round(&round, Some(self.estimated(&policy, judgement, stun)));
            if self.act(&mut policy, judgement, &figures).await? == Next::Stop {
                return Ok(again);
            }
            pages = again;
        }
        unreachable!("the policy ends the rounds")
    }

    /// The pages of round 0.
    async fn first_pages(&mut self) -> Result<PageSet, MigrationError> {
        let mut pages = match self.existing.take() {
            Some(existing) => existing?,
            None => self.memory.begin().await?,
        };
        if self.plan.quiesced {
            // DMA that was under way when protection began is seen by no scan: it must be over before its pages are read.
            let (written, _) = self.scan().await?;
            pages.union_with(&written);
        }
        Ok(pages)
    }

    /// Does what was decided after a round.
    async fn act(
        &mut self,
        policy: &mut Policy,
        judgement: Judgement,
        round: &RoundFigures,
    ) -> Result<Next, MigrationError> {
        match judgement.decision {
            Decision::Continue => Ok(Next::Round),
            Decision::Throttle(throttle) => {
                self.throttle(policy, throttle).await;
                Ok(Next::Round)
            }
            Decision::SwitchOver => {
                let expected = judgement.blackout.expected.as_secs_f64() * 1e3;
                self.record.update(|report| report.expected_downtime = Some(expected));
                // Before the stop: vCPUs that rest would be waited for.
                self.loosen().await;
                Ok(Next::Stop)
            }
            Decision::TimeIsUp => Err(self.deadline()),
            Decision::GiveUp => {
                let limit = self.plan.convergence.downtime_limit;
                Err(MigrationError::NotConverging {
                    rounds: self.record.snapshot().rounds.len() as u32,
                    remaining_mib: (round.remaining * PAGE_SIZE as u64) as f64 / (1 << 20) as f64,
                    predicted_ms: judgement.blackout.at_most.as_secs_f64() * 1e3,
                    way_ms: round.way.as_secs_f64() * 1e3,
                    limit_ms: limit.as_millis() as u64,
                })
            }
        }
    }

    /// Throttles the guest. Where that cannot be done the migration goes on without.
    async fn throttle(&mut self, policy: &mut Policy, throttle: Throttle) {
        // From here on something may have to be given back.
        self.throttled = true;
        match self.vm.throttle(throttle.percent()).await {
            Ok(mechanism) => {
                tracing::info!(
                    vm = self.plan.prepare.vm,
                    percent = throttle.percent(),
                    mechanism,
                    "throttled"
                );
                self.record.update(|report| {
                    report.throttle = Some(mechanism.into());
                    report.cpu_throttle_percentage = throttle.percent();
                });
            }
            Err(error) => {
                policy.cannot_throttle();
                self.note(format!("not throttled: {error}"));
                self.unthrottle().await;
            }
        }
    }

    /// Lets the vCPUs go, at once.
    async fn loosen(&mut self) {
        if !self.throttled {
            return;
        }
        match self.vm.throttle(Throttle::NONE.percent()).await {
            Ok(_) => self.record.update(|report| report.cpu_throttle_percentage = 0),
            // The stop takes longer then, and what follows it takes the rest away.
            Err(error) => self.note(format!("the throttle was not lifted before the stop: {error}")),
        }
    }

    /// Gives back all that a throttle took.
    pub(super) async fn unthrottle(&mut self) {
        if !self.throttled {
            return;
        }
        match self.vm.unthrottle().await {
            Ok(()) => {
                self.throttled = false;
                self.record.update(|report| report.cpu_throttle_percentage = 0);
            }
            Err(error) => self.note(format!("the throttle is not lifted: {error}")),
        }
    }

    /// The pages written meanwhile; with the VM stopped for the moment of the scan where DMA could hide from it, and for how
    /// long it was.
    async fn scan(&mut self) -> Result<(PageSet, Duration), MigrationError> {
        if !self.plan.quiesced {
            return Ok((self.memory.take_written().await?, Duration::ZERO));
        }
        if let Some(next) = self.stuns.next() {
            tokio::time::sleep_until(next).await;
        }
        let begun = Instant::now();
        self.stuns.now = true;
        self.vm.pause().await?;
        let written = self.memory.take_written().await;
        self.vm.unpause().await?;
        self.stuns.now = false;
        let stun = begun.elapsed();
        self.stuns.last = Some((stun, Instant::now()));
        self.record.update(|report| report.stuns.add(stun.as_secs_f64() * 1e3));
        Ok((written?, stun))
    }

    fn estimated(&self, policy: &Policy, judgement: Judgement, stun: Duration) -> RoundEstimate {
        let estimate = policy.estimate();
        RoundEstimate {
            bandwidth: estimate.bandwidth().unwrap_or(0.0),
            bandwidth_confidence: estimate.bandwidth_confidence(),
            dirty_pages_rate: estimate.dirty_rate(),
            dirty_rate_confidence: estimate.dirty_rate_confidence(),
            expected_downtime: judgement.blackout.expected.as_secs_f64() * 1e3,
            downtime_at_most: judgement.blackout.at_most.as_secs_f64() * 1e3,
            cpu_throttle_percentage: self.record.snapshot().cpu_throttle_percentage,
            stun: stun.as_secs_f64() * 1e3,
        }
    }

    pub(super) fn record_round(&self, round: &Sent<'_>, estimate: Option<RoundEstimate>) {
        let sent = round.sent;
        self.record.update(|report| {
            report.transport.round_trip = sent.way.as_secs_f64() * 1e3;
            report.ram.transferred += sent.wire_bytes;
            report.ram.normal += sent.data_pages;
            report.ram.normal_bytes += sent.data_pages * PAGE_SIZE as u64;
            report.ram.duplicate += sent.zero_pages;
            report.unchanged.looked_at += sent.looked_at;
            report.unchanged.pages += sent.unchanged_pages;
            report.compression.add(&sent.packed);
            report.ram.dirty_sync_count += 1;
            report.rounds.push(Round {
                round: round.number,
                pages: round.pages.count(),
                bytes: sent.data_pages * PAGE_SIZE as u64,
                looked_at: sent.looked_at,
                unchanged_pages: sent.unchanged_pages,
                duration_ms: round.duration.as_secs_f64() * 1e3,
                dirtied_pages: round.dirtied,
                lost_frames: round.lost_frames,
                last: round.last,
                estimate,
            });
        });
    }
}

/// What follows a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Another.
    Round,
    /// The stop.
    Stop,
}
