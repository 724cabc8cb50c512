//! Tasks that run what was built.

use std::process::{Command, ExitCode};

use anyhow::Result;

use crate::{cargo, setup};

/// The demo, with its own options.
pub fn run(arguments: &[String]) -> Result<ExitCode> {
    run_built("demo", arguments.iter().map(String::as_str).collect())
}

/// The XDP program alone.
pub fn load(arguments: &[String]) -> Result<ExitCode> {
    let mut all = vec!["load"];
    all.extend(arguments.iter().map(String::as_str));
    run_built("xferry", all)
}

fn run_built(program: &str, arguments: Vec<&str>) -> Result<ExitCode> {
    setup::run()?;
    cargo::build_release()?;
    let status = cargo::status(
        Command::new(cargo::built(program)).args(arguments).env("XFERRY_BIN", cargo::built("xferry")),
    )?;
    Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
}
