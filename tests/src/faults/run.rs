//! One run: a migration, its fault, and everything that is looked at afterwards.

use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;

use super::inject::Armed;
use super::journal::Journal;
use super::judge::{Evidence, Failure, Kind, Outcome, Phase};
use super::moment::Approach;
use super::owners::Owners;
use super::plan::Plan;
use super::settle::{End, settle};
use super::site::{ANSWER_LIMIT, Site};
use super::{leftovers, proof};
use crate::lab::plan::VM_NAME;
use crate::lab::{Process, Side};

/// A run that has not settled within this time after its fault hangs.
const LIMIT: Duration = Duration::from_secs(90);
/// Makes the rounds long enough to be hit.
const BANDWIDTH: [&str; 2] = ["--bandwidth", "120"];

/// What a run came to.
#[derive(Clone, Debug)]
pub(super) struct Run {
    pub phase: Phase,
    pub outcome: Outcome,
    pub failures: Vec<Failure>,
    /// From the fault until all had settled.
    pub settled_after: Duration,
    /// How long after the STOP the fault really happened, if it was after one.
    pub after_stop: Option<Duration>,
    /// The longest time for which nobody ran the VM.
    pub blackout: Duration,
    /// Where the VM runs now.
    pub owner: Side,
}

/// Migrates the VM away from `source`, disturbs that as planned, and looks at what is left. An error is one of the
/// lab.
pub(super) fn run(site: &mut Site, source: Side, plan: &Plan) -> Result<Run> {
    let mut run = disturb(site, source, plan)?;
    if run.failures.is_empty() {
        run.failures = prove(site, &mut run, plan)?;
    }
    if !run.failures.is_empty() {
        run.outcome = Outcome::Failed;
    }
    Ok(run)
}

fn disturb(site: &Site, source: Side, plan: &Plan) -> Result<Run> {
    let destination = site.host(source.other());
    let before = Journal::read(&destination.state_dir())?;
    let mut armed = Armed::new(site, plan, source)?;
    let owners = Owners::watch(site)?;
    let begun = SystemTime::now();
    let fixed = ["migrate", VM_NAME, "--to", source.other().name()];
    let options: Vec<&str> = fixed.into_iter().chain(BANDWIDTH).chain(plan.verify).collect();
    let mut command = site.host(source).xferry_started(&options)?;

    let mut approach = Approach::new(site, source, begun);
    approach.wait(plan.moment, &mut command)?;
    let strike = armed.strike(&mut command)?;
    let deadline = Instant::now() + LIMIT;
    let mended = armed.mend(&strike, |patience| {
        settle(site, &mut command, begun, deadline.min(Instant::now() + patience));
    });
    let end = match mended {
        Ok(()) => settle(site, &mut command, begun, deadline),
        Err(error) => End::Never(format!("{error:#}")),
    };
    let settled_after = strike.at.elapsed().unwrap_or_default();

    let events = Side::BOTH
        .into_iter()
        .flat_map(|side| site.watch(side).events_since(begun).into_iter().map(move |event| (side, event)));
    let evidence = Evidence {
        source,
        events: events.collect(),
        killed: strike.killed,
        doubled: owners.doubled(),
        end,
        accepted: Journal::read(&destination.state_dir())?.accepted_since(&before),
        command: ended_well(&mut command),
        report: approach.id.as_deref().and_then(|id| report_status(site, source, id)),
    };
    let (outcome, failures) = evidence.judge();
    let stopped = evidence.stopped().and_then(|stopped| strike.at.duration_since(stopped).ok());
    Ok(Run {
        phase: evidence.phase(strike.at, approach.progress),
        outcome,
        failures,
        settled_after,
        after_stop: stopped,
        blackout: evidence.blackout(),
        owner: if let End::Runs(side) = evidence.end { side } else { Side::A },
    })
}

/// Whether a command ended well; `None` if a signal ended it.
fn ended_well(command: &mut Process) -> Option<bool> {
    let status = command.try_wait().ok()??;
    status.code().map(|code| code == 0)
}

/// How the source's agent says that a migration ended; `None` if it died meanwhile.
fn report_status(site: &Site, source: Side, id: &str) -> Option<String> {
    let progress = site.host(source).get(&format!("/v1/migrations/{id}"), ANSWER_LIMIT).ok()?;
    progress["report"]["status"].as_str().map(ToOwned::to_owned)
}

/// The VM is whole and alone, and the next migration works.
fn prove(site: &mut Site, run: &mut Run, plan: &Plan) -> Result<Vec<Failure>> {
    if run.outcome == Outcome::OwnFailure {
        site.reboot()?;
        run.owner = Side::A;
    }
    let leftover = |what: Vec<String>| -> Vec<Failure> {
        what.into_iter().map(|what| Failure::new(Kind::Leftovers, what)).collect()
    };
    let mut failures = leftover(leftovers::of_migration(site, run.owner)?);
    let mut steps = || -> Result<(), Failure> {
        let sweeps = proof::guest_goes_on(site)?.sweeps;
        proof::next_migration(site, run.owner)?;
        run.owner = run.owner.other();
        proof::whole(site, sweeps)?;
        if plan.restart_after {
            proof::restart_agents(site, run.owner)?;
        }
        Ok(())
    };
    failures.extend(steps().err());
    failures.extend(leftover(leftovers::lasting(site)?));
    Ok(failures)
}
