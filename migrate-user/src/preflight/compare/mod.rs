//! Both sides' facts against each other. Pure functions: facts in, findings out.

mod cpu;
mod disks;
mod machine;
mod memory;
mod network;

pub use memory::needed;
pub use network::{path_lost, path_proved, path_unproved};

use super::{Admission, Check, DestinationFacts, Finding, HostFacts, SourceFacts};

/// What the destination can say before it starts anything. When one of these refuses, or memory is too short for
/// a QEMU that takes all of its RAM as it starts (`preallocates`), none is started.
pub fn before_launch(
    source: &SourceFacts,
    host: &HostFacts,
    admission: &Admission,
    needed: &[u64],
    preallocates: bool,
) -> Vec<Finding> {
    let mut findings = vec![agents(source, host), admitted(&host.name, admission)];
    if preallocates {
        let short = memory::before_launch(source, host, admission, needed);
        findings.extend(short.into_iter().filter(Finding::refuses));
    }
    findings
}

/// Everything that a waiting QEMU is needed for.
pub fn after_launch(
    source: &SourceFacts,
    destination: &DestinationFacts,
    admission: &Admission,
) -> Vec<Finding> {
    let hosts = Hosts { source: &source.host.name, destination: &destination.host.name };
    let started = format!("QEMU (pid {}) waits on {}", destination.pid, hosts.destination);
    let mut findings = vec![Finding::good(Check::QemuStart, started)];
    findings.extend(machine::compare(hosts, &source.machine, &destination.machine));
    findings.extend(cpu::compare(source, destination));
    findings.extend(memory::compare(source, destination, admission));
    findings.extend(disks::compare(source, destination));
    findings.extend(network::compare(source, destination));
    findings
}

/// The waiting QEMU cannot be had: `problem` in the destination's words. Nothing that needs it can be told.
pub fn not_launched(source: &SourceFacts, host: &str, problem: &str) -> Vec<Finding> {
    // QEMU itself finds a missing image, and names it.
    let image = problem.contains("Could not open '")
        || source.machine.disks.iter().any(|disk| disk.image.len() > 1 && problem.contains(&disk.image));
    let (check, remedy) = if image {
        (
            Check::Disks,
            format!(
                "make the image reachable on {host} (mount or export it), or correct its path in the definition there"
            ),
        )
    } else {
        (Check::QemuStart, String::new())
    };
    vec![Finding::bad(check, format!("{host} refuses: {problem}"), remedy), not_compared(host)]
}

/// The checks that were not made because no QEMU was started.
pub fn not_compared(host: &str) -> Finding {
    Finding::unknown(
        Check::MachineType,
        format!(
            "machine, CPU, RAM, disks and NICs were not compared: no QEMU waits on {host} to compare with, for the reason above"
        ),
        "check again when that is mended",
    )
}

/// Names of both hosts.
#[derive(Clone, Copy)]
struct Hosts<'a> {
    source: &'a str,
    destination: &'a str,
}

impl Hosts<'_> {
    /// `X on host-a, Y on host-b`.
    fn both(self, here: impl std::fmt::Display, there: impl std::fmt::Display) -> String {
        format!("{here} on {}, {there} on {}", self.source, self.destination)
    }
}

fn agents(source: &SourceFacts, host: &HostFacts) -> Finding {
    if source.host.software == host.software {
        return Finding::good(Check::Agents, format!("xferry {} on both hosts", host.software));
    }
    let hosts = Hosts { source: &source.host.name, destination: &host.name };
    Finding::warning(
        Check::Agents,
        format!("xferry {}", hosts.both(&source.host.software, &host.software)),
        "they speak the same protocol; install the same version when you can",
    )
}

fn admitted(host: &str, admission: &Admission) -> Finding {
    let arriving = admission.arriving.len();
    if admission.same {
        return Finding::bad(
            Check::Admission,
            format!("the VM is already arriving at {host}"),
            "wait until that migration, or check, has ended",
        );
    }
    match admission.max_arriving {
        Some(limit) if arriving >= limit as usize => Finding::bad(
            Check::Admission,
            format!(
                "{arriving} VM(s) are arriving at {host} ({}), and it takes {limit} at once",
                admission.arriving.join(", ")
            ),
            format!("wait until one has arrived, or raise [admission] max-arriving on {host}"),
        ),
        Some(limit) => Finding::good(
            Check::Admission,
            format!("{arriving} of at most {limit} VM(s) are arriving at {host}"),
        ),
        None => Finding::good(
            Check::Admission,
            format!("{arriving} other VM(s) are arriving at {host}, no limit"),
        ),
    }
}

/// The difference between both hosts' clocks: the destination's time in its hello lies between the source's
/// before and after, most likely in the middle. All µs since 1970.
pub fn clock(host: &str, before: Option<u64>, theirs: Option<u64>, after: Option<u64>) -> Finding {
    let (Some(before), Some(theirs), Some(after)) =
        (before, theirs, after.filter(|&after| Some(after) >= before))
    else {
        return Finding::unknown(Check::ClockOffset, format!("{host} did not tell its time"), "");
    };
    let middle = before + (after - before) / 2;
    let offset = theirs.abs_diff(middle) as f64 / 1e3;
    let error = (after - before) as f64 / 2e3;
    let side = if theirs >= middle { "ahead" } else { "behind" };
    let found = format!("{host} is {offset:.1} ms {side}, ±{error:.1} ms");
    if offset > CLOCK_OFFSET_MAX_MS + error {
        Finding::warning(
            Check::ClockOffset,
            found,
            "the guest's wall clock may jump by that much: let both hosts follow one time server (chrony)",
        )
    } else {
        Finding::good(Check::ClockOffset, found)
    }
}

/// What hosts that follow a time server stay well below, ms.
const CLOCK_OFFSET_MAX_MS: f64 = 50.0;

#[cfg(test)]
pub(super) mod tests {
    use super::super::{Backing, ImageFacts, NicFacts, Outcome, Room, Sample, Uplink, Verdict, outcome};
    use super::*;
    use crate::{
        memory::Backend,
        vmm::{CpuFacts, Disk, FeatureWord, MachineFacts, VmNic},
    };

    pub const MIB: u64 = 1 << 20;

    pub fn machine() -> MachineFacts {
        MachineFacts {
            version: "10.0.2".into(),
            machine: "pc-q35-10.0".into(),
            accelerator: "kvm".into(),
            cpu: CpuFacts {
                model: "EPYC-v4".into(),
                vendor: "AuthenticAMD".into(),
                signature: [23, 1, 2],
                phys_bits: 48,
                tsc_hz: 2_500_000_000,
                words: Some(vec![FeatureWord {
                    leaf: 7,
                    subleaf: Some(0),
                    register: "EBX".into(),
                    bits: 0b10_0001,
                }]),
                ..CpuFacts::default()
            },
            vcpus: vec!["core 0".into(), "core 1".into()],
            backends: vec![Backend { id: "ram".into(), size: 256 * MIB }],
            numa: vec![],
            devices: vec!["virtio-blk-pci".into(), "virtio-net-pci".into()],
            nics: vec![VmNic { mac: "52:54:00:00:00:01".parse().unwrap(), bridge: Some("br0".into()) }],
            disks: vec![Disk {
                device: "d0".into(),
                image: "/images/vm".into(),
                format: "raw".into(),
                size: 64 * MIB,
                read_only: false,
            }],
        }
    }

    fn host(name: &str) -> HostFacts {
        HostFacts {
            name: name.into(),
            software: "0.1.0".into(),
            boot_id: name.into(),
            available: Some(1024 * MIB),
            nic: NicFacts {
                name: "mig0".into(),
                mtu: 9000,
                xdp_mode: "driver".into(),
                multi_buffer: true,
                queues: 2,
                ..NicFacts::default()
            },
            ..HostFacts::default()
        }
    }

    fn backing() -> Backing {
        Backing {
            path: "/dev/shm/vm".into(),
            file_system: "tmpfs".into(),
            page_size: 4096,
            transparent_huge: String::new(),
            room: Room { device: 5, free: Some(1024 * MIB), taken: 0 },
        }
    }

    fn image() -> ImageFacts {
        let samples = (0..8).map(|n| Sample { offset: n * 4096, hash: Some(n) }).collect();
        ImageFacts { inode: Some((1, 2)), samples, ..ImageFacts::default() }
    }

    /// Two hosts that fit.
    pub fn pair() -> (SourceFacts, DestinationFacts, Admission) {
        let source = SourceFacts {
            host: host("host-a"),
            machine: machine(),
            pid: 10,
            backing: vec![backing()],
            images: vec![image()],
        };
        let destination = DestinationFacts {
            host: host("host-b"),
            machine: machine(),
            pid: 20,
            backing: Ok(vec![backing()]),
            reserved: true,
            needed: vec![100 * MIB],
            images: vec![image()],
            uplinks: vec![Uplink {
                mac: "52:54:00:00:00:01".parse().unwrap(),
                interface: Some("eno1".into()),
                exists: true,
            }],
        };
        (source, destination, Admission { headroom: 64 * MIB, ..Admission::default() })
    }

    /// The finding of `check` when the pair was changed so.
    pub fn found(
        check: Check,
        change: impl FnOnce(&mut SourceFacts, &mut DestinationFacts, &mut Admission),
    ) -> Finding {
        let (mut source, mut destination, mut admission) = pair();
        change(&mut source, &mut destination, &mut admission);
        let mut all = before_launch(&source, &destination.host, &admission, &destination.needed, false);
        all.extend(after_launch(&source, &destination, &admission));
        let row = all.iter().filter(|finding| finding.check == check).max_by_key(|finding| finding.verdict);
        row.unwrap_or_else(|| panic!("no row {check:?} in {all:?}")).clone()
    }

    /// It has this verdict and all these words.
    pub fn says(finding: &Finding, verdict: Verdict, words: &[&str]) {
        let text = format!("{}: {}", finding.found, finding.remedy);
        assert_eq!(finding.verdict, verdict, "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{words:?} in {text}");
    }

    #[test]
    fn a_pair_that_fits_is_good_in_every_row() {
        let (source, destination, admission) = pair();
        let mut all = before_launch(&source, &destination.host, &admission, &destination.needed, true);
        all.extend(after_launch(&source, &destination, &admission));
        assert!(all.iter().all(|finding| finding.verdict == Verdict::Good), "{all:?}");
        assert_eq!(outcome(&all), Outcome::CanGo);
        let mut checks: Vec<Check> = all.iter().map(|finding| finding.check).collect();
        checks.sort();
        checks.dedup();
        assert_eq!(checks.len(), all.len(), "one row for each check");
    }

    #[test]
    fn versions_of_agents() {
        let other = found(Check::Agents, |_, destination, _| destination.host.software = "0.2.0".into());
        says(&other, Verdict::Warning, &["0.1.0 on host-a", "0.2.0 on host-b", "same version"]);
    }

    #[test]
    fn admission_has_a_limit() {
        let full = found(Check::Admission, |_, _, admission| {
            admission.max_arriving = Some(1);
            admission.arriving = vec!["db".into()];
        });
        says(&full, Verdict::Bad, &["1 VM(s) are arriving", "(db)", "max-arriving on host-b"]);
        assert!(!full.overridable);
        let room = found(Check::Admission, |_, _, admission| admission.max_arriving = Some(1));
        says(&room, Verdict::Good, &["0 of at most 1"]);
        let twice = found(Check::Admission, |_, _, admission| admission.same = true);
        says(&twice, Verdict::Bad, &["already arriving"]);
    }

    #[test]
    fn clocks_are_compared_with_what_is_known() {
        let at = |before, theirs, after| clock("b", Some(before), theirs, Some(after));
        says(&at(1_000_000, Some(1_001_000), 1_002_000), Verdict::Good, &["0.0 ms ahead, ±1.0 ms"]);
        says(&at(1_000_000, Some(500_000), 1_000_200), Verdict::Warning, &["500.1 ms behind", "chrony"]);
        // A slow answer proves nothing.
        says(&at(0, Some(100_000), 200_000), Verdict::Good, &["±100.0"]);
        says(&at(0, None, 10), Verdict::Unknown, &["did not tell"]);
        says(&at(10, Some(10), 0), Verdict::Unknown, &[]);
    }

    #[test]
    fn what_qemu_says_about_an_image_is_about_disks() {
        let (source, ..) = pair();
        let missing =
            "QEMU ended (exit status: 1): Could not open '/elsewhere/vm': No such file or directory";
        let findings = not_launched(&source, "host-b", missing);
        let finding = &findings[0];
        says(finding, Verdict::Bad, &["host-b refuses", "/elsewhere/vm", "mount or export"]);
        assert_eq!(finding.check, Check::Disks);
        assert_eq!(not_launched(&source, "host-b", "no such option")[0].check, Check::QemuStart);
        assert!(findings[1] == not_compared("host-b") && findings[1].refuses());
    }
}
