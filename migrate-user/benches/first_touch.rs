//! What memory that nobody touched before costs a destination: ways of filling a RAM file, by file system. Needs root for the
//! tmpfs of huge pages; without, only /dev/shm is measured. A machine that is itself virtual may have to find the memory first:
//! the warm-up does that.
#![allow(clippy::expect_used, reason = "a benchmark that cannot go on has nothing to say")]

use std::{
    fs::File,
    hint::black_box,
    path::Path,
    time::{Duration, Instant},
};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use migrate_common::PAGE_SIZE;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use xferry::memory::{Access, Mapping, RESERVE_CHUNK, Reservation};

/// Size of the RAM file, bytes.
const RAM: u64 = 256 << 20;
/// Pages placed at once: what neighbouring frames are gathered to.
const RUN: usize = 16;

/// A mounted tmpfs of huge pages; gone when dropped.
struct HugeTmpfs(tempfile::TempDir);

impl HugeTmpfs {
    fn mount() -> Option<Self> {
        let directory = tempfile::tempdir().expect("a directory");
        mount("tmpfs", directory.path(), "tmpfs", MountFlags::empty(), c"size=100%,huge=within_size").ok()?;
        Some(Self(directory))
    }
}

impl Drop for HugeTmpfs {
    fn drop(&mut self) {
        let _ = unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

/// A way of filling memory.
#[derive(Clone, Copy)]
enum Way {
    /// Copied into the mapping, which faults: what QEMU does.
    Faulted,
    /// Taken and faulted in by chunks first, then copied.
    Covered,
    /// Written to the file.
    Written,
}

fn ram(directory: &Path) -> (Mapping, Reservation) {
    let file = tempfile::tempfile_in(directory).expect("a RAM file");
    File::set_len(&file, RAM).expect("its size");
    let mapping = Mapping::new(file, "ram".into(), Access::Write).expect("a mapping");
    let reservation = Reservation::clear(&mapping).expect("an empty file");
    (mapping, reservation)
}

fn fill(way: Way, mapping: &Mapping, reservation: &Reservation, content: &[u8]) {
    for page in (0..mapping.pages()).step_by(RUN) {
        match way {
            Way::Faulted => mapping.write(page, 0, content),
            Way::Covered | Way::Written => {
                if matches!(way, Way::Covered) && page % RESERVE_CHUNK == 0 {
                    reservation.cover(mapping, page).expect("memory");
                }
                let pieces = std::iter::once(content);
                reservation.place(mapping, page * PAGE_SIZE as u64, content.len(), pieces).expect("memory");
            }
        }
    }
}

fn first_touch(criterion: &mut Criterion) {
    let huge = HugeTmpfs::mount();
    let systems =
        [Some(("tmpfs", Path::new("/dev/shm"))), huge.as_ref().map(|huge| ("huge tmpfs", huge.0.path()))];
    let content = vec![7; RUN * PAGE_SIZE];
    let mut group = criterion.benchmark_group("first_touch");
    group.throughput(Throughput::Bytes(RAM)).sample_size(10);
    for (system, directory) in systems.into_iter().flatten() {
        for (name, way) in [("faulted", Way::Faulted), ("covered", Way::Covered), ("written", Way::Written)] {
            group.bench_with_input(BenchmarkId::new(name, system), &way, |bencher, &way| {
                bencher.iter_custom(|runs| {
                    let mut taken = Duration::ZERO;
                    for _ in 0..runs {
                        let (mapping, reservation) = ram(directory);
                        let begun = Instant::now();
                        fill(way, &mapping, &reservation, black_box(&content));
                        taken += begun.elapsed();
                    }
                    taken
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, first_touch);
criterion_main!(benches);
