//! A sender thread's work: pages are looked at, copied or not, guarded, and their descriptors put on the ring.

use std::{
    hint::black_box,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use criterion::{BenchmarkId, Criterion, Throughput};
use migrate_common::{
    PAGE_SIZE,
    wire::{DESCRIPTOR_LEN, FrameHeader, FrameKind, Guard, HEADER_LEN, Packing, TAG_LEN},
};
use rustix::net::xdp::{XdpDesc, XdpDescOptions};
use xferry::{
    datapath::{
        Bandwidth, Cipher, DirectSink, Feedback, FeedbackRx, FrameLayout, FrameSink, LaidOut, LaneConfig,
        LaneSender, Packings, Pages, Sealer, XskSink,
    },
    memory::{AtomicPageSet, Mapping, PageSet},
    xsk::{CHUNK_SIZE, Consumer, FilePart, JoinedMemory, Producer, TxQueue, Umem, ring_pair},
};

use crate::{GUEST_PAGES, MTUS, SESSION, filled_ram, frames, layout, path, protection};

/// As the agent has them.
const SLOTS: u32 = 256;

pub fn bench(criterion: &mut Criterion) {
    let ram = [filled_ram()];
    let mut group = criterion.benchmark_group("send");
    group.throughput(Throughput::Bytes(GUEST_PAGES * PAGE_SIZE as u64)).sample_size(10);
    for mtu in MTUS {
        for (name, cipher) in [("staged", None), ("staged-aes-128-gcm", Some(Cipher::Aes128Gcm))] {
            let mut lane = Lane::new(frames(mtu), cipher, staged(&frames(mtu)));
            group.bench_function(BenchmarkId::new(name, mtu), |bencher| bencher.iter(|| lane.send(&ram)));
        }
        let mut lane = Lane::new(frames(mtu), None, direct(&frames(mtu), &ram[0]));
        group.bench_function(BenchmarkId::new("direct", mtu), |bencher| bencher.iter(|| lane.send(&ram)));
    }
    group.finish();
    complete(criterion);
}

/// Completing a frame of two pages that lies in the cache: headers and guard.
fn complete(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("complete");
    let payload = 2 * PAGE_SIZE;
    group.throughput(Throughput::Bytes(payload as u64));
    let path = path();
    let mut buffer = vec![0xa5; path.len() + HEADER_LEN + 2 * DESCRIPTOR_LEN + payload + TAG_LEN];
    for (name, cipher) in [("crc32c", None), ("aes-128-gcm", Some(Cipher::Aes128Gcm))] {
        let mut sealer = Sealer::new(protection(cipher));
        let mut sequence = 0;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let header = FrameHeader {
                    kind: FrameKind::Pages,
                    descriptors: 2,
                    session: SESSION,
                    epoch: 1,
                    lane: 0,
                    sequence,
                    guard: Guard::Checksum,
                    packing: Packing::Plain,
                    payload: payload as u32,
                    checksum: 0,
                };
                sequence += 1;
                black_box(sealer.complete(&mut buffer, &path, header).unwrap())
            });
        });
    }
    group.finish();
}

/// A lane whose frames go nowhere, and whose receiver has always seen them all.
struct Lane<S> {
    sender: LaneSender<Drained<S>, Seen>,
    epoch: Arc<AtomicU32>,
}

impl<S: FrameSink> Lane<S> {
    fn new(frames: FrameLayout, cipher: Option<Cipher>, sink: Drained<S>) -> Self {
        let epoch = Arc::new(AtomicU32::new(0));
        let config = LaneConfig {
            session: SESSION,
            lane: 0,
            frames,
            path: path(),
            protection: protection(cipher),
            window: 240,
            bandwidth: Bandwidth::default(),
            packings: Packings::Never,
        };
        let feedback = Seen { epoch: Arc::clone(&epoch), told: false };
        Self { sender: LaneSender::new(config, sink, feedback), epoch }
    }

    /// The whole guest.
    fn send(&mut self, ram: &[Mapping; 1]) {
        let layout = layout();
        let sent = AtomicPageSet::new(GUEST_PAGES);
        let pages = Pages { layout: &layout, mappings: ram, sent: &sent, hashes: None };
        let epoch = self.epoch.fetch_add(1, Ordering::Relaxed) + 1;
        let (stop, progress) = (AtomicBool::new(false), AtomicU64::new(0));
        let round = self.sender.send_round(epoch, pages, 0..GUEST_PAGES, &stop, &progress).unwrap();
        assert_eq!(round.data_pages, GUEST_PAGES);
    }
}

struct Seen {
    epoch: Arc<AtomicU32>,
    told: bool,
}

impl FeedbackRx for Seen {
    fn recv(&mut self, _wait: Duration) -> Option<Feedback> {
        self.told = !self.told;
        let epoch = self.epoch.load(Ordering::Relaxed);
        let all = u32::MAX;
        self.told.then_some(Feedback { session: SESSION, epoch, lane: 0, seen: all, received: all })
    }
}

/// A sink with the kernel's side of its rings, which completes all it is given, unread.
struct Drained<S> {
    sink: S,
    tx: Consumer<XdpDesc>,
    completion: Producer<u64>,
}

impl<S> Drained<S> {
    fn drain(&mut self) {
        while let Some(descriptor) = self.tx.take() {
            assert!(self.completion.stage([descriptor.addr].into_iter()));
        }
        self.tx.release();
        self.completion.publish();
    }
}

impl<S: FrameSink> FrameSink for Drained<S> {
    fn frame(&mut self, fill: impl FnOnce(&mut [u8]) -> usize) -> std::io::Result<bool> {
        self.sink.frame(fill)
    }

    fn flush(&mut self) -> std::io::Result<usize> {
        self.drain();
        self.sink.flush()
    }

    fn direct(&mut self) -> Option<&mut DirectSink> {
        self.sink.direct()
    }
}

/// A send queue over `umem` with slots of `slot_chunks` at its beginning.
fn queue<S>(umem: &Umem, slot_chunks: u32, sink: impl FnOnce(TxQueue) -> S) -> Drained<S> {
    let size = (SLOTS * slot_chunks).next_power_of_two();
    let (producer, tx) = ring_pair(size, XdpDesc { addr: 0, len: 0, options: XdpDescOptions::empty() });
    let (completion, consumer) = ring_pair(size, 0);
    let queue = TxQueue::new(producer, consumer, umem.clone(), 0, SLOTS, slot_chunks, None);
    Drained { sink: sink(queue), tx, completion }
}

fn slot_chunks(frames: &FrameLayout) -> u32 {
    frames.frame_len.div_ceil(CHUNK_SIZE) as u32
}

fn staged(frames: &FrameLayout) -> Drained<XskSink> {
    let chunks = slot_chunks(frames);
    queue(&Umem::anonymous((SLOTS * chunks) as usize).unwrap(), chunks, XskSink::new)
}

fn direct(frames: &FrameLayout, ram: &Mapping) -> Drained<DirectSink> {
    let mut existing = PageSet::new(GUEST_PAGES);
    existing.insert_range(0, GUEST_PAGES);
    let pages = LaidOut::of(&existing, &layout());
    let part = FilePart { file: ram.file().as_fd(), offset: 0, len: GUEST_PAGES as usize * PAGE_SIZE };
    let chunks = slot_chunks(frames);
    let memory = JoinedMemory::new((SLOTS * chunks) as usize * CHUNK_SIZE, &[part]).unwrap();
    let at = memory.parts_at();
    let umem = Umem::over(Arc::new(memory)).unwrap();
    queue(&umem, chunks, |queue| DirectSink::new(queue, pages, at))
}
