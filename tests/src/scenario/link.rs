//! NICs of the lab: asked and changed while everything runs.

use anyhow::{Context, Result};
use serde_json::Value;

use crate::lab::run_tool;

/// Runs `ip` in a namespace with the words of `line`.
///
/// # Errors
/// If it fails; with what it said.
pub fn ip(namespace: &str, line: &str) -> Result<String> {
    let words: Vec<&str> = ["-n", namespace].into_iter().chain(line.split_whitespace()).collect();
    run_tool("ip", &words)
}

/// Bytes that a NIC has sent.
///
/// # Errors
/// If there is no such NIC.
pub fn bytes_sent(namespace: &str, nic: &str) -> Result<u64> {
    let text = ip(namespace, &format!("-s -j link show dev {nic}"))?;
    let link: Value = serde_json::from_str(&text).context("`ip` did not answer with JSON")?;
    link[0]["stats64"]["tx"]["bytes"].as_u64().with_context(|| format!("no counters in {link}"))
}
