//! A receive worker's work: frames as the kernel leaves them are checked and their pages placed; against copying the pages alone.
//!
//! Frames come as to an agent by AF_XDP: through the rings, in chunks of a UMEM of the agent's size that go round, [`BATCH`] at a
//! time, written just before by the kernel, on the same core. Not counted is that writing, for whoever copies alone neither; nor
//! what feedback costs. `receive-cold` is the same with frames that were written long before, each into memory of its own: as if
//! by a device that writes past the caches.

use std::{
    fs::File,
    os::{fd::AsFd, unix::fs::FileExt},
    sync::Arc,
    time::{Duration, Instant},
};

use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, measurement::WallTime};
use migrate_common::{
    PAGE_SIZE,
    wire::{DESCRIPTOR_LEN, FrameHeader, FrameKind, Guard, HEADER_LEN, Packing, PageDescriptor, TAG_LEN},
};
use rustix::net::xdp::{XdpDesc, XdpDescOptions};
use xferry::{
    datapath::{
        Cipher, Demux, Feedback, FeedbackTx, FrameLayout, FrameSource, Inbound, InboundSpec, Sealer,
        XskSource,
    },
    memory::{Mapping, Reservation, fence},
    xsk::{CHUNK_SIZE, Consumer, FilePart, JoinedMemory, Producer, RxQueue, Umem, ring_pair},
};

use crate::{GUEST_PAGES, MTUS, PORT, SESSION, frames, layout, path, protection, ram};

/// Where a frame begins in its first chunk, and what is left free in the others (`XDP_PACKET_HEADROOM`, include/uapi/linux/bpf.h).
const HEADROOM: usize = 256;
/// Bytes of a frame in one chunk.
const PIECE: usize = CHUNK_SIZE - HEADROOM;
/// Chunks of a queue, as the agent has them: 16 MiB.
const RX_CHUNKS: usize = 4096;
/// Frames that the kernel writes before the worker takes them: `NAPI_POLL_WEIGHT` (include/linux/netdevice.h), and what a worker
/// takes at once.
const BATCH: usize = 64;

pub fn bench(criterion: &mut Criterion) {
    for mtu in MTUS {
        let mut group = group(criterion, "receive");
        for (name, cipher) in [("crc32c", None), ("aes-128-gcm", Some(Cipher::Aes128Gcm))] {
            let guest = Guest::new(mtu, cipher);
            let mut nic = Nic::new(RX_CHUNKS);
            group.bench_function(BenchmarkId::new(name, mtu), |bencher| {
                bencher.iter_custom(|times| (0..times).map(|_| guest.receive(&mut nic, BATCH)).sum());
            });
        }
        let guest = Guest::new(mtu, None);
        group.bench_function(BenchmarkId::new("memcpy", mtu), |bencher| {
            let mut memory = vec![0; RX_CHUNKS * CHUNK_SIZE];
            bencher.iter_custom(|times| (0..times).map(|_| guest.copy(&mut memory)).sum());
        });
        group.finish();
        cold(criterion, mtu, &guest);
    }
}

/// The same where each frame has chunks of its own.
fn cold(criterion: &mut Criterion, mtu: usize, guest: &Guest) {
    let mut group = group(criterion, "receive-cold");
    let frames = guest.frames.len();
    let mut nic = Nic::new((frames * guest.frames[0].len().div_ceil(PIECE)).next_power_of_two());
    group.bench_function(BenchmarkId::new("crc32c", mtu), |bencher| {
        bencher.iter_custom(|times| (0..times).map(|_| guest.receive(&mut nic, frames)).sum());
    });
    drop(nic);
    let memory = vec![0xa5; GUEST_PAGES as usize * PAGE_SIZE];
    group.bench_function(BenchmarkId::new("memcpy", mtu), |bencher| {
        bencher.iter(|| {
            (0..)
                .zip(memory.chunks(PAGE_SIZE))
                .for_each(|(page, content)| guest.ram().write(page, 0, content));
            fence();
        });
    });
    group.finish();
}

fn group<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Bytes(GUEST_PAGES * PAGE_SIZE as u64)).sample_size(10);
    group
}

/// The kernel's side of a receive queue.
struct Nic {
    /// What the UMEM lies in.
    memory: File,
    /// Where that begins in the UMEM, bytes.
    start: u64,
    rx: Producer<XdpDesc>,
    fill: Consumer<u64>,
    source: XskSource,
}

impl Nic {
    fn new(chunks: usize) -> Self {
        let memory = tempfile::tempfile_in("/dev/shm").unwrap();
        memory.set_len((chunks * CHUNK_SIZE) as u64).unwrap();
        let part = FilePart { file: memory.as_fd(), offset: 0, len: chunks * CHUNK_SIZE };
        let joined = JoinedMemory::new(CHUNK_SIZE, &[part]).unwrap();
        let start = joined.parts_at();
        let umem = Umem::over(Arc::new(joined)).unwrap();
        let size = chunks as u32;
        let (rx, consumer) = ring_pair(size, XdpDesc { addr: 0, len: 0, options: XdpDescOptions::empty() });
        let (mut producer, fill) = ring_pair(size, 0);
        assert!(producer.stage((0..chunks).map(|chunk| start + (chunk * CHUNK_SIZE) as u64)));
        producer.publish();
        let source = XskSource::new(RxQueue::new(consumer, producer, umem, None), PORT);
        Self { memory, start, rx, fill, source }
    }

    /// Leaves a frame in chunks of the fill ring.
    fn deliver(&mut self, frame: &[u8]) {
        let mut pieces = frame.chunks(PIECE).peekable();
        while let Some(piece) = pieces.next() {
            let addr = self.fill.take().unwrap() + HEADROOM as u64;
            self.memory.write_all_at(piece, addr - self.start).unwrap();
            let more =
                if pieces.peek().is_some() { XdpDescOptions::XDP_PKT_CONTD } else { XdpDescOptions::empty() };
            let descriptor = XdpDesc { addr, len: piece.len() as u32, options: more };
            assert!(self.rx.stage([descriptor].into_iter()));
        }
        self.fill.release();
        self.rx.publish();
    }
}

/// A guest that is received, and the frames that carry all of it.
struct Guest {
    frames: Vec<Vec<u8>>,
    inbound: Arc<Inbound>,
}

impl Guest {
    fn new(mtu: usize, cipher: Option<Cipher>) -> Self {
        let layout = frames(mtu);
        let mut sealer = Sealer::new(protection(cipher));
        let count = GUEST_PAGES as usize / layout.pages_per_frame;
        let frames = (0..count).map(|number| frame(&layout, &mut sealer, number)).collect();
        Self { frames, inbound: inbound(mtu, cipher) }
    }

    fn ram(&self) -> &Mapping {
        &self.inbound.mappings()[0]
    }

    /// As a worker does it, `batch` frames at a time. Returns the time that it took.
    fn receive(&self, nic: &mut Nic, batch: usize) -> Duration {
        self.inbound.reset_arrived();
        let mut demux = Demux::default();
        demux.open(Arc::clone(&self.inbound), 0);
        let mut took = Duration::ZERO;
        for frames in self.frames.chunks(batch) {
            frames.iter().for_each(|frame| nic.deliver(frame));
            let begun = Instant::now();
            let count = nic.source.receive(frames.len(), |datagram| demux.take(datagram));
            demux.feedback(false);
            took += begun.elapsed();
            assert_eq!(count, frames.len());
        }
        assert_eq!(self.inbound.arrived(), self.frames.len() as u64);
        took
    }

    /// As many pages, a batch of them at a time, each batch written just before. Returns the time that copying them took.
    fn copy(&self, memory: &mut [u8]) -> Duration {
        let len = self.frames[0].len() / PAGE_SIZE * PAGE_SIZE;
        let mut took = Duration::ZERO;
        let (mut at, mut page) = (0, 0);
        for frames in self.frames.chunks(BATCH) {
            at = if at + frames.len() * len > memory.len() { 0 } else { at };
            let written = &mut memory[at..at + frames.len() * len];
            written.chunks_mut(len).zip(frames).for_each(|(to, frame)| to.copy_from_slice(&frame[..len]));
            at += written.len();
            let begun = Instant::now();
            for content in written.chunks(PAGE_SIZE) {
                self.ram().write(page, 0, content);
                page += 1;
            }
            fence();
            took += begun.elapsed();
        }
        took
    }
}

/// A frame full of pages.
fn frame(layout: &FrameLayout, sealer: &mut Sealer, number: usize) -> Vec<u8> {
    let (path, pages) = (path(), layout.pages_per_frame);
    let mut buffer = vec![0xa5; layout.frame_len];
    for index in 0..pages {
        let page = (number * pages + index) as u64;
        let descriptor = PageDescriptor::Data { backend: 0, page, offset: 0, length: PAGE_SIZE as u16 };
        let at = path.len() + HEADER_LEN + index * DESCRIPTOR_LEN;
        buffer[at..at + DESCRIPTOR_LEN].copy_from_slice(&descriptor.to_bytes());
    }
    let header = FrameHeader {
        kind: FrameKind::Pages,
        descriptors: pages as u16,
        session: SESSION,
        epoch: 1,
        lane: 0,
        sequence: number as u32,
        guard: Guard::Checksum,
        packing: Packing::Plain,
        payload: (pages * PAGE_SIZE) as u32,
        checksum: 0,
    };
    let len = sealer.complete(&mut buffer, &path, header).unwrap();
    assert!(len + TAG_LEN >= layout.frame_len);
    buffer.truncate(len);
    buffer
}

/// A receiving guest, all of whose memory is there.
fn inbound(mtu: usize, cipher: Option<Cipher>) -> Arc<Inbound> {
    let mapping = ram();
    let reservation = Reservation::clear(&mapping).unwrap();
    let inbound = Inbound::new(InboundSpec {
        session: SESSION,
        layout: layout(),
        mappings: vec![mapping],
        reservations: vec![reservation],
        frames: frames(mtu),
        protection: protection(cipher),
        lanes: 1,
        hash: false,
        feedback: Box::new(Unheard),
        feedback_every: 16,
        queues: 1,
    });
    inbound.reserve(0..GUEST_PAGES / xferry::memory::RESERVE_CHUNK);
    inbound
}

struct Unheard;

impl FeedbackTx for Unheard {
    fn send(&self, _feedback: Feedback) {}
}
