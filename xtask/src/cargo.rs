//! Calls of cargo and other programs.

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
};

use anyhow::{Context, Result, bail};

/// Root of the workspace.
pub fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_owned()
}

/// A cargo command in the workspace.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // The XDP program is the same in every build: built once for all of them.
    command.current_dir(root()).env("XFERRY_BPF_TARGET_DIR", target_dir().join("bpf"));
    command
}

/// Runs a command to its end.
pub fn status(command: &mut Command) -> Result<ExitStatus> {
    command.status().with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()))
}

/// Runs a command that must succeed.
pub fn must(command: &mut Command) -> Result<()> {
    let status = status(command)?;
    if !status.success() {
        let arguments: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
        bail!("{} {} failed ({status})", command.get_program().to_string_lossy(), arguments.join(" "));
    }
    Ok(())
}

/// What a command prints, or `None` when it cannot be started or fails.
pub fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Builds xferry and the lab.
pub fn build_release() -> Result<()> {
    must(cargo().args(["build", "--release", "--package", "migrate-user", "--package", "xferry-lab"]))
}

/// A program that [`build_release`] made.
pub fn built(name: &str) -> PathBuf {
    target_dir().join("release").join(name)
}

/// Where cargo builds.
pub fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}
