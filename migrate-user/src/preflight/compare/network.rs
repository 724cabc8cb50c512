//! NICs of the VM, and the migration network.

use super::{Check, DestinationFacts, Finding, Hosts, SourceFacts};
use crate::{network::Transport, preflight::NicFacts};

pub(super) fn compare(source: &SourceFacts, destination: &DestinationFacts) -> Vec<Finding> {
    let hosts = Hosts { source: &source.host.name, destination: &destination.host.name };
    vec![uplinks(hosts, source, destination), xdp(hosts, &source.host.nic, &destination.host.nic)]
}

fn uplinks(hosts: Hosts<'_>, source: &SourceFacts, destination: &DestinationFacts) -> Finding {
    let host = hosts.destination;
    let mut problems = Vec::new();
    let mut remedies = Vec::new();
    let mut good = Vec::new();
    for uplink in &destination.uplinks {
        let mac = uplink.mac;
        match &uplink.interface {
            Some(interface) if uplink.exists => good.push(format!("{mac} by {interface}")),
            Some(interface) => {
                problems.push(format!("{host} has no interface {interface} to announce {mac}"));
                remedies
                    .push("name the uplink's bridge port as announce-on in the VM's definition".to_owned());
            }
            None => {
                problems.push(format!("cannot tell on which interface of {host} to announce {mac}"));
                remedies.push(format!(
                    "add nics = [{{ mac = \"{mac}\", announce-on = \"…\" }}] with the uplink's bridge port to the VM's definition"
                ));
            }
        }
    }
    if !problems.is_empty() {
        remedies.dedup();
        return Finding::bad(Check::Uplink, problems.join("; "), remedies.join("; "));
    }
    let unplugged = source.machine.nics.iter().find(|nic| {
        let there = destination.machine.nics.iter().find(|other| other.mac == nic.mac);
        nic.bridge.is_some() && there.is_none_or(|there| there.bridge.is_none())
    });
    if let Some(nic) = unplugged {
        return Finding::warning(
            Check::Uplink,
            format!(
                "{} is on bridge {} on {}, and on none on {host}",
                nic.mac,
                nic.bridge.as_deref().unwrap_or_default(),
                hosts.source
            ),
            "make its tap a port of the bridge (`ip link set TAP master BRIDGE`), or the VM is cut off there",
        );
    }
    if good.is_empty() {
        return Finding::good(Check::Uplink, "the VM has no NIC");
    }
    Finding::good(Check::Uplink, format!("announced on {host}: {}", good.join(", ")))
}

fn xdp(hosts: Hosts<'_>, source: &NicFacts, destination: &NicFacts) -> Finding {
    let describe = |nic: &NicFacts| {
        if nic.transport == Transport::Udp {
            return format!("{} UDP sockets, {} queue(s)", nic.name, nic.queues);
        }
        let copy = if nic.zero_copy { "zero-copy" } else { "copy mode" };
        let buffers = if nic.multi_buffer { "" } else { ", single buffer" };
        format!("{} {}, {copy}{buffers}, {} queue(s)", nic.name, nic.xdp_mode, nic.queues)
    };
    let both = [(hosts.source, source), (hosts.destination, destination)];
    let fallen = both.iter().filter_map(|(host, nic)| {
        let reason = nic.fallback.as_ref()?;
        Some(format!("the migration NIC of {host} uses UDP sockets: {reason}"))
    });
    let fallen: Vec<String> = fallen.collect();
    let found = hosts.both(describe(source), describe(destination));
    if !fallen.is_empty() {
        return Finding::warning(
            Check::Xdp,
            format!("{}; {found}", fallen.join("; ")),
            "mend that and restart the agent there, or say that it is meant: [migration] transport = \"udp\"",
        );
    }
    if source.xdp_mode == "generic" || destination.xdp_mode == "generic" {
        return Finding::warning(
            Check::Xdp,
            found,
            "generic XDP is slow: use a NIC whose driver has XDP, or turn off what its driver refuses it for",
        );
    }
    Finding::good(Check::Xdp, found)
}

/// Frames of full size have crossed: `came` of `sent`.
pub fn path_proved(mtu: usize, sent: u32, came: u64) -> Finding {
    let lost = u64::from(sent).saturating_sub(came);
    if lost == 0 {
        return Finding::good(Check::PathMtu, format!("frames of full size for MTU {mtu} cross the path"));
    }
    Finding::warning(
        Check::PathMtu,
        format!("{lost} of {sent} probe frames were lost"),
        "lost frames are sent again, at a price: look at the switch ports' and the NICs' error counters",
    )
}

/// None of them came.
pub fn path_lost(host: &str, mtu: usize, sent: u32) -> Finding {
    Finding::bad(
        Check::PathMtu,
        format!("none of {sent} frames of the full size for MTU {mtu} reached {host}"),
        "a switch or route in between has a smaller MTU, filters the data port, or the migration NICs are not connected; raise the \
         MTU there, or lower it on both migration NICs (`ip link set dev … mtu …`)",
    )
}

/// No frame could be sent, or heard.
pub fn path_unproved(problem: &str, certain: bool) -> Finding {
    if certain {
        Finding::bad(Check::PathMtu, problem, "")
    } else {
        Finding::unknown(
            Check::PathMtu,
            format!("frames were not sent: {problem}"),
            "check again when that is mended",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{found, says};
    use super::*;
    use crate::preflight::Verdict;

    #[test]
    fn uplinks_must_be_known_and_there() {
        let unknown = found(Check::Uplink, |_, b, _| b.uplinks[0].interface = None);
        says(&unknown, Verdict::Bad, &["cannot tell on which interface", "52:54:00:00:00:01", "announce-on"]);
        let gone = found(Check::Uplink, |_, b, _| b.uplinks[0].exists = false);
        says(&gone, Verdict::Bad, &["no interface eno1"]);
        assert!(gone.overridable);
        let unplugged = found(Check::Uplink, |_, b, _| b.machine.nics[0].bridge = None);
        says(&unplugged, Verdict::Warning, &["on bridge br0 on host-a", "none on host-b"]);
        let none = found(Check::Uplink, |a, b, _| {
            a.machine.nics.clear();
            b.uplinks.clear();
        });
        says(&none, Verdict::Good, &["no NIC"]);
    }

    #[test]
    fn generic_xdp_is_slow() {
        let slow = found(Check::Xdp, |_, b, _| b.host.nic.xdp_mode = "generic".into());
        says(&slow, Verdict::Warning, &["driver", "generic", "slow"]);
    }

    #[test]
    fn udp_sockets_are_told_and_their_reason_warned_of() {
        let wanted = found(Check::Xdp, |a, _, _| a.host.nic.transport = Transport::Udp);
        says(&wanted, Verdict::Good, &["mig0 UDP sockets, 2 queue(s) on host-a", "driver"]);
        let fallen = found(Check::Xdp, |_, b, _| {
            b.host.nic.transport = Transport::Udp;
            b.host.nic.fallback = Some("mig0 already has an XDP program".into());
        });
        let words =
            ["host-b uses UDP sockets: mig0 already has", "2 queue(s) on host-a", "restart the agent"];
        says(&fallen, Verdict::Warning, &words);
    }

    #[test]
    fn paths() {
        says(&path_proved(9000, 8, 8), Verdict::Good, &["MTU 9000"]);
        says(&path_proved(9000, 8, 7), Verdict::Warning, &["1 of 8"]);
        let lost = path_lost("host-b", 9000, 8);
        says(&lost, Verdict::Bad, &["MTU 9000", "host-b", "switch", "smaller MTU", "ip link set"]);
        assert!(!lost.overridable);
        says(&path_unproved("no gateway", true), Verdict::Bad, &["no gateway"]);
        assert!(path_unproved("the NIC is busy", false).refuses());
    }
}
