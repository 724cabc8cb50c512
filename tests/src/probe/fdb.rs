//! The switch's forwarding database.

use anyhow::{Context, Result};
use serde_json::Value;

use crate::lab::run_tool;

/// The port of `bridge` in the namespace `switch` behind which it has learned `mac`, if it has.
///
/// # Errors
/// If the bridge cannot be asked.
pub fn fdb_port(switch: &str, bridge: &str, mac: &str) -> Result<Option<String>> {
    let text = run_tool("bridge", &["-n", switch, "-j", "fdb", "show", "br", bridge])?;
    let entries: Value =
        serde_json::from_str(&text).with_context(|| format!("the FDB of {bridge} is not JSON: {text:?}"))?;
    Ok(find_port(&entries, mac))
}

fn find_port(entries: &Value, mac: &str) -> Option<String> {
    let entry = entries.as_array()?.iter().find(|entry| entry["mac"] == mac)?;
    entry["ifname"].as_str().map(ToOwned::to_owned)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn port_is_that_of_the_mac() {
        let entries = json!([
            {"mac": "33:33:00:00:00:01", "ifname": "port-b", "flags": ["self"], "state": "permanent"},
            {"mac": "52:54:00:78:66:01", "ifname": "port-a", "flags": [], "master": "sw0", "state": ""}
        ]);
        assert_eq!(find_port(&entries, "52:54:00:78:66:01").as_deref(), Some("port-a"));
        assert_eq!(find_port(&entries, "52:54:00:78:66:02"), None);
    }
}
