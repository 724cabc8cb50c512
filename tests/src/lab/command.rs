//! Runs the system's own tools (`ip`, `bridge`) and turns a failure into an error that says which.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Runs `program args…` to its end and returns its standard output.
///
/// # Errors
/// If it cannot be started or fails; the error has the whole command and what it said.
pub(crate) fn run(program: &str, args: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run `{program}`: is iproute2 installed?"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{program} {}` failed: {}", args.join(" "), said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs `ip` with the words of `line`.
pub(super) fn ip(line: &str) -> Result<()> {
    let words: Vec<&str> = line.split_whitespace().collect();
    run("ip", &words).map(drop)
}
