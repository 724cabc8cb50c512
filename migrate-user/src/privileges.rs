//! The capabilities that an agent needs (capabilities(7)), and a sentence about those that it lacks.
//!
//! The kernel's own answers to a lack of them are an EPERM far away, a hundred lines of the BPF verifier, or silence.

use std::fmt::Write;

/// A capability and what it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Its name.
    pub name: &'static str,
    /// Its number (include/uapi/linux/capability.h).
    bit: u8,
    /// Number of one that includes it, if there is one.
    included_in: Option<u8>,
    /// What it is for.
    pub purpose: &'static str,
}

const SYS_ADMIN: Option<u8> = Some(21);
const DAC_OVERRIDE: Option<u8> = Some(1);

const NET_ADMIN: Capability = Capability {
    name: "CAP_NET_ADMIN",
    bit: 12,
    included_in: None,
    purpose: "attaching the XDP program to the migration NIC, and setting its channels",
};
const BPF: Capability = Capability {
    name: "CAP_BPF",
    bit: 39,
    included_in: SYS_ADMIN,
    purpose: "loading the XDP program and its maps",
};
const PERFMON: Capability = Capability {
    name: "CAP_PERFMON",
    bit: 38,
    included_in: SYS_ADMIN,
    purpose: "the XDP program: without it the verifier refuses how it uses pointers",
};

/// What an agent needs. The unit `packaging/systemd/xferry.service` has the same.
pub const AGENT: [Capability; 7] = [
    NET_ADMIN,
    Capability {
        name: "CAP_NET_RAW",
        bit: 13,
        included_in: None,
        purpose: "AF_XDP sockets, and announcements by RARP",
    },
    BPF,
    PERFMON,
    Capability {
        name: "CAP_SYS_PTRACE",
        bit: 19,
        included_in: None,
        purpose: "a VMM's page tables and its userfaultfd",
    },
    Capability {
        name: "CAP_CHECKPOINT_RESTORE",
        bit: 40,
        included_in: SYS_ADMIN,
        purpose: "opening the files that a VMM has mapped as RAM",
    },
    Capability {
        name: "CAP_DAC_READ_SEARCH",
        bit: 2,
        included_in: DAC_OVERRIDE,
        purpose: "seeing which processes of other users have a VM's disk open",
    },
];

/// What the XDP program alone needs.
pub const XDP: [Capability; 3] = [NET_ADMIN, BPF, PERFMON];

/// What stands in the way.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// Capabilities that are not there.
    #[error(
        "xferry lacks {missing}: run it as root, or add what is missing to CapabilityBoundingSet of its unit (and to \
         AmbientCapabilities with User=)"
    )]
    Missing {
        /// Names, each with what it is for.
        missing: String,
    },
    /// Nobody says what is there.
    #[error("cannot tell which capabilities xferry has: {0}")]
    Unknown(String),
}

/// Whether this process has all of `needed`.
///
/// # Errors
/// [`PrivilegeError`].
pub fn check(needed: &[Capability]) -> Result<(), PrivilegeError> {
    let status = std::fs::read_to_string("/proc/self/status");
    let status = status.map_err(|error| PrivilegeError::Unknown(format!("/proc/self/status: {error}")))?;
    let held = effective(&status).ok_or_else(|| PrivilegeError::Unknown("no CapEff in it".into()))?;
    match missing(held, needed) {
        None => Ok(()),
        Some(missing) => Err(PrivilegeError::Missing { missing }),
    }
}

/// The set of effective capabilities in a `status` of proc(5).
fn effective(status: &str) -> Option<u64> {
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(mask.trim(), 16).ok()
}

fn missing(held: u64, needed: &[Capability]) -> Option<String> {
    let has = |bit: u8| held >> bit & 1 == 1;
    let mut text = String::new();
    for one in needed.iter().filter(|one| !has(one.bit) && !one.included_in.is_some_and(has)) {
        let comma = if text.is_empty() { "" } else { ", " };
        // Writing to a string cannot fail.
        let _ = write!(text, "{comma}{} ({})", one.name, one.purpose);
    }
    Some(text).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: &str = include_str!("../../packaging/systemd/xferry.service");

    #[test]
    fn the_unit_leaves_the_agent_what_it_needs_and_no_more() {
        let line = UNIT.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).unwrap();
        let mut unit: Vec<&str> = line.split_whitespace().collect();
        let mut needed: Vec<&str> = AGENT.iter().map(|one| one.name).collect();
        unit.sort_unstable();
        needed.sort_unstable();
        assert_eq!(unit, needed);
    }

    #[test]
    fn what_is_missing_is_named() {
        let all = effective("Name:\txferry\nCapEff:\t000001c000083004\nCapBnd:\t0\n").unwrap();
        assert_eq!(missing(all, &AGENT), None);
        assert_eq!(missing(all & !(1 << 38), &AGENT).unwrap(), format!("CAP_PERFMON ({})", PERFMON.purpose));
        // An older name for several of them.
        assert_eq!(missing(1 << 12 | 1 << 21, &XDP), None);
        assert!(missing(0, &AGENT).unwrap().starts_with("CAP_NET_ADMIN (attaching the XDP program"));
        assert_eq!(missing(0, &AGENT).unwrap().matches("CAP_").count(), AGENT.len());
        assert_eq!(effective("Name:\txferry\n"), None);
    }
}
