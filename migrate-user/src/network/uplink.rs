//! Where a VM's frames leave the host, when the definition does not say.

use std::path::Path;

/// The bridge that a tap is a port of.
pub fn tap_bridge(tap: &str) -> Option<String> {
    let master = std::fs::read_link(Path::new("/sys/class/net").join(tap).join("master")).ok()?;
    Some(master.file_name()?.to_string_lossy().into_owned())
}

/// The port of `bridge` that leads out of the host: the one that is not a tap. `None` when there is none or
/// more than one, since guessing wrong would announce to the wrong network.
pub fn find_uplink(bridge: &str) -> Option<String> {
    let ports = std::fs::read_dir(Path::new("/sys/class/net").join(bridge).join("brif")).ok()?;
    let mut candidates = ports
        .flatten()
        .map(|port| port.file_name().to_string_lossy().into_owned())
        .filter(|port| !Path::new("/sys/class/net").join(port).join("tun_flags").exists());
    let uplink = candidates.next()?;
    candidates.next().is_none().then_some(uplink)
}
