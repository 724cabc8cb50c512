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
    let link = link(namespace, nic)?;
    link["stats64"]["tx"]["bytes"].as_u64().with_context(|| format!("no counters in {link}"))
}

/// What `ip` says of a NIC, with its counters.
///
/// # Errors
/// If there is no such NIC.
pub fn link(namespace: &str, nic: &str) -> Result<Value> {
    let text = ip(namespace, &format!("-s -j link show dev {nic}"))?;
    let mut links: Value = serde_json::from_str(&text).context("`ip` did not answer with JSON")?;
    Ok(links[0].take())
}

/// A NIC's Ethernet address.
///
/// # Errors
/// If there is no such NIC.
pub fn mac(namespace: &str, nic: &str) -> Result<[u8; 6]> {
    let link = link(namespace, nic)?;
    let text = link["address"].as_str().with_context(|| format!("no address in {link}"))?;
    let bytes: Option<Vec<u8>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes.and_then(|bytes| bytes.try_into().ok()).with_context(|| format!("{text:?} is no Ethernet address"))
}
