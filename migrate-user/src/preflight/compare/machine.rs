//! QEMU, the machine it makes, and its devices.

use std::collections::BTreeMap;

use super::{Check, Finding, Hosts};
use crate::vmm::MachineFacts;

pub(super) fn compare(hosts: Hosts<'_>, source: &MachineFacts, destination: &MachineFacts) -> Vec<Finding> {
    vec![
        version(hosts, &source.version, &destination.version),
        equal(
            hosts,
            Check::MachineType,
            "machine type",
            &source.machine,
            &destination.machine,
            "give the same -machine in both definitions",
        ),
        equal(
            hosts,
            Check::Accelerator,
            "accelerator",
            &source.accelerator,
            &destination.accelerator,
            "give the same -accel in both definitions, and see that /dev/kvm is there on both hosts",
        ),
        vcpus(hosts, &source.vcpus, &destination.vcpus),
        devices(hosts, &source.devices, &destination.devices),
        numa(hosts, &source.numa, &destination.numa),
    ]
}

/// QEMU takes the state of an older one for the same machine type, and only by luck that of a newer one
/// (docs/devel/migration/compatibility.rst of QEMU).
fn version(hosts: Hosts<'_>, source: &str, destination: &str) -> Finding {
    let numbers =
        |version: &str| -> Vec<u32> { version.split('.').map_while(|part| part.parse().ok()).collect() };
    let found = format!("QEMU {}", hosts.both(source, destination));
    if source == destination {
        Finding::good(Check::QemuVersion, format!("QEMU {source} on both hosts"))
    } else if numbers(destination) > numbers(source) {
        Finding::good(Check::QemuVersion, format!("{found}: to a newer one"))
    } else {
        Finding::warning(
            Check::QemuVersion,
            found,
            "an older QEMU may not understand a newer one's device state: if it refuses, the VM goes on here; upgrade QEMU there",
        )
    }
}

fn equal(
    hosts: Hosts<'_>,
    check: Check,
    what: &str,
    source: &str,
    destination: &str,
    remedy: &str,
) -> Finding {
    if source == destination {
        Finding::good(check, source)
    } else {
        Finding::bad(check, format!("the VM's {what} is {}", hosts.both(source, destination)), remedy)
    }
}

fn vcpus(hosts: Hosts<'_>, source: &[String], destination: &[String]) -> Finding {
    if source == destination {
        return Finding::good(Check::Vcpus, format!("{}", source.len()));
    }
    let found = if source.len() == destination.len() {
        let (here, there) = source.iter().zip(destination).find(|(a, b)| a != b).unzip();
        let at = |place: Option<&String>| place.cloned().unwrap_or_default();
        format!("the vCPUs' topology differs: {}", hosts.both(at(here), at(there)))
    } else {
        format!("the number of vCPUs is {}", hosts.both(source.len(), destination.len()))
    };
    Finding::bad(Check::Vcpus, found, "give the same -smp in both definitions")
}

/// State of a device that is not there cannot be loaded. What stands behind a device (a tap, a file) may differ.
fn devices(hosts: Hosts<'_>, source: &[String], destination: &[String]) -> Finding {
    if source == destination {
        return Finding::good(
            Check::DeviceSet,
            format!("{} device(s), the same on both hosts", source.len()),
        );
    }
    let mut counts: BTreeMap<&str, i64> = BTreeMap::new();
    source.iter().for_each(|kind| *counts.entry(kind).or_default() += 1);
    destination.iter().for_each(|kind| *counts.entry(kind).or_default() -= 1);
    let only = |sign: i64| -> Vec<&str> {
        counts.iter().filter(|(_, count)| **count * sign > 0).map(|(kind, _)| *kind).collect()
    };
    let mut parts = Vec::new();
    for (host, kinds) in [(hosts.source, only(1)), (hosts.destination, only(-1))] {
        if !kinds.is_empty() {
            parts.push(format!("{} only on {host}", kinds.join(", ")));
        }
    }
    Finding::bad(
        Check::DeviceSet,
        format!("the VM's devices differ: {}", parts.join("; ")),
        "give the same -device options in both definitions; what was plugged in since the start belongs there too",
    )
}

fn numa(hosts: Hosts<'_>, source: &[String], destination: &[String]) -> Finding {
    let list = |nodes: &[String]| if nodes.is_empty() { "none".to_owned() } else { nodes.join(", ") };
    if source != destination {
        return Finding::bad(
            Check::Numa,
            format!("the guest's NUMA nodes differ: {}", hosts.both(list(source), list(destination))),
            "give the same -numa options in both definitions: the guest has read its tables already",
        );
    }
    Finding::good(Check::Numa, if source.is_empty() { "no NUMA in the guest".into() } else { list(source) })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{found, says};
    use super::*;
    use crate::preflight::Verdict;

    #[test]
    fn versions_go_up_but_not_down() {
        let newer = found(Check::QemuVersion, |_, b, _| b.machine.version = "10.1.0".into());
        says(&newer, Verdict::Good, &["10.0.2 on host-a", "newer"]);
        let older = found(Check::QemuVersion, |_, b, _| b.machine.version = "9.2.10".into());
        says(&older, Verdict::Warning, &["9.2.10 on host-b", "upgrade QEMU"]);
    }

    #[test]
    fn another_machine_is_refused_for_good() {
        let other = found(Check::MachineType, |_, b, _| b.machine.machine = "pc-i440fx-10.0".into());
        says(&other, Verdict::Bad, &["machine type", "pc-q35-10.0 on host-a", "i440fx", "same -machine"]);
        assert!(!other.overridable);
        let tcg = found(Check::Accelerator, |_, b, _| b.machine.accelerator = "tcg".into());
        says(&tcg, Verdict::Bad, &["kvm on host-a", "tcg on host-b", "same -accel"]);
        assert!(!tcg.overridable);
    }

    #[test]
    fn processors_by_number_and_place() {
        let fewer = found(Check::Vcpus, |_, b, _| b.machine.vcpus.truncate(1));
        says(&fewer, Verdict::Bad, &["2 on host-a", "1 on host-b", "same -smp"]);
        let moved = found(Check::Vcpus, |_, b, _| b.machine.vcpus[1] = "socket 1".into());
        says(&moved, Verdict::Bad, &["topology", "core 1 on host-a", "socket 1 on host-b"]);
    }

    #[test]
    fn devices_that_only_one_side_has_are_named() {
        let differing = found(Check::DeviceSet, |a, b, _| {
            a.machine.devices.push("usb-tablet".into());
            b.machine.devices.push("virtio-net-pci".into());
        });
        let words = ["usb-tablet only on host-a", "virtio-net-pci only on host-b", "same -device"];
        says(&differing, Verdict::Bad, &words);
    }

    #[test]
    fn numa_nodes_must_be_the_same() {
        let differing = found(Check::Numa, |a, _, _| a.machine.numa = vec!["node 0 size: 128 MB".into()]);
        says(&differing, Verdict::Bad, &["128 MB on host-a", "none on host-b", "-numa"]);
    }
}
