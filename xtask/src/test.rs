//! `cargo xtask test`: everything that is checked, and a count of what could not be.

use std::{
    io::{BufRead, BufReader},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, Result};

use crate::{
    cargo::{self, cargo},
    fuzz, setup,
};

/// What a test prints when it cannot run here; the reason follows.
const SKIPPED: &str = "skipped: ";

#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: Vec<String>,
}

/// Runs all of it. With a filter only the tests whose name contains it.
pub fn run(filter: &[String]) -> Result<ExitCode> {
    setup::run()?;
    let mut tally = Tally::default();
    if filter.is_empty() {
        tally.step("format", cargo().args(["fmt", "--all", "--check"]))?;
        tally.step(
            "lints",
            cargo()
                .args(["clippy", "--workspace", "--exclude", "migrate-ebpf", "--exclude", "xferry-fuzz"])
                .args(["--all-targets", "--quiet", "--", "-D", "warnings"]),
        )?;
    }
    // The lab runs what users run.
    cargo::build_release()?;
    println!("\n== unit tests");
    let unit = |select: &[&str]| {
        let mut command = cargo();
        command
            .args(["test", "--quiet", "--no-fail-fast"])
            .args(select)
            .args(["--", "--nocapture"])
            .args(filter);
        command
    };
    // Where the programs' tests were asked for at once, all of xferry would be built a second time, without tests.
    tally.tests(&mut unit(&["--lib", "--package", "migrate-common", "--package", "migrate-user"]))?;
    tally.tests(&mut unit(&["--bins", "--package", "xtask", "--package", "guest-linux"]))?;
    // With the library that was built just now.
    tally.tests(&mut unit(&["--lib", "--package", "xferry-lab", "--release"]))?;
    if filter.is_empty() {
        tally.fuzz()?;
    }
    println!("\n== lab: real hosts, real switch, real VMs");
    tally.tests(
        cargo()
            .args(["test", "--release", "--package", "xferry-lab", "--test", "*", "--no-fail-fast", "--"])
            .args(["--nocapture", "--test-threads=1"])
            .args(filter)
            .env("XFERRY_BIN", cargo::built("xferry")),
    )?;
    for reason in &tally.skipped {
        println!("skipped: {reason}");
    }
    let skipped = tally.skipped.len() as u64;
    // A skipped test ends without an error, and cargo counts it as passed.
    println!("\n{} passed, {} failed, {skipped} skipped", tally.passed.saturating_sub(skipped), tally.failed);
    Ok(if tally.failed == 0 && tally.passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Tally {
    /// A check that passes or fails as a whole.
    fn step(&mut self, name: &str, command: &mut Command) -> Result<()> {
        println!("== {name}");
        if cargo::status(command)?.success() {
            self.passed += 1;
        } else {
            self.failed += 1;
        }
        Ok(())
    }

    /// A bounded run of every fuzz target. Each counts as one test.
    fn fuzz(&mut self) -> Result<()> {
        println!("\n== fuzz: {} executions of each parser", fuzz::BOUNDED);
        if let Some(reason) = fuzz::lacking(fuzz::Build::Plain) {
            self.skipped.push(reason);
            // As with a test that skips itself: the closing line takes the skipped off the passed.
            self.passed += 1;
            return Ok(());
        }
        fuzz::make(fuzz::Build::Plain)?;
        let bound = fuzz::Bound { runs: Some(fuzz::BOUNDED), seconds: Some(fuzz::BOUNDED_SECONDS) };
        // Each takes one processor.
        let at_once = std::thread::available_parallelism().map_or(1, usize::from);
        for targets in fuzz::TARGETS.chunks(at_once) {
            let start = |&target: &&'static str| {
                let mut fuzzer = fuzz::fuzzer(target, bound, fuzz::Build::Plain);
                // What it prints is little, and shown when it has ended.
                let child = fuzzer.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
                child
                    .map(|child| (target, child))
                    .with_context(|| format!("cannot start the fuzzer of {target}"))
            };
            let started: Vec<_> = targets.iter().map(start).collect();
            for started in started {
                let (target, child) = started?;
                let output = child.wait_with_output()?;
                println!("== {target}");
                for text in [output.stdout, output.stderr] {
                    print!("{}", String::from_utf8_lossy(&text));
                }
                if output.status.success() {
                    self.passed += 1;
                } else {
                    self.failed += 1;
                }
            }
        }
        Ok(())
    }

    /// Runs test binaries, shows what they print, and reads their closing lines.
    fn tests(&mut self, command: &mut Command) -> Result<()> {
        let mut child = command.stdout(Stdio::piped()).spawn().context("cannot start cargo")?;
        let output = child.stdout.take().context("cargo has no output")?;
        let failed_before = self.failed;
        for line in BufReader::new(output).lines() {
            let line = line?;
            println!("{line}");
            self.read(&line);
        }
        // A binary that does not compile, or that dies, has no closing line.
        if !child.wait()?.success() && self.failed == failed_before {
            self.failed += 1;
        }
        Ok(())
    }

    fn read(&mut self, line: &str) {
        if let Some((_, counts)) = line.split_once("test result: ") {
            let count = |name: &str| {
                counts
                    .split(['.', ';'])
                    .find_map(|part| {
                        part.trim().strip_suffix(name)?.trim().rsplit(' ').next()?.parse::<u64>().ok()
                    })
                    .unwrap_or(0)
            };
            self.passed += count("passed");
            self.failed += count("failed");
        } else if let Some((_, reason)) = line.split_once(SKIPPED) {
            self.skipped.push(reason.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Tally;

    #[test]
    fn closing_lines_and_skips_are_counted() {
        let mut tally = Tally::default();
        tally.read(
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 1.36s",
        );
        tally.read("test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s");
        tally.read(concat!("test x ... skipped", ": no /dev/kvm here"));
        assert_eq!(
            (tally.passed, tally.failed, tally.skipped.as_slice()),
            (15, 2, &["no /dev/kvm here".to_owned()][..])
        );
    }
}
