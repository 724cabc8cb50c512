//! Tasks that run what was built.

use std::{
    os::unix::process::CommandExt,
    process::{Command, ExitCode},
};

use anyhow::{Result, bail};

use crate::{cargo, setup};

/// The demo, with its own options.
pub fn run(arguments: &[String]) -> Result<ExitCode> {
    run_built("demo", arguments.iter().map(String::as_str).collect())
}

/// The benchmark, with its own options.
pub fn bench(arguments: &[String]) -> Result<ExitCode> {
    setup::for_bench()?;
    run_built("bench", arguments.iter().map(String::as_str).collect())
}

/// The fault campaign, with its own options.
pub fn faults(arguments: &[String]) -> Result<ExitCode> {
    run_built("faults", arguments.iter().map(String::as_str).collect())
}

/// The bad wire's measurement, with its own options.
pub fn wire(arguments: &[String]) -> Result<ExitCode> {
    run_built("wire", arguments.iter().map(String::as_str).collect())
}

/// The XDP program alone.
pub fn load(arguments: &[String]) -> Result<ExitCode> {
    let mut all = vec!["load"];
    all.extend(arguments.iter().map(String::as_str));
    run_built("xferry", all)
}

/// Becomes the program: it gets the terminal's signals itself and can clean up before the prompt is back.
fn run_built(program: &str, arguments: Vec<&str>) -> Result<ExitCode> {
    setup::run()?;
    cargo::build_release()?;
    let program = cargo::built(program);
    let error = Command::new(&program).args(arguments).env("XFERRY_BIN", cargo::built("xferry")).exec();
    bail!("cannot start {}: {error}", program.display())
}
