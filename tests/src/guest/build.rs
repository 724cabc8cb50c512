//! Builds the guests' programs with cargo.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::cache::Cache;
use super::sources::{key, tests_dir};

/// Both programs are for this target, whatever the host's default is.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the bare-metal guest. Returns its image.
pub(super) fn bare(cache: &Cache) -> Result<PathBuf> {
    let dir = tests_dir().join("guest-bare");
    let name = format!("guest-bare-{}", key(std::slice::from_ref(&dir))?);
    let built = cache.get_or_build(&name, |into| {
        // From its own directory: it is a workspace of its own. Flags as in its `.cargo/config.toml`, which
        // the environment would override.
        build(cache, &dir, "guest-bare", "-C relocation-model=static", into)
    })?;
    Ok(built.join("guest-bare"))
}

/// Builds the program of the Linux guest. Returns it.
pub(super) fn linux(cache: &Cache) -> Result<PathBuf> {
    let dir = tests_dir().join("guest-linux");
    // All sources of the program, but not its `init`, which goes into the initial RAM disk as it is.
    let sources = ["Cargo.toml", "src", "../guest-bare/src/workload"].map(|name| dir.join(name));
    let name = format!("guest-linux-{}", key(&sources)?);
    let built = cache.get_or_build(&name, |into| {
        build(cache, &dir, "guest-linux", "-C target-feature=+crt-static -C strip=symbols", into)
    })?;
    Ok(built.join("guest-linux"))
}

fn build(cache: &Cache, dir: &Path, program: &str, flags: &str, into: &Path) -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsStr::new("cargo").to_owned());
    let target_dir = cache.build_dir();
    let mut command = Command::new(cargo);
    command
        .current_dir(dir)
        .args(["build", "--quiet", "--release", "--target", TARGET, "--bin", program])
        .env("CARGO_TARGET_DIR", &target_dir)
        .env("RUSTFLAGS", flags)
        .stdin(Stdio::null());
    // Flags and wrappers of the build that runs this must not leak into the guest.
    for name in
        ["CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET", "CARGO_BUILD_RUSTFLAGS", "RUSTC_WORKSPACE_WRAPPER"]
    {
        command.env_remove(name);
    }
    let shown = dir.display();
    let output = command.output().with_context(|| format!("running cargo in {shown}, is it installed?"))?;
    ensure!(
        output.status.success(),
        "cargo cannot build {shown} (target {TARGET} must be installed: rustup target add {TARGET}):\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let built = target_dir.join(TARGET).join("release").join(program);
    fs::copy(&built, into.join(program))
        .with_context(|| format!("copying {} to {}", built.display(), into.display()))?;
    Ok(())
}
