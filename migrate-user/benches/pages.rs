//! What one page costs one core before it is a frame: `cargo bench -p migrate-user --bench pages`.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use migrate_common::PAGE_SIZE;
use xferry::{
    datapath::{Method, Packer, SentHashes, Unpacker},
    memory::{Access, Backend, Mapping, PageSet, RamLayout, is_zero},
};

/// More than fits the caches.
const BYTES: usize = 256 << 20;

/// Pages like a guest's, by what they pack to: text, numbers, and bytes that do not pack.
fn pages(kind: &str, count: usize) -> Vec<u8> {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let words: Vec<String> = (0..500).map(|_| format!("{:x} ", random() >> 40)).collect();
    let mut bytes = Vec::with_capacity(count * PAGE_SIZE + 64);
    while bytes.len() < count * PAGE_SIZE {
        match kind {
            "text" => bytes.extend(words[(random() % 500) as usize].bytes()),
            "numbers" => bytes.extend((random() >> 44).to_le_bytes()),
            // As the lab's guests hold (tests/guest-bare).
            "records" => {
                bytes.extend(*b"{\"type\":\"order\",\"state\":\"open\", ");
                (0..2)
                    .for_each(|_| bytes.extend(format!("{:<8.8}", words[(random() % 16) as usize]).bytes()));
                bytes.extend(format!("{:08}", bytes.len() / 64).bytes());
                bytes.extend(random().to_le_bytes());
            }
            _ => bytes.extend(random().to_le_bytes()),
        }
    }
    bytes.truncate(count * PAGE_SIZE);
    bytes
}

fn zero(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("zero test");
    let memory = vec![0; BYTES];
    group.throughput(Throughput::Bytes(BYTES as u64));
    group.bench_function("zero pages in memory", |bench| {
        bench.iter(|| memory.chunks(PAGE_SIZE).filter(|page| is_zero(page)).count());
    });
    let page = [0; PAGE_SIZE];
    group.throughput(Throughput::Bytes(PAGE_SIZE as u64));
    group.bench_function("a zero page in the cache", |bench| bench.iter(|| is_zero(black_box(&page))));
    let mut page = [0; PAGE_SIZE];
    page[40] = 1;
    group.bench_function("a page with content", |bench| bench.iter(|| is_zero(black_box(&page))));
    group.finish();
}

/// What is done to 200 dirty huge pages of 2 MiB in which nothing changed.
fn unchanged(criterion: &mut Criterion) -> anyhow::Result<()> {
    let count = 200 * 512;
    let size = (count * PAGE_SIZE) as u64;
    let file = tempfile::tempfile_in("/dev/shm")?;
    file.set_len(size)?;
    let mapping = Mapping::new(file, "bench".into(), Access::Write)?;
    let layout = RamLayout::new(vec![Backend { id: "ram".into(), size }]);
    let hashes = SentHashes::new(&layout, 0..1);
    let mut dirty = PageSet::new(layout.pages());
    dirty.insert_range(0, layout.pages());
    for (number, page) in pages("numbers", count).chunks(PAGE_SIZE).enumerate() {
        mapping.write(number as u64, 0, page);
        hashes.note(number as u64, page);
    }
    let mappings = [mapping];
    let mut group = criterion.benchmark_group("unchanged");
    group.sample_size(20).throughput(Throughput::Bytes(size));
    group.bench_function("200 huge pages, one thread", |bench| {
        bench.iter(|| hashes.changed_by(&dirty, &layout, &mappings, 1).unchanged);
    });
    group.bench_function("200 huge pages, all processors", |bench| {
        bench.iter(|| hashes.changed(&dirty, &layout, &mappings).unchanged);
    });
    group.finish();
    Ok(())
}

fn bitmap(criterion: &mut Criterion) {
    // A guest of 16 GiB: one in 16 of its pages, in pieces of 512; and every eighth of them.
    let mut pieces = PageSet::new(4 << 20);
    (0..512).for_each(|piece| pieces.insert_range(piece * 8192, piece * 8192 + 512));
    let mut scattered = PageSet::new(4 << 20);
    pieces.iter().filter(|page| page % 8 == 0).for_each(|page| scattered.insert(page));
    let mut group = criterion.benchmark_group("bitmap of 16 GiB");
    for (name, set) in [("1 GiB in pieces", &pieces), ("scattered pages", &scattered)] {
        group.bench_function(BenchmarkId::new("walk", name), |bench| bench.iter(|| set.iter().sum::<u64>()));
        group.bench_function(BenchmarkId::new("runs", name), |bench| bench.iter(|| set.runs().count()));
        group.bench_function(BenchmarkId::new("shares", name), |bench| bench.iter(|| set.shares(4)));
    }
    group.finish();
}

fn packing(criterion: &mut Criterion) -> anyhow::Result<()> {
    let (mut packer, mut unpacker) = (Packer::default(), Unpacker::default());
    for kind in ["text", "numbers", "records", "noise"] {
        let plain = pages(kind, 64);
        for method in Method::ALL {
            let name = format!("{method:?}");
            let mut group = criterion.benchmark_group(format!("{name} of {kind}"));
            group.sample_size(30);
            for count in [1, 6, 40] {
                let block = &plain[..count * PAGE_SIZE];
                group.throughput(Throughput::Bytes(block.len() as u64));
                let packed = packer.pack(method, block, usize::MAX).map(<[u8]>::to_vec);
                let packed = packed.ok_or_else(|| anyhow::anyhow!("{name} does not pack"))?;
                println!(
                    "{name} of {kind}, {count} pages: {:.2} : 1",
                    block.len() as f64 / packed.len() as f64
                );
                group.bench_function(BenchmarkId::new("pack", count), |bench| {
                    bench.iter(|| packer.pack(method, black_box(block), usize::MAX).map(<[u8]>::len));
                });
                group.bench_function(BenchmarkId::new("unpack", count), |bench| {
                    bench.iter(|| {
                        let pieces = std::iter::once(packed.as_slice());
                        unpacker.unpack(method.codec(), pieces, block.len()).map(<[u8]>::len)
                    });
                });
            }
            group.finish();
        }
    }
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let mut criterion = Criterion::default().configure_from_args();
    zero(&mut criterion);
    unchanged(&mut criterion)?;
    bitmap(&mut criterion);
    packing(&mut criterion)?;
    criterion.final_summary();
    Ok(())
}
