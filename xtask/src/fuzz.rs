//! `cargo xtask fuzz`: libFuzzer against every parser of what comes from outside.
//!
//! The stable compiler does, without cargo-fuzz: see `fuzz/instrument`. libFuzzer itself is compiled from the sources in
//! `libfuzzer-sys` and needs a C++ compiler.

use std::{
    path::PathBuf,
    process::{Command, ExitCode},
};

use anyhow::{Result, bail};

use crate::cargo::{self, cargo};

/// Parsers, one binary each in `fuzz/`.
pub const TARGETS: [&str; 9] =
    ["frame", "feedback", "control", "definition", "config", "journal", "qmp", "maps", "locate"];
/// Executions of each target within `cargo xtask test`.
pub const BOUNDED: u64 = 200_000;
/// Longest that one target may take of these, s. The slowest needs less on a slow machine.
pub const BOUNDED_SECONDS: u64 = 20;
/// Naming the target keeps AddressSanitizer out of build scripts and macros.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// What AddressSanitizer needs. A flag that stable compilers know as well, and only hide.
const ASAN_FLAG: &str = "-Zsanitizer=address";

/// How the targets are compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Build {
    /// With overflow checks and debug assertions; the targets look at their memory themselves.
    Plain,
    /// With AddressSanitizer too, which sees accesses outside of what was allocated: in the `unsafe` code that the frame
    /// target reaches, and in dependencies. About half as fast.
    Asan,
}

/// When a target has run enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// Executions.
    pub runs: Option<u64>,
    /// Time, s.
    pub seconds: Option<u64>,
}

/// Runs the targets that `arguments` name, or all.
pub fn run(arguments: &[String]) -> Result<ExitCode> {
    let (targets, bound, build) = parse(arguments)?;
    if let Some(reason) = lacking(build) {
        bail!("{reason}");
    }
    make(build)?;
    let mut failed = Vec::new();
    for target in targets {
        println!("== fuzz {target}");
        if !cargo::status(&mut fuzzer(target, bound, build))?.success() {
            failed.push(target);
        }
    }
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    println!("failed: {}; the inputs are in {}", failed.join(", "), home().join("artifacts").display());
    Ok(ExitCode::FAILURE)
}

/// What the machine lacks for it, if anything.
pub fn lacking(build: Build) -> Option<String> {
    if cargo::output("c++", &["--version"]).is_none() {
        return Some("fuzzing: no C++ compiler (c++; Debian: g++)".into());
    }
    if build == Build::Plain {
        return None;
    }
    let directory = cargo::output("rustc", &["--print", "target-libdir", "--target", TRIPLE]);
    let files = directory.and_then(|directory| std::fs::read_dir(directory.trim()).ok());
    let Some(files) = files else {
        return Some(format!("fuzzing: the compiler has no standard library for {TRIPLE}"));
    };
    // `librustc-stable_rt.asan.a`; distributions may leave it out.
    let runtime = |name: &str| name.starts_with("librustc") && name.ends_with("_rt.asan.a");
    let mut names = files.flatten().map(|file| file.file_name());
    let found = names.any(|name| name.to_str().is_some_and(runtime));
    (!found).then(|| "fuzzing: the compiler has no AddressSanitizer (rustup's compilers have one)".into())
}

/// Builds all targets.
pub fn make(build: Build) -> Result<()> {
    let mut command = cargo();
    command
        .args(["build", "--release", "--quiet", "--package", "xferry-fuzz", "--bins"])
        .env("RUSTC_WORKSPACE_WRAPPER", home().join("instrument"));
    if build == Build::Asan {
        command
            .args(["--target", TRIPLE, "--target-dir"])
            .arg(asan_dir())
            .env("RUSTFLAGS", ASAN_FLAG)
            .env("RUSTC_BOOTSTRAP", "1");
    }
    cargo::must(&mut command)
}

/// A target's process, with the least priority: others may work here too.
pub fn fuzzer(target: &str, bound: Bound, build: Build) -> Command {
    let found = cargo::target_dir().join("fuzz").join("corpus").join(target);
    let artifacts = home().join("artifacts").join(target);
    for directory in [&found, &artifacts] {
        // If it cannot be made, libFuzzer says so with its name.
        let _ = std::fs::create_dir_all(directory);
    }
    let program = match build {
        Build::Plain => cargo::built(target),
        Build::Asan => asan_dir().join(TRIPLE).join("release").join(target),
    };
    let mut command = Command::new("nice");
    command
        .arg(program)
        // The first directory takes what is found; the repository's stays as it is.
        .arg(&found)
        .arg(home().join("corpus").join(target))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args([
            "-timeout=10",
            "-rss_limit_mb=2048",
            "-print_final_stats=1",
            "-verbosity=0",
            "-print_funcs=0",
        ]);
    let words = home().join(format!("{target}.dict"));
    if words.exists() {
        command.arg(format!("-dict={}", words.display()));
    }
    if let Some(runs) = bound.runs {
        command.arg(format!("-runs={runs}"));
    }
    if let Some(seconds) = bound.seconds {
        command.arg(format!("-max_total_time={seconds}"));
    }
    command
}

fn home() -> PathBuf {
    cargo::root().join("fuzz")
}

/// Its own: all dependencies are compiled otherwise than for anything else.
fn asan_dir() -> PathBuf {
    cargo::target_dir().join("fuzz-asan")
}

fn parse(arguments: &[String]) -> Result<(Vec<&'static str>, Bound, Build)> {
    let mut build = Build::Plain;
    let mut bound = Bound { runs: None, seconds: None };
    let mut targets = Vec::new();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let mut number = || match rest.next().and_then(|text| text.parse::<u64>().ok()) {
            Some(number) if number > 0 => Ok(number),
            _ => bail!("{argument} needs a number above 0"),
        };
        match argument.as_str() {
            "--runs" => bound.runs = Some(number()?),
            "--seconds" => bound.seconds = Some(number()?),
            "--asan" => build = Build::Asan,
            name => match TARGETS.iter().find(|target| **target == name) {
                Some(target) => targets.push(*target),
                None => bail!("there is no fuzz target {name:?}; there are {}", TARGETS.join(", ")),
            },
        }
    }
    if targets.is_empty() {
        targets = TARGETS.to_vec();
    }
    if bound == (Bound { runs: None, seconds: None }) {
        bound.runs = Some(BOUNDED);
    }
    Ok((targets, bound, build))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<(Vec<&'static str>, Bound, Build)> {
        parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn arguments_are_read() {
        let (targets, bound, build) = parsed("qmp frame --runs 7 --seconds 2").unwrap();
        assert_eq!((targets, bound), (vec!["qmp", "frame"], Bound { runs: Some(7), seconds: Some(2) }));
        assert_eq!(build, Build::Plain);
        let (targets, bound, build) = parsed("--asan").unwrap();
        assert_eq!((targets.len(), bound), (TARGETS.len(), Bound { runs: Some(BOUNDED), seconds: None }));
        assert_eq!(build, Build::Asan);
        assert!(parsed("frames").unwrap_err().to_string().contains("there are frame"));
        assert!(parsed("--runs").is_err() && parsed("--runs 0").is_err() && parsed("--seconds x").is_err());
    }

    #[test]
    fn every_target_has_its_program_and_its_corpus() {
        for target in TARGETS {
            assert!(home().join("fuzz_targets").join(format!("{target}.rs")).exists(), "{target}");
            assert!(home().join("corpus").join(target).read_dir().unwrap().next().is_some(), "{target}");
        }
    }
}
