//! Certificates of the lab's hosts, made by the program under test.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::command::run;
use super::layout::Layout;
use super::plan::Side;

/// Where a host has its files.
pub(super) fn dir(host_dir: &Path) -> PathBuf {
    host_dir.join("pki")
}

/// Makes the CA and the files of both hosts, once.
pub(super) fn make(layout: &Layout, xferry: &Path) -> Result<()> {
    let ca = layout.run_dir().join("ca");
    let done = |side| dir(&layout.host_dir(side)).join("ca.pem").exists();
    if Side::BOTH.into_iter().all(done) {
        return Ok(());
    }
    init(xferry, &ca)?;
    Side::BOTH.into_iter().try_for_each(|side| issue(xferry, &ca, side.name(), &dir(&layout.host_dir(side))))
}

/// Makes a CA in `ca`.
pub(super) fn init(xferry: &Path, ca: &Path) -> Result<()> {
    let ca = ca.display().to_string();
    run(&xferry.display().to_string(), &["pki", "init", "--name", "xferry lab", "--dir", &ca, "--force"])
        .map(drop)
}

/// Makes the files of a host, in place of those that are there.
pub(super) fn issue(xferry: &Path, ca: &Path, host: &str, out: &Path) -> Result<()> {
    let (ca, out) = (ca.display().to_string(), out.display().to_string());
    let args = ["pki", "issue", host, "--dir", &ca, "--out", &out, "--force"];
    run(&xferry.display().to_string(), &args).map(drop)
}

/// Puts all certificates of a host on the CA's list, and returns where that is.
pub(super) fn revoke(xferry: &Path, ca: &Path, host: &str) -> Result<PathBuf> {
    let dir = ca.display().to_string();
    run(&xferry.display().to_string(), &["pki", "revoke", host, "--dir", &dir])?;
    Ok(ca.join("crl.pem"))
}
