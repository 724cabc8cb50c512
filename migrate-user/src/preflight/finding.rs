//! What one check found.

use serde::{Deserialize, Serialize};

/// A kind of check. Its name is the first column of the table, and what `--force` and documentation call it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Check {
    /// The VM's monitor answers.
    Monitor,
    /// The VM runs, and is not on its way already.
    VmState,
    /// RAM is in shared files of a kind whose changes can be tracked.
    RamBacking,
    /// No device writes guest memory unseen.
    Devices,
    /// QEMU itself has nothing against it.
    QemuBlockers,
    /// How dirty pages will be found.
    DirtyScan,
    /// The source's migration NIC can be used.
    SendingNic,
    /// The other agent answers, in a protocol that this one speaks.
    Peer,
    /// Both agents have proved who they are, and nobody else reads what they say.
    ControlChannel,
    /// Pages are encrypted, or need not be.
    PageEncryption,
    /// Versions of both agents.
    Agents,
    /// Both hosts' clocks.
    ClockOffset,
    /// The destination takes another VM.
    Admission,
    /// The destination can start the waiting QEMU.
    QemuStart,
    /// QEMU's versions.
    QemuVersion,
    /// Machine types.
    MachineType,
    /// KVM or TCG on both.
    Accelerator,
    /// Number and places of vCPUs.
    Vcpus,
    /// Which processor the guest believes to have.
    CpuModel,
    /// Features of the processor.
    CpuFeatures,
    /// The time-stamp counter.
    Tsc,
    /// Types of devices.
    DeviceSet,
    /// Memory backends.
    RamLayout,
    /// NUMA nodes of the guest.
    Numa,
    /// Page size of the RAM's files.
    PageSize,
    /// Free memory, or free huge pages.
    Memory,
    /// Room in the file systems of the RAM's files.
    RamRoom,
    /// Disk images.
    Disks,
    /// Where the VM is announced.
    Uplink,
    /// How frames are received.
    Xdp,
    /// Frames of full size cross the migration network.
    PathMtu,
}

impl Check {
    /// All of them, in the table's order.
    pub const ALL: [Self; 31] = [
        Self::Monitor,
        Self::VmState,
        Self::RamBacking,
        Self::Devices,
        Self::QemuBlockers,
        Self::DirtyScan,
        Self::SendingNic,
        Self::Peer,
        Self::ControlChannel,
        Self::PageEncryption,
        Self::Agents,
        Self::ClockOffset,
        Self::Admission,
        Self::QemuStart,
        Self::QemuVersion,
        Self::MachineType,
        Self::Accelerator,
        Self::Vcpus,
        Self::CpuModel,
        Self::CpuFeatures,
        Self::Tsc,
        Self::DeviceSet,
        Self::RamLayout,
        Self::Numa,
        Self::PageSize,
        Self::Memory,
        Self::RamRoom,
        Self::Disks,
        Self::Uplink,
        Self::Xdp,
        Self::PathMtu,
    ];

    /// Whether `--force` overrides it. Only where the VM itself is in no danger beyond what its guest notices:
    /// a guest that executes an instruction that is missing dies of it, but an operator may know that it never
    /// does. What would mix up memory, corrupt a disk, or end in a migration that fails anyway is not
    /// overridden; nor is the destination's own say about its memory.
    pub const fn overridable(self) -> bool {
        matches!(
            self,
            Self::Agents
                | Self::ClockOffset
                | Self::QemuVersion
                | Self::CpuModel
                | Self::CpuFeatures
                | Self::Tsc
                | Self::Uplink
        )
    }

    /// Whether not knowing is a reason not to go.
    pub const fn must_be_known(self) -> bool {
        !matches!(
            self,
            Self::Agents | Self::ClockOffset | Self::Tsc | Self::DirtyScan | Self::PageSize | Self::Xdp
        )
    }

    /// Its name.
    pub fn name(self) -> String {
        match serde_json::to_value(self) {
            Ok(serde_json::Value::String(name)) => name,
            _ => format!("{self:?}"),
        }
    }
}

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As it should be.
    Good,
    /// It works, with a drawback.
    Warning,
    /// It could not be told.
    Unknown,
    /// It does not work.
    Bad,
}

impl Verdict {
    /// The sign in the table.
    pub const fn sign(self) -> char {
        match self {
            Self::Good => '✓',
            Self::Warning => '!',
            Self::Unknown => '?',
            Self::Bad => '✗',
        }
    }
}

/// What one check found, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Finding {
    /// The check.
    pub check: Check,
    /// How it came out.
    pub verdict: Verdict,
    /// What was found, with the hosts by name.
    pub found: String,
    /// What to do; empty when there is nothing to do.
    pub remedy: String,
    /// Whether `--force` would go on all the same.
    pub overridable: bool,
    /// Whether it did.
    #[serde(default)]
    pub overridden: bool,
}

impl Finding {
    fn new(check: Check, verdict: Verdict, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            check,
            verdict,
            found: found.into(),
            remedy: remedy.into(),
            overridable: check.overridable(),
            overridden: false,
        }
    }

    /// As it should be.
    pub fn good(check: Check, found: impl Into<String>) -> Self {
        Self::new(check, Verdict::Good, found, "")
    }

    /// It works, with a drawback.
    pub fn warning(check: Check, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(check, Verdict::Warning, found, remedy)
    }

    /// It could not be told.
    pub fn unknown(check: Check, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(check, Verdict::Unknown, found, remedy)
    }

    /// It does not work.
    pub fn bad(check: Check, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(check, Verdict::Bad, found, remedy)
    }

    /// Whether the VM stays because of it, unless it is overridden.
    pub fn refuses(&self) -> bool {
        match self.verdict {
            Verdict::Good | Verdict::Warning => false,
            Verdict::Unknown => self.check.must_be_known(),
            Verdict::Bad => true,
        }
    }

    /// Found and remedy in one sentence.
    fn sentence(&self) -> String {
        if self.remedy.is_empty() { self.found.clone() } else { format!("{}: {}", self.found, self.remedy) }
    }
}

/// What all findings together mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The VM can go.
    CanGo,
    /// It cannot.
    Refused,
    /// Something that must be known could not be told.
    CouldNotTell,
}

impl Outcome {
    /// The exit code of `xferry check`.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::CanGo => 0,
            Self::Refused => 1,
            Self::CouldNotTell => 2,
        }
    }
}

/// With `force`, overrides what may be overridden.
pub fn settle(findings: &mut [Finding], force: bool) {
    for finding in findings {
        finding.overridden = force && finding.refuses() && finding.check.overridable();
    }
}

/// What the findings mean.
pub fn outcome(findings: &[Finding]) -> Outcome {
    let mut refusing = findings.iter().filter(|finding| finding.refuses() && !finding.overridden).peekable();
    if refusing.peek().is_none() {
        Outcome::CanGo
    } else if refusing.any(|finding| finding.verdict == Verdict::Bad) {
        Outcome::Refused
    } else {
        Outcome::CouldNotTell
    }
}

/// All reasons against it in one message; `None` when there is none.
pub fn refusal(vm: &str, destination: &str, findings: &[Finding]) -> Option<String> {
    let outcome = outcome(findings);
    let reasons: Vec<String> = findings
        .iter()
        .filter(|finding| finding.refuses() && !finding.overridden)
        // Beside certain reasons, what could not be told is mostly their consequence.
        .filter(|finding| outcome != Outcome::Refused || finding.verdict == Verdict::Bad)
        .map(|finding| {
            let force = if finding.overridable { " (--force overrides this)" } else { "" };
            format!("{}: {}{force}", finding.check.name(), finding.sentence())
        })
        .collect();
    let verb = match outcome {
        Outcome::CanGo => return None,
        Outcome::Refused => "cannot go",
        Outcome::CouldNotTell => "does not go",
    };
    Some(format!("{vm} {verb} to {destination}: {}", reasons.join("; ")))
}

/// What a report keeps of the findings: drawbacks, and what was overridden.
pub fn notes(findings: &[Finding]) -> Vec<String> {
    let note = |finding: &Finding| {
        let name = finding.check.name();
        if finding.overridden {
            Some(format!("overridden by --force: {name}: {}", finding.found))
        } else {
            (finding.verdict != Verdict::Good).then(|| format!("{name}: {}", finding.found))
        }
    };
    findings.iter().filter_map(note).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<Finding> {
        vec![
            Finding::good(Check::VmState, "running"),
            Finding::warning(Check::PageSize, "2 MiB pages", ""),
            Finding::bad(Check::CpuFeatures, "host-b lacks avx2", "use a common model"),
            Finding::bad(Check::RamLayout, "RAM differs", "give the same -m"),
            Finding::unknown(Check::ClockOffset, "no time came", ""),
        ]
    }

    #[test]
    fn force_overrides_what_the_check_allows_and_names_it() {
        let mut findings = sample();
        settle(&mut findings, true);
        assert_eq!(outcome(&findings), Outcome::Refused);
        let reason = refusal("vm", "host-b", &findings).unwrap();
        assert!(reason.contains("ram-layout: RAM differs: give the same -m"), "{reason}");
        assert!(!reason.contains("cpu-features"), "{reason}");
        findings.retain(|finding| finding.check != Check::RamLayout);
        assert_eq!((outcome(&findings), refusal("vm", "host-b", &findings)), (Outcome::CanGo, None));
        let notes = notes(&findings);
        assert!(
            notes.contains(&"overridden by --force: cpu-features: host-b lacks avx2".into()),
            "{notes:?}"
        );
        assert!(notes.contains(&"page-size: 2 MiB pages".into()), "{notes:?}");
    }

    #[test]
    fn all_reasons_are_in_one_message() {
        let mut findings = sample();
        settle(&mut findings, false);
        let reason = refusal("vm", "host-b", &findings).unwrap();
        assert!(reason.starts_with("vm cannot go to host-b: "), "{reason}");
        assert!(reason.contains("avx2: use a common model (--force overrides this); ram-layout"), "{reason}");
    }

    #[test]
    fn not_knowing_is_a_third_outcome() {
        let mut findings = vec![Finding::unknown(Check::Peer, "no answer", "start the agent")];
        assert_eq!(outcome(&findings).exit_code(), 2);
        settle(&mut findings, true);
        assert_eq!(outcome(&findings), Outcome::CouldNotTell, "a peer that is not there is not forced");
        assert!(refusal("vm", "b", &findings).unwrap().contains("does not go"));
        findings = vec![Finding::unknown(Check::ClockOffset, "no time came", "")];
        assert_eq!(outcome(&findings), Outcome::CanGo);
        findings.push(Finding::bad(Check::Disks, "locked", ""));
        findings.push(Finding::unknown(Check::Peer, "no answer", ""));
        assert_eq!(outcome(&findings), Outcome::Refused, "a certain no is more than a perhaps");
    }

    #[test]
    fn every_check_is_in_the_manual_with_what_force_does() {
        let manual = include_str!("../../../docs/operations.md");
        assert!(Check::ALL.is_sorted() && Check::ALL.last() == Some(&Check::PathMtu));
        for check in Check::ALL {
            let name = format!("`{}`", check.name());
            let row = manual.lines().find(|line| line.starts_with('|') && line.contains(&name));
            let row = row.unwrap_or_else(|| panic!("{name} is not in docs/operations.md"));
            let marked = row.contains(&format!("{name} **F**"));
            // These are never more than a drawback: there is nothing to override.
            let harmless = matches!(check, Check::Agents | Check::ClockOffset | Check::QemuVersion);
            assert_eq!(marked, check.overridable() && !harmless, "{name}");
        }
    }

    #[test]
    fn what_could_lose_the_vm_is_never_overridden() {
        for check in [
            Check::VmState,
            Check::RamBacking,
            Check::Devices,
            Check::QemuBlockers,
            Check::MachineType,
            Check::RamLayout,
            Check::Numa,
            Check::Memory,
            Check::RamRoom,
            Check::Disks,
            Check::PathMtu,
            Check::DeviceSet,
            Check::Admission,
            Check::ControlChannel,
        ] {
            assert!(!check.overridable(), "{check:?}");
        }
        assert_eq!(Check::CpuFeatures.name(), "cpu-features");
    }
}
