//! The program `bench`: xferry beside its peers, the same guest, the same link, in the same run. Ratios count; times of one
//! machine do not compare with another's.
//!
//! * [`cases`] says what is measured, and which bars it is held against.
//! * [`guests`] are the VMs that are moved; [`bed`] is where.
//! * [`peers`] are those who move them, and what else link and memory can do.
//! * [`figures`] is what one migration took, and how that is come by.
//! * [`session`] measures what cases ask for, each thing once.
//! * [`results`] are kept as JSON, [`table`] and [`plots`] show them, [`check`] compares them with what was
//!   recorded.

mod args;
mod bed;
mod cases;
mod check;
mod figures;
mod guests;
mod peers;
mod plots;
mod results;
mod row;
mod session;
mod table;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};

pub use args::Args;
use cases::Case;
use check::Recorded;
pub(crate) use figures::statistics::median;
use results::Outcome;
use session::Session;

/// Runs the benchmark.
pub fn main(args: &Args) -> ExitCode {
    if let Some(reason) = crate::lab::missing() {
        eprintln!("bench: {reason}");
        return ExitCode::FAILURE;
    }
    let result = run(args);
    crate::lab::wait_if_interrupted();
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Measures; `false` when `--check` found something.
fn run(args: &Args) -> Result<bool> {
    let path = args.recorded.clone().unwrap_or_else(|| documents().join("recorded.json"));
    let recorded = args.check.then(|| Recorded::read(&path)).transpose()?;
    let chosen = choose(args, recorded.as_ref());
    let json = args.json.clone().unwrap_or_else(|| crate::lab::target_dir().join("bench.json"));
    let mut session = Session::new(args);
    println!("{}", session.results.setting);
    for case in &chosen {
        println!("\n{}: {}", case.name, case.about);
        let begun = Instant::now();
        let mut outcome = Outcome { case: case.name, ..Outcome::default() };
        let run = (case.run)(&mut session, &mut outcome);
        // Then it failed because its lab is gone, and nothing of what follows is to happen.
        crate::lab::wait_if_interrupted();
        if let Err(error) = run {
            println!("  cannot be measured: {error:#}");
            outcome.skipped.push(format!("{error:#}"));
        }
        println!("  ({:.0} s)", begun.elapsed().as_secs_f64());
        session.results.outcomes.push(outcome);
        // A run that is cut off is not lost.
        session.results.write(&json, false)?;
    }
    session.results.write(&json, true)?;
    print!("{}", table::render(&session.results));
    println!("\nall figures: {}", json.display());
    let plots = args.plots.clone().or_else(|| args.whole().then(documents));
    if let Some(directory) = plots {
        fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        plots::draw(&session.results, &directory)?;
    }
    if args.record {
        Recorded::of(&session.results.setting, &session.results.outcomes).write(&path)?;
        println!("recorded: {}", path.display());
    }
    let worse = recorded.map(|recorded| recorded.regressions(&session.results.outcomes)).unwrap_or_default();
    for line in &worse {
        println!("WORSE than recorded: {line}");
    }
    Ok(worse.is_empty())
}

/// The cases to measure, in their order.
fn choose(args: &Args, recorded: Option<&Recorded>) -> Vec<&'static Case> {
    let kept = recorded.map(Recorded::cases);
    let wanted = |case: &&Case| match (&kept, args.only.is_empty()) {
        (_, false) => args.only.iter().any(|name| name == case.name),
        (Some(kept), true) => kept.iter().any(|name| name == case.name),
        (None, true) => case.when.includes(args.quick),
    };
    cases::ALL.iter().filter(wanted).collect()
}

/// Where the repository keeps what was measured.
fn documents() -> PathBuf {
    let manifest = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).join("docs/performance")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn names(words: &[&str], recorded: Option<&Recorded>) -> Vec<&'static str> {
        let args = Args::try_parse_from([&["bench"], words].concat()).unwrap();
        choose(&args, recorded).iter().map(|case| case.name).collect()
    }

    #[test]
    fn quick_is_a_part_and_some_are_only_by_name() {
        let (whole, quick) = (names(&[], None), names(&["--quick"], None));
        assert!(quick.len() < whole.len() && quick.iter().all(|name| whole.contains(name)));
        assert_eq!(whole[0], "random");
        assert!(!whole.contains(&"ciphers"));
        assert_eq!(names(&["--only", "ciphers"], None), ["ciphers"]);
    }

    #[test]
    fn a_check_measures_what_was_recorded() {
        let recorded: Recorded = serde_json::from_str(
            r#"{"setting":"","rows":[{"case":"blackout","name":"x","ratio":0.5,"better":"lower"}]}"#,
        )
        .unwrap();
        assert_eq!(names(&["--check"], Some(&recorded)), ["blackout"]);
    }
}
