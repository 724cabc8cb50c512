//! Carries a run's fault out, and mends afterwards what an operator or a supervisor would mend.

use std::fs;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use rustix::process::Signal;

use super::journal;
use super::plan::{Fault, Moment, Plan, Role};
use super::site::{ANSWER_LIMIT, Site};
use crate::lab::plan::{MANAGEMENT_NIC, MIGRATION_NIC};
use crate::lab::{Filler, Process, ReadyIp, Side};

/// Left on a disk that is about to be full: what a migration may write until then.
const ROOM_BEFORE: u64 = 128 << 10;
/// What tmpfs gives a file at a time, bytes.
const PAGE: u64 = 4096;
/// Lengths of the journal's records that a side writes before its first round, bytes, roughly.
const OFFERED: u64 = 132;
const WAITING: u64 = 132;
/// An address that nobody has.
const NOBODY: &str = "02:00:00:00:00:01";
/// How long a destination's QEMU that is to be killed may take to be there.
const VICTIM_LIMIT: Duration = Duration::from_secs(2);

/// Everything for a fault is ready, so that it happens within a fraction of a millisecond.
pub(super) struct Armed<'a> {
    site: &'a Site,
    plan: &'a Plan,
    source: Side,
    /// Of host-a and host-b, for faults of the network.
    ips: Vec<(Side, ReadyIp)>,
    filler: Option<Filler>,
}

/// A fault that has happened.
#[derive(Clone, Debug)]
pub(super) struct Strike {
    pub at: SystemTime,
    /// On which host a QEMU was killed, and when it certainly did not run any more.
    pub killed: Option<(Side, SystemTime)>,
}

impl<'a> Armed<'a> {
    pub fn new(site: &'a Site, plan: &'a Plan, source: Side) -> Result<Self> {
        let mut armed = Self { site, plan, source, ips: Vec::new(), filler: None };
        match plan.fault {
            Fault::CutControl | Fault::SilenceControl | Fault::CutMigration | Fault::CutBoth => {
                for side in Side::BOTH {
                    armed.ips.push((side, site.host(side).ready_ip()?));
                }
            }
            Fault::FillDisk(role) => {
                armed.pad_journal(role)?;
                armed.filler = Some(site.host(role.side(source)).fill_state_disk(ROOM_BEFORE)?);
            }
            _ => {}
        }
        Ok(armed)
    }

    /// A full disk still takes what fits into a file's last page: an agent's journal goes on for dozens of records.
    /// Lengthens it by migrations of long ago, until the planned room is left at the time of the fault.
    fn pad_journal(&self, role: Role) -> Result<()> {
        let host = self.site.host(role.side(self.source));
        let path = journal::path(&host.state_dir());
        let length = || Ok::<_, anyhow::Error>(fs::metadata(&path).context("looking at a journal")?.len());
        // The agent must not have it open, and writes it anew when it starts.
        let pad = |session: u64, bytes: u64| -> Result<u64> {
            let before = length()?;
            host.kill_agent();
            journal::append_past(&path, session, usize::try_from(bytes)?)?;
            host.start_agent()?;
            Ok(length()? - before)
        };
        let overhead = pad(self.plan.seed, 0)?;
        let before_strike = match (self.plan.moment, role) {
            (Moment::Preparing(_), _) => 0,
            (_, Role::Source) => OFFERED,
            (_, Role::Destination) => WAITING,
        };
        let end = length()? + overhead + before_strike + self.plan.journal_room;
        pad(self.plan.seed.wrapping_add(1), end.next_multiple_of(PAGE) - end)?;
        Ok(())
    }

    /// The fault happens.
    pub fn strike(&mut self, command: &mut Process) -> Result<Strike> {
        let at = SystemTime::now();
        let mut killed = None;
        match self.plan.fault {
            Fault::KillAgent(role) => self.signal(role, Signal::KILL)?,
            Fault::KillAgents => {
                self.signal(Role::Source, Signal::KILL)?;
                self.signal(Role::Destination, Signal::KILL)?;
            }
            Fault::KillQemu(role) => killed = self.kill_qemu(role, command)?,
            Fault::Crash(role) => {
                let side = role.side(self.source);
                let watch = self.site.watch(side);
                self.site.host(side).crash(|| {
                    killed = watch.kill()?.map(|_| (side, SystemTime::now()));
                    Ok(())
                })?;
                // One that had just been started, and was not seen yet, is gone as well.
                killed = killed.or_else(|| Some((side, SystemTime::now())));
            }
            Fault::CutControl => self.link(MANAGEMENT_NIC, "down")?,
            Fault::CutMigration => self.link(MIGRATION_NIC, "down")?,
            Fault::CutBoth => {
                self.link(MANAGEMENT_NIC, "down")?;
                self.link(MIGRATION_NIC, "down")?;
            }
            Fault::SilenceControl => self.tell_both(|side| {
                let peer = side.other().management_ip();
                format!("neigh replace {peer} lladdr {NOBODY} dev {MANAGEMENT_NIC} nud permanent")
            })?,
            Fault::FillDisk(_) => {
                self.filler.as_mut().context("no disk was made ready to be filled")?.fill_up()?;
            }
            Fault::Freeze(role) => self.signal(role, Signal::STOP)?,
            // What `xferry cancel` asks, without the milliseconds that its start takes. That there is nothing to cancel
            // is an answer, too.
            Fault::Cancel => drop(self.site.host(self.source).post("/v1/cancel", ANSWER_LIMIT)),
            Fault::KillCommand => command.kill(),
        }
        Ok(Strike { at, killed })
    }

    /// Mends everything, each part in its time.
    pub fn mend(mut self, strike: &Strike, settled: impl FnOnce(Duration)) -> Result<()> {
        match self.plan.fault {
            Fault::KillAgent(role) => self.restart(&[role], strike),
            Fault::KillAgents => self.restart(&[Role::Source, Role::Destination], strike),
            Fault::Crash(role) => self.restart(&[role], strike),
            Fault::CutControl => self.after_its_time(strike, |this| this.link(MANAGEMENT_NIC, "up")),
            Fault::CutMigration => self.after_its_time(strike, |this| this.link(MIGRATION_NIC, "up")),
            Fault::CutBoth => self.after_its_time(strike, |this| {
                this.link(MANAGEMENT_NIC, "up")?;
                this.link(MIGRATION_NIC, "up")
            }),
            Fault::SilenceControl => self.after_its_time(strike, |this| {
                this.tell_both(|side| {
                    let peer = side.other().management_ip();
                    format!("neigh delete {peer} dev {MANAGEMENT_NIC}")
                })
            }),
            Fault::FillDisk(_) => {
                // Whoever frees it comes when the migration is over, or when it does not end.
                settled(self.plan.lasts);
                drop(self.filler.take());
                Ok(())
            }
            Fault::Freeze(role) => self.after_its_time(strike, |this| this.signal(role, Signal::CONT)),
            Fault::KillQemu(_) | Fault::Cancel | Fault::KillCommand => Ok(()),
        }
    }

    fn after_its_time(&mut self, strike: &Strike, mend: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let passed = strike.at.elapsed().unwrap_or_default();
        thread::sleep(self.plan.lasts.saturating_sub(passed));
        mend(self)
    }

    fn restart(&self, roles: &[Role], strike: &Strike) -> Result<()> {
        let mut waiting: Vec<(Duration, Side)> =
            roles.iter().map(|&role| (self.plan.restart[role as usize], role.side(self.source))).collect();
        waiting.sort_by_key(|(wait, _)| *wait);
        for (wait, side) in waiting {
            let passed = strike.at.elapsed().unwrap_or_default();
            thread::sleep(wait.saturating_sub(passed));
            // Takes the killed one's exit status.
            self.site.host(side).kill_agent();
            self.site.host(side).start_agent()?;
        }
        Ok(())
    }

    fn signal(&self, role: Role, signal: Signal) -> Result<()> {
        self.site.host(role.side(self.source)).signal_agent(signal)
    }

    /// The destination's may not have been started yet: then it dies as soon as it is there.
    fn kill_qemu(&self, role: Role, command: &mut Process) -> Result<Option<(Side, SystemTime)>> {
        let side = role.side(self.source);
        let deadline = Instant::now() + VICTIM_LIMIT;
        loop {
            if self.site.watch(side).kill()?.is_some() {
                return Ok(Some((side, SystemTime::now())));
            }
            if command.try_wait()?.is_some() || Instant::now() > deadline {
                return Ok(None);
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn link(&mut self, nic: &str, state: &str) -> Result<()> {
        let end = self.plan.end.side(self.source);
        for (_, ip) in self.ips.iter_mut().filter(|(side, _)| *side == end) {
            ip.say(&format!("link set {nic} {state}"))?;
        }
        Ok(())
    }

    fn tell_both(&mut self, line: impl Fn(Side) -> String) -> Result<()> {
        self.ips.iter_mut().try_for_each(|(side, ip)| ip.say(&line(*side)))
    }
}
