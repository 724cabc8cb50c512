//! Disks: there on both sides, the same, and in nobody else's use.

use super::{Check, DestinationFacts, Finding, Hosts, SourceFacts};
use crate::{preflight::ImageFacts, vmm::Disk};

/// Fewer samples with content than this prove nothing.
const ENOUGH: usize = 2;

pub(super) fn compare(source: &SourceFacts, destination: &DestinationFacts) -> Vec<Finding> {
    let hosts = Hosts { source: &source.host.name, destination: &destination.host.name };
    let mut findings = Vec::new();
    for (disk, image) in source.disks() {
        let Some(index) = destination.machine.disks.iter().position(|other| other.device == disk.device)
        else {
            findings.push(Finding::bad(
                Check::Disks,
                format!("{} has no disk at {} ({})", hosts.destination, disk.device, disk.image),
                "give the same -drive and -device options in both definitions",
            ));
            continue;
        };
        let other = &destination.machine.disks[index];
        let none = ImageFacts::default();
        let there = destination.images.get(index).unwrap_or(&none);
        findings.extend(users(source, destination, disk, there));
        // What has another shape needs no look at its content.
        let shape = shape(hosts, disk, other);
        findings.extend(shape.or_else(|| content(hosts, disk, image, other, there)));
    }
    let more = destination.machine.disks.iter().filter(|other| {
        let same = |disk: &Disk| disk.device == other.device;
        !source.machine.disks.iter().any(same)
    });
    findings.extend(more.map(|other| {
        Finding::bad(
            Check::Disks,
            format!(
                "{} has a disk at {} ({}) that the VM has not",
                hosts.destination, other.device, other.image
            ),
            "give the same -drive and -device options in both definitions",
        )
    }));
    if findings.is_empty() {
        let names: Vec<String> = source
            .machine
            .disks
            .iter()
            .map(|disk| format!("{} ({}, {} MiB)", disk.image, disk.format, disk.size >> 20))
            .collect();
        let found = if names.is_empty() {
            "none".to_owned()
        } else {
            format!("{}: the same on both hosts, in nobody else's use", names.join(", "))
        };
        findings.push(Finding::good(Check::Disks, found));
    }
    findings
}

fn shape(hosts: Hosts<'_>, disk: &Disk, other: &Disk) -> Option<Finding> {
    let bad = |what: &str, here: String, there: String, remedy: &str| {
        let found = format!("{what} of {} differs: {}", disk.image, hosts.both(here, there));
        Some(Finding::bad(Check::Disks, found, remedy))
    };
    let mode = |read_only: bool| if read_only { "read-only" } else { "writable" }.to_owned();
    if disk.size != other.size {
        let remedy =
            "see that both definitions name the same image, and that the destination sees its present size";
        return bad("the size", format!("{} bytes", disk.size), format!("{} bytes", other.size), remedy);
    }
    if disk.format != other.format {
        let remedy =
            "give the same format=… in both definitions: the guest would read the image's own tables";
        return bad("the format", disk.format.clone(), other.format.clone(), remedy);
    }
    if disk.read_only != other.read_only {
        let remedy = "give the same read-only=… in both definitions";
        return bad("the access", mode(disk.read_only), mode(other.read_only), remedy);
    }
    None
}

/// Two that write one image destroy it.
fn users(
    source: &SourceFacts,
    destination: &DestinationFacts,
    disk: &Disk,
    there: &ImageFacts,
) -> Option<Finding> {
    // Where both agents are on one machine, the VM that is to leave is seen too.
    let one_machine = source.host.boot_id == destination.host.boot_id;
    let others: Vec<String> = there
        .writers
        .iter()
        .filter(|(pid, _)| !(one_machine && *pid == source.pid))
        .map(|(pid, name)| format!("{name} (pid {pid})"))
        .collect();
    (!others.is_empty()).then(|| {
        Finding::bad(
            Check::Disks,
            format!(
                "{} is open for writing on {} by {}",
                disk.image,
                destination.host.name,
                others.join(", ")
            ),
            "end that process: an image with two writers is destroyed",
        )
    })
}

fn content(
    hosts: Hosts<'_>,
    disk: &Disk,
    here: &ImageFacts,
    other: &Disk,
    there: &ImageFacts,
) -> Option<Finding> {
    if let Some(problem) = here.unread.as_ref().or(there.unread.as_ref()) {
        if disk.image == other.image && !disk.image.starts_with('/') {
            // A URL says which image it is, and QEMU on the destination has opened it.
            return None;
        }
        return Some(Finding::warning(
            Check::Disks,
            format!("whether {} is the same image on both hosts could not be told: {problem}", disk.image),
            "see by hand that it is",
        ));
    }
    let pairs = here.samples.iter().zip(&there.samples).filter(|(a, b)| a.hash.is_some() || b.hash.is_some());
    let (same, different): (Vec<_>, Vec<_>) = pairs.partition(|(a, b)| a.hash == b.hash);
    if same.len() + different.len() < ENOUGH {
        return Some(Finding::warning(
            Check::Disks,
            format!(
                "{} is empty wherever it was looked at, so nothing shows that it is one image",
                disk.image
            ),
            "see by hand that both definitions name the same image",
        ));
    }
    if same.is_empty() {
        return Some(Finding::bad(
            Check::Disks,
            format!(
                "{} on {} is another image than {} on {}: none of {} places is equal",
                other.image,
                hosts.destination,
                disk.image,
                hosts.source,
                different.len()
            ),
            "share the image between both hosts (NFS, a cluster file system, a SAN, NBD), or correct its path: copies are not moved",
        ));
    }
    // A running guest changes some places between two looks.
    (same.len() < different.len()).then(|| {
        Finding::warning(
            Check::Disks,
            format!(
                "only {} of {} places of {} are equal on both hosts",
                same.len(),
                same.len() + different.len(),
                disk.image
            ),
            "see by hand that it is one image; where the guest is writing hard, check again",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{found, says};
    use super::*;
    use crate::preflight::Verdict;

    fn disks(change: impl FnOnce(&mut SourceFacts, &mut DestinationFacts)) -> Finding {
        found(Check::Disks, |source, destination, _| change(source, destination))
    }

    #[test]
    fn disks_must_be_there_and_alike() {
        says(&disks(|_, b| b.machine.disks.clear()), Verdict::Bad, &["no disk at d0", "/images/vm"]);
        says(&disks(|a, _| a.machine.disks.clear()), Verdict::Bad, &["that the VM has not"]);
        let size = disks(|_, b| b.machine.disks[0].size = 5);
        says(&size, Verdict::Bad, &["the size of /images/vm", "5 bytes on host-b"]);
        assert!(!size.overridable);
        let format = disks(|_, b| b.machine.disks[0].format = "qcow2".into());
        says(&format, Verdict::Bad, &["raw on host-a", "qcow2 on host-b"]);
        let access = disks(|_, b| b.machine.disks[0].read_only = true);
        says(&access, Verdict::Bad, &["writable on host-a", "read-only on host-b"]);
        let none = disks(|a, b| {
            a.machine.disks.clear();
            b.machine.disks.clear();
        });
        says(&none, Verdict::Good, &["none"]);
    }

    #[test]
    fn a_second_writer_is_refused() {
        let busy = disks(|_, b| b.images[0].writers = vec![(77, "backup".into())]);
        says(&busy, Verdict::Bad, &["open for writing on host-b", "backup (pid 77)", "destroyed"]);
        // The same number on another machine is another process.
        let elsewhere = disks(|_, b| b.images[0].writers = vec![(10, "qemu".into())]);
        assert_eq!(elsewhere.verdict, Verdict::Bad);
        let itself = disks(|a, b| {
            b.host.boot_id.clone_from(&a.host.boot_id);
            b.images[0].writers = vec![(10, "qemu".into())];
        });
        assert_eq!(itself.verdict, Verdict::Good);
    }

    #[test]
    fn another_image_is_told_from_a_changing_one() {
        let change = |count: usize| {
            disks(|_, b| b.images[0].samples[..count].iter_mut().for_each(|sample| sample.hash = Some(99)))
        };
        says(&change(0), Verdict::Good, &["the same on both hosts"]);
        says(&change(3), Verdict::Good, &[]);
        says(&change(6), Verdict::Warning, &["only 2 of 8"]);
        says(&change(8), Verdict::Bad, &["another image", "none of 8 places", "copies are not moved"]);
        let empty = disks(|a, b| {
            let images = a.images.iter_mut().chain(&mut b.images);
            images.flat_map(|image| &mut image.samples).for_each(|sample| sample.hash = None);
        });
        says(&empty, Verdict::Warning, &["empty wherever"]);
    }

    #[test]
    fn images_that_are_no_files() {
        let unread = |image: &str| {
            disks(|a, b| {
                a.machine.disks[0].image = image.into();
                b.machine.disks[0].image = image.into();
                a.images[0].unread = Some("it is not a file".into());
            })
        };
        says(&unread("nbd://10.0.0.9/vm"), Verdict::Good, &["nbd://10.0.0.9/vm"]);
        says(&unread("/images/vm"), Verdict::Warning, &["could not be told", "by hand"]);
    }
}
