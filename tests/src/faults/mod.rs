//! The program `faults`: a campaign of migrations in the real lab, one fault in each, at a moment that follows from a
//! seed and mostly lies within the handover.
//!
//! [`plan`] says what is to happen, [`moment`] waits for it, [`inject`] does it and mends it, [`settle`] waits for the
//! end, [`judge`] says from what was seen what became of the VM, [`leftovers`] and [`proof`] look at what is left and
//! whether the next migration works.

mod args;
mod dice;
mod inject;
mod journal;
mod judge;
mod leftovers;
mod moment;
mod owners;
mod plan;
mod proof;
mod run;
mod settle;
mod site;
mod table;

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

pub use args::Args;
pub use table::Tally;

use crate::guest::GuestKind;
use crate::lab::{self, Side};
use crate::scenario;
use judge::Phase;
use plan::Plan;
use run::Run;
use site::Site;

/// Runs the campaign of the command line.
pub fn main(args: &Args) -> ExitCode {
    let result = perform(args);
    // Whatever came of it: after Ctrl-C, whoever removes the lab has the last word.
    lab::wait_if_interrupted();
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether nothing happened that must not.
fn perform(args: &Args) -> Result<bool> {
    let seed = args.seed.unwrap_or_else(seed_of_now);
    if args.plan {
        for number in 0..args.runs {
            let plan = Plan::of(dice::run_seed(seed, number));
            println!("#{number} seed {} {plan}", plan.seed);
        }
        return Ok(true);
    }
    if let Some(reason) = scenario::missing(GuestKind::Bare) {
        bail!("the campaign cannot be run: {reason}");
    }
    println!("{} runs, seed {seed}", args.runs);
    let mut campaign = Campaign::new(seed);
    while campaign.tally.runs() < args.runs {
        campaign.run_next()?;
    }
    println!("\n{}", campaign.tally);
    if let Some(path) = &args.json {
        write(
            path,
            &(serde_json::to_string_pretty(&campaign.to_json()).context("encoding the results")? + "\n"),
        )?;
    }
    if let Some(path) = &args.markdown {
        write(path, &campaign.tally.markdown())?;
    }
    Ok(campaign.tally.holds())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Differs from call to call, and is short enough to be typed.
fn seed_of_now() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    now.as_millis() as u64 % 1_000_000_000
}

/// Runs one after the other, in one lab as long as nothing goes wrong.
pub struct Campaign {
    seed: u64,
    site: Option<Site>,
    /// Where the VM is.
    owner: Side,
    begun: Instant,
    /// What all runs came to.
    pub tally: Tally,
    failed: Vec<Value>,
}

impl Campaign {
    /// A campaign all of whose choices follow from `seed`.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            site: None,
            owner: Side::A,
            begun: Instant::now(),
            tally: Tally::default(),
            failed: Vec::new(),
        }
    }

    /// Performs the next run and prints what it came to. A run that fails is counted, and the next one gets a new lab.
    ///
    /// # Errors
    /// If no lab can be made.
    pub fn run_next(&mut self) -> Result<()> {
        let number = self.tally.runs();
        let plan = Plan::of(dice::run_seed(self.seed, number));
        let mut site = match self.site.take() {
            Some(site) => site,
            None => {
                self.owner = Side::A;
                Site::new()?
            }
        };
        let begun = Instant::now();
        let run = run::run(&mut site, self.owner, &plan).unwrap_or_else(|error| broken(&error));
        // What is seen while the lab is being removed says nothing.
        lab::wait_if_interrupted();
        println!("{}", line(number, &plan, &run, begun.elapsed()));
        if run.failures.is_empty() {
            self.owner = run.owner;
            self.site = Some(site);
        } else {
            self.report(&plan, &run, &site);
        }
        self.tally.add(plan.fault, &run);
        Ok(())
    }

    /// Shows a run that failed, and keeps it for the results.
    fn report(&mut self, plan: &Plan, run: &Run, site: &Site) {
        for failure in &run.failures {
            println!("  {failure}");
        }
        let logs = site.tails();
        println!("  replay: cargo xtask faults --seed {} --runs 1\n{logs}", plan.seed);
        let failures: Vec<String> = run.failures.iter().map(ToString::to_string).collect();
        self.failed.push(json!({
            "seed": plan.seed,
            "plan": plan.to_string(),
            "phase": run.phase.name(),
            "failures": failures,
            "logs": logs,
        }));
    }

    fn to_json(&self) -> Value {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mut fields = self.tally.fields();
        fields.insert("seed".to_owned(), self.seed.into());
        fields.insert("date".to_owned(), date(now).into());
        fields.insert("duration-s".to_owned(), self.begun.elapsed().as_secs().into());
        fields.insert("failures".to_owned(), self.failed.clone().into());
        fields.into()
    }
}

/// A run that could not be carried through: something did not do what it must.
fn broken(error: &anyhow::Error) -> Run {
    Run {
        phase: Phase::After,
        outcome: judge::Outcome::Failed,
        failures: vec![judge::Failure::new(judge::Kind::Hang, format!("{error:#}"))],
        settled_after: Duration::ZERO,
        after_stop: None,
        blackout: Duration::ZERO,
        owner: Side::A,
    }
}

fn line(number: u64, plan: &Plan, run: &Run, took: Duration) -> String {
    let hit = match run.after_stop {
        Some(after) => format!("{}, {:.2} ms after STOP", run.phase.name(), after.as_secs_f64() * 1e3),
        None => run.phase.name().to_owned(),
    };
    format!(
        "#{number} seed {} {plan} → {hit}: {}, blackout {:.0} ms, settled after {:.1} s, {:.1} s in all",
        plan.seed,
        run.outcome.name(),
        run.blackout.as_secs_f64() * 1e3,
        run.settled_after.as_secs_f64(),
        took.as_secs_f64()
    )
}

/// A day by the Gregorian calendar, of the time since 1970.
fn date(since_epoch: Duration) -> String {
    // Days since 1 March of the year 0, from which leap days are the last of their year (Howard Hinnant, `chrono`-
    // Compatible Low-Level Date Algorithms).
    let days = since_epoch.as_secs() / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_those_of_the_calendar() {
        let day = |seconds| date(Duration::from_secs(seconds));
        assert_eq!(day(0), "1970-01-01");
        assert_eq!(day(951_782_400), "2000-02-29");
        assert_eq!(day(1_735_689_599), "2024-12-31");
    }
}
