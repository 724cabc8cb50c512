//! RAM: the same on both sides, and room for it.

use std::collections::BTreeMap;

use super::{Admission, Check, DestinationFacts, Finding, HostFacts, Hosts, SourceFacts};
use crate::{
    memory::{Backend, RESERVE_CHUNK, RamLayout},
    preflight::{Backing, own::backed},
};

/// Bytes that each backend needs at the destination: what exists at the source, in chunks of the reservation,
/// given as ranges of chunks over all backends.
pub fn needed(populated: &[(u64, u64)], backends: &[Backend]) -> Vec<u64> {
    let layout = RamLayout::new(backends.to_vec());
    let pages = |backend: usize| {
        let (first, end) = (layout.first_page(backend), layout.first_page(backend + 1));
        let within = |&(from, to): &(u64, u64)| {
            let (from, to) = (from.saturating_mul(RESERVE_CHUNK), to.saturating_mul(RESERVE_CHUNK));
            to.min(end).saturating_sub(from.max(first))
        };
        populated.iter().map(within).sum::<u64>()
    };
    (0..backends.len()).map(|backend| pages(backend) * migrate_common::PAGE_SIZE as u64).collect()
}

pub(super) fn compare(
    source: &SourceFacts,
    destination: &DestinationFacts,
    admission: &Admission,
) -> Vec<Finding> {
    let hosts = Hosts { source: &source.host.name, destination: &destination.host.name };
    let mut findings = vec![layout(hosts, &source.machine.backends, &destination.machine.backends)];
    let backing = match &destination.backing {
        Ok(backing) => backing,
        Err(problem) => {
            findings.push(Finding::bad(
                Check::RamBacking,
                format!("on {}: {problem}", hosts.destination),
                "",
            ));
            return findings;
        }
    };
    // What kind of files the source's are is told there.
    let kind = backed(hosts.destination, source.ram() >> 20, backing);
    if kind.refuses() {
        findings.push(kind);
    }
    findings.push(pages(hosts, &source.backing, backing));
    let demand: Vec<(u64, &Backing)> = destination.needed.iter().copied().zip(backing).collect();
    findings.push(if backing.iter().any(|one| one.file_system == "hugetlbfs") {
        huge_pages(source, destination, &demand)
    } else {
        let taken = demand.iter().map(|(needed, backing)| backing.room.taken.min(*needed)).sum();
        free(source, &destination.host, admission, destination.needed.iter().sum(), taken)
    });
    findings.push(room(hosts.destination, &demand));
    findings
}

/// Before anything of the VM is there.
pub(super) fn before_launch(
    source: &SourceFacts,
    host: &HostFacts,
    admission: &Admission,
    needed: &[u64],
) -> Option<Finding> {
    let tmpfs = source.backing.iter().all(|backing| backing.file_system == "tmpfs");
    tmpfs.then(|| free(source, host, admission, needed.iter().sum(), 0))
}

fn layout(hosts: Hosts<'_>, source: &[Backend], destination: &[Backend]) -> Finding {
    let list = |backends: &[Backend]| {
        let parts: Vec<String> =
            backends.iter().map(|backend| format!("{} of {} MiB", backend.id, backend.size >> 20)).collect();
        if parts.is_empty() { "none".to_owned() } else { parts.join(", ") }
    };
    if source == destination {
        return Finding::good(Check::RamLayout, list(source));
    }
    Finding::bad(
        Check::RamLayout,
        format!("the VM's RAM differs: {}", hosts.both(list(source), list(destination))),
        "give the same -m and memory backends in both definitions",
    )
}

fn pages(hosts: Hosts<'_>, source: &[Backing], destination: &[Backing]) -> Finding {
    let sizes = |backing: &[Backing]| {
        let mut sizes: Vec<u64> = backing.iter().map(|one| one.page_size >> 10).collect();
        sizes.sort_unstable();
        sizes.dedup();
        sizes
    };
    let words = |backing: &[Backing]| {
        let parts: Vec<String> = sizes(backing).iter().map(|kib| format!("{kib} KiB")).collect();
        parts.join(" and ")
    };
    if source.is_empty() || sizes(source) == sizes(destination) {
        return Finding::good(Check::PageSize, format!("{} pages", words(destination)));
    }
    Finding::warning(
        Check::PageSize,
        format!("pages of RAM are {}", hosts.both(words(source), words(destination))),
        "the VM works with either, at another speed; use the same kind of mem-path on both hosts to keep it",
    )
}

/// Whether the host can take `needed` bytes now, of which it gave `taken` already.
fn free(source: &SourceFacts, host: &HostFacts, admission: &Admission, needed: u64, taken: u64) -> Finding {
    let mib = |bytes: u64| bytes >> 20;
    let Some(available) = host.available else {
        return Finding::unknown(Check::Memory, format!("{} does not tell its free memory", host.name), "");
    };
    let mut kept = format!("{} MiB stay with the host", mib(admission.headroom));
    if admission.promised > 0 {
        kept = format!("{kept} and {} MiB are promised to VMs that are arriving", mib(admission.promised));
    }
    let found = format!(
        "the VM has {} MiB of its {} MiB in use, and {} has {} MiB free, of which {kept}",
        mib(needed),
        mib(source.ram()),
        host.name,
        mib(available)
    );
    if available.saturating_add(taken) >= needed.saturating_add(admission.headroom + admission.promised) {
        return Finding::good(Check::Memory, found);
    }
    Finding::bad(
        Check::Memory,
        format!("not enough memory: {found}"),
        format!(
            "free some on {0}, migrate to another host, or lower [admission] memory-headroom-mib on {0}",
            host.name
        ),
    )
}

/// A QEMU that claimed its huge pages when it started (`reserve=on`) has them, or it would not have started.
fn huge_pages(source: &SourceFacts, destination: &DestinationFacts, demand: &[(u64, &Backing)]) -> Finding {
    let name = &destination.host.name;
    if destination.reserved {
        let mib = source.ram() >> 20;
        return Finding::good(Check::Memory, format!("{mib} MiB of huge pages are reserved on {name}"));
    }
    for pool in &destination.host.huge_pools {
        let pages = demand
            .iter()
            .filter(|(_, one)| one.file_system == "hugetlbfs" && one.page_size == pool.page_size)
            .map(|(needed, one)| needed.saturating_sub(one.room.taken).div_ceil(pool.page_size))
            .sum::<u64>();
        let free = pool.free.saturating_sub(pool.promised);
        if free < pages {
            let kib = pool.page_size >> 10;
            return Finding::bad(
                Check::Memory,
                format!(
                    "not enough memory: the VM needs {pages} huge pages of {kib} KiB, and {name} has {free} that are not promised"
                ),
                format!(
                    "raise /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages on {name}, or migrate to another host"
                ),
            );
        }
    }
    Finding::good(Check::Memory, format!("{name} has the huge pages"))
}

/// Whether each file system has room for what lies in it.
fn room(host: &str, demand: &[(u64, &Backing)]) -> Finding {
    let mut systems: BTreeMap<u64, (u64, u64, &Backing)> = BTreeMap::new();
    for (needed, backing) in demand {
        let entry = systems.entry(backing.room.device).or_insert((0, 0, backing));
        entry.0 += needed;
        entry.1 += backing.room.taken;
    }
    let mut least = None;
    for (needed, taken, backing) in systems.into_values() {
        // Pages of hugetlbfs are counted above, where they come from.
        let Some(free) = backing.room.free.filter(|_| backing.file_system != "hugetlbfs") else { continue };
        let free = free.saturating_add(taken);
        if free < needed {
            return Finding::bad(
                Check::RamRoom,
                format!(
                    "no room for the VM's RAM: {} MiB are in use at the source, and the file system of {} on {host} has {} MiB free",
                    needed >> 20,
                    backing.path,
                    free >> 20
                ),
                "enlarge it (mount -o remount,size=…) or free some",
            );
        }
        least = Some(least.unwrap_or(u64::MAX).min(free));
    }
    Finding::good(
        Check::RamRoom,
        least.map_or_else(
            || format!("no limit but memory on {host}"),
            |free| format!("{} MiB for the RAM's files on {host}", free >> 20),
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::super::tests::{MIB, found, pair, says};
    use super::*;
    use crate::preflight::{HugePool, Verdict};

    #[test]
    fn another_layout_is_refused_for_good() {
        let half = found(Check::RamLayout, |_, b, _| b.machine.backends[0].size /= 2);
        let words = ["RAM differs", "ram of 256 MiB on host-a", "128 MiB on host-b", "same -m"];
        says(&half, Verdict::Bad, &words);
        assert!(!half.overridable);
    }

    #[test]
    fn ram_that_cannot_be_moved() {
        let private = found(Check::RamBacking, |_, b, _| b.backing = Err("mapped privately".into()));
        says(&private, Verdict::Bad, &["on host-b: mapped privately"]);
        let ext4 = found(Check::RamBacking, |_, b, _| {
            b.backing.as_mut().unwrap()[0].file_system = "a file system of type 0xef53".into();
        });
        says(&ext4, Verdict::Bad, &["0xef53", "on tmpfs"]);
    }

    #[test]
    fn other_pages_are_a_drawback() {
        let huge = found(Check::PageSize, |a, _, _| {
            a.backing[0].page_size = 2 << 20;
            a.backing[0].file_system = "hugetlbfs".into();
        });
        says(&huge, Verdict::Warning, &["2048 KiB on host-a", "4 KiB on host-b"]);
    }

    #[test]
    fn memory_is_counted_with_what_is_kept_and_promised() {
        let at = |available: u64, promised: u64, taken: u64| {
            found(Check::Memory, |_, b, admission| {
                b.host.available = Some(available * MIB);
                b.backing.as_mut().unwrap()[0].room.taken = taken * MIB;
                admission.promised = promised * MIB;
            })
        };
        // 100 are needed, 64 are kept.
        says(&at(164, 0, 0), Verdict::Good, &["100 MiB of its 256 MiB"]);
        let words = ["not enough memory", "163 MiB free", "64 MiB stay", "memory-headroom-mib"];
        says(&at(163, 0, 0), Verdict::Bad, &words);
        says(&at(200, 50, 0), Verdict::Bad, &["50 MiB are promised"]);
        // What the file has already need not be had again, and more of it than is needed does not help.
        says(&at(64, 0, 100), Verdict::Good, &[]);
        says(&at(63, 0, 200), Verdict::Bad, &[]);
        assert!(!at(0, 0, 0).overridable);
        let untold = found(Check::Memory, |_, b, _| b.host.available = None);
        says(&untold, Verdict::Unknown, &[]);
    }

    #[test]
    fn huge_pages_come_from_their_pool() {
        let with = |free: u64, reserved: bool| {
            found(Check::Memory, |_, b, _| {
                let backing = &mut b.backing.as_mut().unwrap()[0];
                (backing.file_system, backing.page_size) = ("hugetlbfs".into(), 2 << 20);
                b.host.huge_pools = vec![HugePool { page_size: 2 << 20, free, promised: 10 }];
                b.reserved = reserved;
            })
        };
        says(&with(60, false), Verdict::Good, &[]);
        says(&with(59, false), Verdict::Bad, &["50 huge pages of 2048 KiB", "has 49", "nr_hugepages"]);
        says(&with(0, true), Verdict::Good, &["reserved"]);
    }

    #[test]
    fn each_file_system_must_have_room() {
        let tiny = found(Check::RamRoom, |_, b, _| {
            b.backing.as_mut().unwrap()[0].room.free = Some(16 * MIB);
        });
        let words = ["no room for the VM's RAM", "100 MiB", "16 MiB free", "/dev/shm/vm", "size="];
        says(&tiny, Verdict::Bad, &words);
        let split = |device: u64| {
            found(Check::RamRoom, |_, b, _| {
                let backing = b.backing.as_mut().unwrap();
                backing[0].room.free = Some(150 * MIB);
                backing.push(backing[0].clone());
                backing[1].room.device = device;
                b.needed.push(100 * MIB);
            })
        };
        says(&split(6), Verdict::Good, &["150 MiB"]);
        says(&split(5), Verdict::Bad, &["200 MiB"]);
        let unlimited = found(Check::RamRoom, |_, b, _| b.backing.as_mut().unwrap()[0].room.free = None);
        says(&unlimited, Verdict::Good, &["no limit"]);
    }

    #[test]
    fn a_qemu_that_takes_its_ram_at_once_is_not_started_in_vain() {
        let (source, mut destination, admission) = pair();
        destination.host.available = Some(100 * MIB);
        let rows = |preallocates| {
            super::super::before_launch(
                &source,
                &destination.host,
                &admission,
                &destination.needed,
                preallocates,
            )
        };
        assert!(rows(false).iter().all(|row| !row.refuses()));
        assert!(rows(true).iter().any(|row| row.check == Check::Memory && row.refuses()));
    }

    #[test]
    fn chunks_are_counted_by_backend() {
        let backend = |id: &str, pages: u64| Backend { id: id.into(), size: pages * 4096 };
        let backends = [backend("a", 512 * 3), backend("b", 512 + 256)];
        assert_eq!(needed(&[(0, 1), (2, 5)], &backends), [512 * 2 * 4096, (512 + 256) * 4096]);
        assert_eq!(needed(&[(u64::MAX - 1, u64::MAX)], &backends), [0, 0]);
        assert_eq!(needed(&[], &[]), [0u64; 0]);
    }
}
