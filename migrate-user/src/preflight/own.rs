//! What the source can tell alone.

use super::{Backing, Check, Finding, NicFacts};
use crate::vmm::VmFacts;

/// The source's findings about its VM and its NIC. `backing` is what the RAM lies in, or why it cannot be moved.
pub fn own(host: &str, facts: &VmFacts, backing: &Result<Vec<Backing>, String>) -> Vec<Finding> {
    vec![
        Finding::good(Check::Monitor, format!("QEMU (pid {}) answers", facts.pid)),
        state(&facts.status),
        ram(host, facts, backing),
        all(
            Check::Devices,
            &facts.unsafe_devices,
            "none that writes guest memory unseen",
            "start the VM without it",
        ),
        all(
            Check::QemuBlockers,
            &facts.blockers.iter().map(|reason| format!("QEMU says: {reason}")).collect::<Vec<_>>(),
            "QEMU names none",
            "take away what QEMU names",
        ),
        scan(&facts.direct_nodes),
    ]
}

fn state(status: &str) -> Finding {
    if status == "running" {
        Finding::good(Check::VmState, "running")
    } else {
        Finding::bad(Check::VmState, format!("it is not running but {status}"), "`cont` it first")
    }
}

fn ram(host: &str, facts: &VmFacts, backing: &Result<Vec<Backing>, String>) -> Finding {
    let mib = facts.machine.backends.iter().map(|backend| backend.size).sum::<u64>() >> 20;
    match backing {
        // It names the remedy itself.
        Err(problem) => Finding::bad(Check::RamBacking, problem, ""),
        Ok(backing) => backed(host, mib, backing),
    }
}

/// RAM in files: of which kind?
pub(super) fn backed(host: &str, mib: u64, backing: &[Backing]) -> Finding {
    let kinds: Vec<String> = backing.iter().map(describe).collect();
    let found = format!("{mib} MiB in shared files on {host}: {}", kinds.join(", "));
    let other = backing.iter().find(|one| !matches!(one.file_system.as_str(), "tmpfs" | "hugetlbfs"));
    if let Some(other) = other {
        let remedy = format!("put {} on tmpfs: only there is it seen what the guest writes", other.path);
        return Finding::bad(Check::RamBacking, found, remedy);
    }
    // Huge pages of tmpfs are no such case: protecting them splits their mappings (`pgtable_split_needed`, mm/mprotect.c).
    if backing.iter().any(|one| one.file_system == "hugetlbfs") {
        let remedy = "one byte that the guest writes makes a whole huge page dirty: its pages are hashed to find those that \
                      changed, which costs processor time in every round and 16 bytes of memory a page";
        return Finding::warning(Check::RamBacking, found, remedy);
    }
    Finding::good(Check::RamBacking, found)
}

fn describe(backing: &Backing) -> String {
    let huge = if backing.transparent_huge.is_empty() {
        String::new()
    } else {
        format!(" with huge={}", backing.transparent_huge)
    };
    format!("{}{huge}, {} KiB pages", backing.file_system, backing.page_size >> 10)
}

fn all(check: Check, problems: &[String], good: &str, remedy: &str) -> Finding {
    if problems.is_empty() {
        return Finding::good(check, good);
    }
    // What forbids a device says what to do about it.
    let remedy = if check == Check::Devices { "" } else { remedy };
    Finding::bad(check, problems.join("; "), remedy)
}

fn scan(direct: &[String]) -> Finding {
    if direct.is_empty() {
        return Finding::good(Check::DirtyScan, "live: no block node uses O_DIRECT");
    }
    Finding::warning(
        Check::DirtyScan,
        format!("quiesced: block node {} uses O_DIRECT, whose DMA a live scan can miss", direct.join(", ")),
        "nothing must be done: the VM is stopped for 1 to 3 ms in each round; without cache.direct=on it is not",
    )
}

/// The source's migration NIC; `problem` is why it cannot be used.
pub fn sending_nic(nic: &NicFacts, problem: Option<String>) -> Finding {
    match problem {
        Some(problem) => Finding::bad(Check::SendingNic, problem, ""),
        None => Finding::good(
            Check::SendingNic,
            format!("{}, MTU {}, {} queue(s)", nic.name, nic.mtu, nic.queues),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::Verdict;

    fn facts() -> VmFacts {
        VmFacts {
            pid: 1,
            status: "running".into(),
            machine: crate::preflight::compare::tests::machine(),
            files: Ok(vec![]),
            reserved: true,
            direct_nodes: vec![],
            unsafe_devices: vec![],
            blockers: vec![],
        }
    }

    fn on(file_system: &str) -> Result<Vec<Backing>, String> {
        Ok(vec![Backing {
            path: "/dev/shm/vm".into(),
            file_system: file_system.into(),
            page_size: if file_system == "hugetlbfs" { 2 << 20 } else { 4096 },
            ..Backing::default()
        }])
    }

    fn found(facts: &VmFacts, backing: &Result<Vec<Backing>, String>, check: Check) -> Finding {
        own("host-a", facts, backing).into_iter().find(|finding| finding.check == check).unwrap()
    }

    #[test]
    fn a_sound_vm_is_good_in_every_row() {
        let findings = own("host-a", &facts(), &on("tmpfs"));
        assert!(findings.iter().all(|finding| finding.verdict == Verdict::Good), "{findings:?}");
        assert!(findings[2].found.contains("256 MiB"));
    }

    #[test]
    fn what_is_wrong_has_its_row() {
        let mut vm = facts();
        vm.status = "paused".into();
        vm.unsafe_devices = vec!["device ballast (virtio-balloon-pci): start the VM without it".into()];
        vm.blockers = vec!["non-migratable CPU device (invtsc flag)".into()];
        let says = |check, words: &[&str]| {
            let finding = found(&vm, &on("ext4"), check);
            let text = format!("{} {}", finding.found, finding.remedy);
            assert!(finding.verdict == Verdict::Bad && !finding.overridable, "{finding:?}");
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        };
        says(Check::VmState, &["not running but paused", "cont"]);
        says(Check::Devices, &["ballast", "without it"]);
        says(Check::QemuBlockers, &["QEMU says", "invtsc"]);
        says(Check::RamBacking, &["ext4", "on tmpfs"]);
        let private = found(&vm, &Err("share=off".into()), Check::RamBacking);
        assert_eq!((private.verdict, private.found.as_str()), (Verdict::Bad, "share=off"));
    }

    #[test]
    fn drawbacks_are_named() {
        let mut vm = facts();
        vm.direct_nodes = vec!["d0".into()];
        let scan = found(&vm, &on("tmpfs"), Check::DirtyScan);
        assert!(scan.verdict == Verdict::Warning && scan.found.contains("quiesced: block node d0"));
        let huge = found(&vm, &on("hugetlbfs"), Check::RamBacking);
        assert!(huge.verdict == Verdict::Warning && huge.found.contains("2048 KiB pages"), "{huge:?}");
        let nic = NicFacts { name: "mig0".into(), mtu: 9000, ..NicFacts::default() };
        assert!(sending_nic(&nic, None).found.contains("MTU 9000"));
        assert_eq!(sending_nic(&nic, Some("no carrier".into())).verdict, Verdict::Bad);
    }
}
