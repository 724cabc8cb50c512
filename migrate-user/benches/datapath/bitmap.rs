//! Walking a set of pages.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use migrate_common::PAGE_SIZE;
use xferry::memory::{PageSet, is_zero};

/// 16 GiB.
const PAGES: u64 = 4 << 20;

pub fn bench(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("bitmap");
    group.sample_size(20);
    for (name, every) in [("all", 1), ("one-in-64", 64), ("one-in-4096", 4096)] {
        let mut pages = PageSet::new(PAGES);
        (0..PAGES).step_by(every).for_each(|page| pages.insert(page));
        // Of the set's own pages, so that dense and sparse sets can be compared.
        group.throughput(Throughput::Elements(pages.count()));
        group.bench_function(BenchmarkId::new("walk", name), |bencher| {
            bencher.iter(|| black_box(&pages).iter().sum::<u64>());
        });
        group.bench_function(BenchmarkId::new("runs", name), |bencher| {
            bencher.iter(|| black_box(&pages).runs().map(|(start, end)| end - start).sum::<u64>());
        });
    }
    group.finish();
    let mut group = criterion.benchmark_group("zero-page");
    group.throughput(Throughput::Bytes(PAGE_SIZE as u64));
    let page = [0; PAGE_SIZE];
    group.bench_function("all-zero", |bencher| bencher.iter(|| is_zero(black_box(&page))));
    group.finish();
}
