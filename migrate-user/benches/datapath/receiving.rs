//! A receive worker's work: frames as the kernel leaves them are checked and their pages placed; against copying the pages alone.

use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput};
use migrate_common::{
    PAGE_SIZE,
    wire::{DESCRIPTOR_LEN, FrameHeader, FrameKind, Guard, HEADER_LEN, Packing, PageDescriptor, TAG_LEN},
};
use xferry::{
    datapath::{Cipher, Datagram, Demux, Feedback, FeedbackTx, Inbound, InboundSpec, Sealer},
    memory::{Mapping, Reservation},
    xsk::{CHUNK_SIZE, Packet},
};

use crate::{GUEST_PAGES, MTUS, PORT, SESSION, frames, layout, path, protection, ram};

/// Where a frame begins in its first chunk, and how much of it lies in each (`XDP_PACKET_HEADROOM`, include/uapi/linux/bpf.h).
const HEADROOM: usize = 256;

pub fn bench(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("receive");
    group.throughput(Throughput::Bytes(GUEST_PAGES * PAGE_SIZE as u64)).sample_size(10);
    for mtu in MTUS {
        for (name, cipher) in [("crc32c", None), ("aes-128-gcm", Some(Cipher::Aes128Gcm))] {
            let arrived = Arrived::new(mtu, cipher);
            let inbound = inbound(mtu, cipher);
            group.bench_function(BenchmarkId::new(name, mtu), |bencher| {
                bencher.iter(|| arrived.receive(&inbound));
            });
            if cipher.is_none() {
                group.bench_function(BenchmarkId::new("memcpy", mtu), |bencher| {
                    bencher.iter(|| arrived.copy(&inbound.mappings()[0]));
                });
            }
        }
    }
    group.finish();
}

/// All frames of a guest, each in chunks of its own.
struct Arrived {
    chunks: Vec<u8>,
    frame_len: usize,
    frames: usize,
}

impl Arrived {
    fn new(mtu: usize, cipher: Option<Cipher>) -> Self {
        let (layout, path) = (frames(mtu), path());
        let mut sealer = Sealer::new(protection(cipher));
        let pages = layout.pages_per_frame;
        let count = GUEST_PAGES as usize / pages;
        let mut buffer = vec![0xa5; layout.frame_len];
        let mut chunks = Vec::with_capacity(count * layout.receive_buffers() * CHUNK_SIZE);
        let mut frame_len = 0;
        for frame in 0..count {
            for index in 0..pages {
                let page = (frame * pages + index) as u64;
                let descriptor =
                    PageDescriptor::Data { backend: 0, page, offset: 0, length: PAGE_SIZE as u16 };
                let at = path.len() + HEADER_LEN + index * DESCRIPTOR_LEN;
                buffer[at..at + DESCRIPTOR_LEN].copy_from_slice(&descriptor.to_bytes());
            }
            let header = FrameHeader {
                kind: FrameKind::Pages,
                descriptors: pages as u16,
                session: SESSION,
                epoch: 1,
                lane: 0,
                sequence: frame as u32,
                guard: Guard::Checksum,
                packing: Packing::Plain,
                payload: (pages * PAGE_SIZE) as u32,
                checksum: 0,
            };
            frame_len = sealer.complete(&mut buffer, &path, header).unwrap();
            assert!(frame_len + TAG_LEN >= layout.frame_len);
            for piece in buffer[..frame_len].chunks(CHUNK_SIZE - HEADROOM) {
                let start = chunks.len();
                chunks.resize(start + HEADROOM, 0);
                chunks.extend(piece);
                chunks.resize(start + CHUNK_SIZE, 0);
            }
        }
        Self { chunks, frame_len, frames: count }
    }

    /// As a worker does it, from the Ethernet header on.
    fn receive(&self, inbound: &Arc<Inbound>) {
        inbound.reset_arrived();
        let mut demux = Demux::default();
        demux.open(Arc::clone(inbound), 0);
        let per_frame = self.frame_len.div_ceil(CHUNK_SIZE - HEADROOM);
        let mut pieces = Vec::with_capacity(per_frame);
        for frame in self.chunks.chunks(per_frame * CHUNK_SIZE) {
            pieces.clear();
            let mut left = self.frame_len;
            for chunk in frame.chunks(CHUNK_SIZE) {
                let len = left.min(CHUNK_SIZE - HEADROOM);
                pieces.push(&chunk[HEADROOM..HEADROOM + len]);
                left -= len;
            }
            demux.take(Datagram::in_ethernet(&Packet::new(&pieces), PORT).as_ref());
        }
        assert_eq!(inbound.arrived(), self.frames as u64);
    }

    /// As many pages, out of the same memory into the same.
    fn copy(&self, to: &Mapping) {
        for (page, content) in (0..GUEST_PAGES).zip(self.chunks.chunks(PAGE_SIZE)) {
            to.write(page, 0, content);
        }
    }
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
    inbound.reserve(0..GUEST_PAGES / xferry::memory::RESERVE_CHUNK, xferry::memory::Ahead::Mapped);
    inbound
}

struct Unheard;

impl FeedbackTx for Unheard {
    fn send(&self, _feedback: Feedback) {}
}
