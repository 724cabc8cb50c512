//! The whole page stream in memory: real sender, real receiver, a wire that drops, repeats, reorders and
//! corrupts, and no kernel.

mod direct;
mod wire;

use std::{
    collections::VecDeque,
    fs::File,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use migrate_common::PAGE_SIZE;
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use self::wire::{Faults, Wire, WireSink};
use super::*;
use crate::{
    memory::{Access, AtomicPageSet, Backend, Mapping, PageSet, RamLayout, Reservation},
    xsk::Packet,
};

const PORT: u16 = 4791;

#[derive(Clone, Default)]
struct Loop(Arc<Mutex<VecDeque<Feedback>>>);

impl FeedbackTx for Loop {
    fn send(&self, feedback: Feedback) {
        self.0.lock().unwrap().push_back(feedback);
    }
}

impl FeedbackRx for Loop {
    fn recv(&mut self, wait: Duration) -> Option<Feedback> {
        let next = self.0.lock().unwrap().pop_front();
        if next.is_none() && !wait.is_zero() {
            std::thread::sleep(wait);
        }
        next
    }
}

/// Each in turn, by seed.
fn protection(seed: u64) -> Protection {
    let sealed = |cipher| Protection::Sealed(Arc::new(Secret::new([7; 32]).page_key(77, cipher).unwrap()));
    match seed % 4 {
        0 => Protection::Checksum,
        1 => sealed(Cipher::Aes128Gcm),
        2 => sealed(Cipher::Aes256Gcm),
        _ => sealed(Cipher::ChaCha20Poly1305),
    }
}

fn ram(pages: u64, huge: bool) -> Mapping {
    let file = File::from(memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap());
    file.set_len(pages * PAGE_SIZE as u64).unwrap();
    Mapping::new(file, "test".into(), Access::Write).unwrap().taken_for_huge(huge)
}

struct Stream {
    layout: RamLayout,
    source: Vec<Mapping>,
    sent: AtomicPageSet,
    hashes: Option<SentHashes>,
    inbound: Arc<Inbound>,
    receiver: Arc<Mutex<Demux>>,
    sender: LaneSender<WireSink, Loop>,
    faults: Arc<Mutex<Faults>>,
    bandwidth: Bandwidth,
    epoch: u32,
    stalls: u32,
    unchanged: u64,
    packed: Packed,
    wire_bytes: u64,
}

impl Stream {
    fn new(backends: &[u64], mtu: usize, faults: Faults, seed: u64) -> Self {
        Self::packing(backends, mtu, faults, seed, Packings::Never)
    }

    fn packing(backends: &[u64], mtu: usize, faults: Faults, seed: u64, packings: Packings) -> Self {
        Self::between(backends, [false; 2], mtu, faults, seed, packings)
    }

    /// `huge` tells whether memory at the source and at the destination is of huge pages.
    fn between(
        backends: &[u64],
        huge: [bool; 2],
        mtu: usize,
        faults: Faults,
        seed: u64,
        packings: Packings,
    ) -> Self {
        let layout = RamLayout::new(
            backends
                .iter()
                .enumerate()
                .map(|(n, pages)| Backend { id: format!("ram{n}"), size: pages * PAGE_SIZE as u64 })
                .collect(),
        );
        let frames = FrameLayout::new(mtu, false, false).unwrap();
        let mappings: Vec<Mapping> = backends.iter().map(|&pages| ram(pages, huge[1])).collect();
        let reservations = mappings.iter().map(|m| Reservation::clear(m).unwrap()).collect();
        let feedback = Loop::default();
        let inbound = Inbound::new(InboundSpec {
            session: 77,
            layout: layout.clone(),
            mappings,
            reservations,
            frames,
            hash: true,
            feedback: Box::new(feedback.clone()),
            feedback_every: 4,
            queues: 1,
            lanes: 1,
            protection: protection(seed),
        });
        let mut demux = Demux::default();
        demux.open(Arc::clone(&inbound), 0);
        let receiver = Arc::new(Mutex::new(demux));
        let end = |n: u8| Endpoint { mac: [2, 0, 0, 0, 0, n], ip: [10, 0, 0, n].into() };
        let bandwidth = Bandwidth::default();
        let config = LaneConfig {
            session: 77,
            lane: 0,
            frames,
            path: FramePath::new(end(1), end(2), 50_000, PORT),
            protection: protection(seed),
            window: 32,
            bandwidth: bandwidth.clone(),
            packings,
        };
        let faults = Arc::new(Mutex::new(faults));
        let wire = Wire {
            receiver: Arc::clone(&receiver),
            faults: Arc::clone(&faults),
            seed: seed | 1,
            held: None,
            lost: 0,
        };
        let sink = WireSink { wire, capacity: frames.frame_len };
        Self {
            sent: AtomicPageSet::new(layout.pages()),
            hashes: None,
            source: backends.iter().map(|&pages| ram(pages, huge[0])).collect(),
            layout,
            inbound,
            receiver,
            sender: LaneSender::new(config, sink, feedback),
            faults,
            bandwidth,
            epoch: 0,
            stalls: 0,
            unchanged: 0,
            packed: Packed::default(),
            wire_bytes: 0,
        }
    }

    fn write(&self, page: u64, value: u8) {
        let at = self.layout.locate(page);
        self.source[usize::from(at.backend)].write(at.page, 0, &[value; PAGE_SIZE]);
    }

    /// Sends a round and returns the pages to send again.
    fn round(&mut self, pages: &PageSet) -> PageSet {
        self.epoch += 1;
        let hashes = self.hashes.as_ref();
        let changed = hashes.map(|hashes| hashes.changed(pages, &self.layout, &self.source));
        let pages = changed.as_ref().map_or(pages, |changed| &changed.pages);
        self.unchanged += changed.as_ref().map_or(0, |changed| changed.unchanged);
        let view = Pages { layout: &self.layout, mappings: &self.source, sent: &self.sent, hashes };
        let (stop, progress) = (AtomicBool::new(false), AtomicU64::new(0));
        let sent = self.sender.send_round(self.epoch, view, pages.iter(), &stop, &progress).unwrap();
        assert_eq!(progress.into_inner(), pages.count());
        self.stalls += sent.stalls;
        self.packed += sent.packed;
        self.wire_bytes += sent.wire_bytes;
        let received = self.receiver.lock().unwrap().close(77, self.epoch);
        self.inbound.reset_arrived();
        let mut again = PageSet::new(self.layout.pages());
        let mut lost_frames = 0;
        for lost in losses(&[sent.frames], &received) {
            sent.lost_pages(&lost, pages, &mut again);
            lost_frames += lost.frames();
        }
        self.sender.on_round(lost_frames);
        if let Some(hashes) = hashes {
            hashes.forget(&again);
        }
        again
    }

    fn wire_becomes(&self, faults: Faults) {
        *self.faults.lock().unwrap() = faults;
    }

    fn settle(&mut self, mut pages: PageSet) {
        for _ in 0..200 {
            if pages.is_empty() {
                return;
            }
            pages = self.round(&pages);
        }
        panic!("200 rounds did not repair the losses");
    }

    fn assert_equal(&self) {
        let (mut a, mut b) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
        for page in 0..self.layout.pages() {
            let at = self.layout.locate(page);
            self.source[usize::from(at.backend)].read(at.page, 0, &mut a).unwrap();
            self.inbound.mappings()[usize::from(at.backend)].read(at.page, 0, &mut b).unwrap();
            assert!(a == b, "page {page} differs: {} and {}", a[0], b[0]);
        }
        assert!(self.inbound.take_failure().is_none());
    }

    /// Fills a page with bytes that pack to about a third, other ones for each value.
    fn write_text(&self, page: u64, value: u8) {
        let content: [u8; PAGE_SIZE] = std::array::from_fn(|at| match at % 3 {
            0 => (at * at / 7 + usize::from(value) * 31) as u8,
            _ => 7,
        });
        let at = self.layout.locate(page);
        self.source[usize::from(at.backend)].write(at.page, 0, &content);
    }

    /// Fills a page with bytes that do not pack.
    fn write_noise(&self, page: u64, value: u8) {
        let mut seed = 0x9e37_79b9_7f4a_7c15 ^ ((page << 8) + u64::from(value) + 1);
        let content: [u8; PAGE_SIZE] = std::array::from_fn(|_| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed as u8
        });
        let at = self.layout.locate(page);
        self.source[usize::from(at.backend)].write(at.page, 0, &content);
    }

    fn set(&self, pages: impl IntoIterator<Item = u64>) -> PageSet {
        let mut set = PageSet::new(self.layout.pages());
        pages.into_iter().for_each(|page| set.insert(page));
        set
    }
}

#[test]
fn a_clean_wire_delivers_everything_at_every_frame_size() {
    for mtu in [576, 1500, 3046, 9000, 65535] {
        let mut stream = Stream::new(&[100, 37], mtu, Faults::default(), 1);
        (0..137).filter(|page| page % 3 != 0).for_each(|page| stream.write(page, page as u8));
        assert!(stream.round(&stream.set(0..137)).is_empty(), "MTU {mtu}");
        stream.assert_equal();
    }
}

#[test]
fn pages_of_huge_pages_arrive_by_every_cipher_at_every_frame_size() {
    for seed in 0..4 {
        for mtu in [1500, 9000, 65535] {
            let mut stream =
                Stream::between(&[100, 37], [true; 2], mtu, Faults::default(), seed, Packings::Never);
            (0..137).filter(|page| page % 23 != 0).for_each(|page| stream.write(page, page as u8));
            assert!(stream.round(&stream.set((0..137).filter(|page| page % 29 != 5))).is_empty());
            assert!(stream.round(&stream.set((0..137).filter(|page| page % 29 == 5))).is_empty());
            stream.assert_equal();
        }
    }
}

#[test]
fn pages_that_become_zero_are_zeroed_and_untouched_zeroes_cost_nothing() {
    let mut stream = Stream::new(&[64], 9000, Faults::default(), 1);
    (0..8).for_each(|page| stream.write(page, 9));
    stream.settle(stream.set(0..64));
    let frames = stream.inbound.counters().frames.load(Relaxed);
    assert_eq!(frames, 4, "8 pages in 4 frames, 56 zero pages in none");
    [2, 3, 4, 6].into_iter().for_each(|page| stream.write(page, 0));
    stream.settle(stream.set([2, 3, 4, 6, 30]));
    stream.assert_equal();
}

/// As when somebody cuts the file of a running guest: through a mapping that would be a SIGBUS for the whole agent.
#[test]
fn ram_that_cannot_be_read_ends_the_round_with_the_reason() {
    for packings in [Packings::Never, Packings::Always(Method::Lz4)] {
        let mut stream = Stream::packing(&[40, 60], 9000, Faults::default(), 1, packings);
        (0..100).for_each(|page| stream.write(page, page as u8 + 1));
        stream.source[1].file().set_len(30 * PAGE_SIZE as u64).unwrap();
        let view =
            Pages { layout: &stream.layout, mappings: &stream.source, sent: &stream.sent, hashes: None };
        let (stop, progress) = (AtomicBool::new(false), AtomicU64::new(0));
        let error = stream.sender.send_round(1, view, 0..100, &stop, &progress).unwrap_err();
        assert!(matches!(error, SendError::Memory(_)), "{error}");
        assert!(error.to_string().starts_with("cannot read test: "), "{error}");
    }
}

/// Pages are counted when they came, and in their place when they are told of: what is found out between must not be forgotten.
#[test]
fn ram_that_cannot_be_written_is_a_failure_of_the_round() {
    let mut stream = Stream::new(&[100], 9000, Faults::default(), 1);
    (0..100).for_each(|page| stream.write(page, page as u8 + 1));
    let file = stream.inbound.mappings()[0].file();
    file.set_len(30 * PAGE_SIZE as u64).unwrap();
    fcntl_add_seals(file, SealFlags::GROW).unwrap();
    // As many as are gathered, and no more.
    stream.round(&stream.set(0..30));
    assert!(stream.inbound.take_failure().is_none());
    stream.round(&stream.set(28..32));
    let failure = stream.inbound.take_failure().unwrap();
    assert!(failure.to_string().starts_with("cannot write to test: "), "{failure}");
}

#[test]
fn packed_pages_arrive_at_every_frame_size_and_in_fewer_bytes() {
    for method in Method::ALL {
        for mtu in [576, 1500, 3046, 9000, 65535] {
            let mut stream =
                Stream::packing(&[200, 101], mtu, Faults::default(), 1, Packings::Always(method));
            (0..301).filter(|page| page % 5 != 0).for_each(|page| match page % 7 {
                0 => stream.write_noise(page, 1),
                _ => stream.write_text(page, page as u8),
            });
            assert!(stream.round(&stream.set(0..301)).is_empty(), "MTU {mtu}");
            stream.assert_equal();
            assert_eq!(stream.inbound.figures()[0].malformed, 0);
            if mtu >= 9000 {
                let Packed { pages, bytes, .. } = stream.packed;
                assert!(pages > 180 && bytes < pages * 3000, "{method:?}, MTU {mtu}: {pages} in {bytes}");
                assert!(stream.wire_bytes < bytes + (241 - pages) * 4200 + 12_000, "frames are full");
            }
        }
    }
}

#[test]
fn noise_goes_as_it_is() {
    let always = Packings::Always(Method::Lz4);
    for mtu in [1500, 9000] {
        let mut stream = Stream::packing(&[64], mtu, Faults::default(), 1, always.clone());
        (0..64).for_each(|page| stream.write_noise(page, 3));
        stream.settle(stream.set(0..64));
        stream.assert_equal();
        assert_eq!(stream.packed.pages, 0);
    }
}

#[test]
fn pages_that_are_as_they_were_sent_are_not_sent_again_unless_they_were_lost() {
    let mut stream = Stream::new(&[2048], 9000, Faults::default(), 1);
    stream.hashes = Some(SentHashes::new(&stream.layout, 0..1));
    (0..1000).for_each(|page| stream.write(page, 1 + (page % 200) as u8));
    assert!(stream.round(&stream.set(0..2048)).is_empty());
    // Four huge pages are dirty, and three of their pages have changed.
    stream.write(7, 77);
    stream.write(8, 0);
    stream.write(1500, 5);
    let before = stream.wire_bytes;
    assert!(stream.round(&stream.set(0..2048)).is_empty());
    stream.assert_equal();
    assert_eq!(stream.unchanged, 2045);
    assert!(stream.wire_bytes - before < 3 * 8400, "{} bytes", stream.wire_bytes - before);

    // Nothing arrives: all of it must be sent again, though it is as it was sent.
    stream.write(9, 99);
    stream.wire_becomes(Faults { lose: 100, ..Faults::default() });
    let again = stream.round(&stream.set([9]));
    stream.wire_becomes(Faults::default());
    assert!(again.contains(9));
    stream.settle(again);
    stream.assert_equal();
}

#[test]
fn frames_of_a_closed_epoch_are_never_placed() {
    let mut stream = Stream::new(&[4], 9000, Faults::default(), 1);
    stream.write(0, 1);
    let old = Arc::new(Mutex::new(Vec::new()));
    // Capture the frame of epoch 1 by sending it into a wire that holds it back.
    stream.sender = {
        let mut sender =
            std::mem::replace(&mut stream.sender, Stream::new(&[4], 9000, Faults::default(), 1).sender);
        let view =
            Pages { layout: &stream.layout, mappings: &stream.source, sent: &stream.sent, hashes: None };
        struct Capture(Arc<Mutex<Vec<Vec<u8>>>>);
        impl FrameSink for Capture {
            fn frame(&mut self, fill: impl FnOnce(&mut [u8]) -> usize) -> std::io::Result<bool> {
                let mut buffer = vec![0; 9014];
                let len = fill(&mut buffer);
                buffer.truncate(len);
                self.0.lock().unwrap().push(buffer);
                Ok(true)
            }
            fn flush(&mut self) -> std::io::Result<usize> {
                Ok(0)
            }
        }
        let frames = FrameLayout::new(9000, false, false).unwrap();
        let end = |n: u8| Endpoint { mac: [2, 0, 0, 0, 0, n], ip: [10, 0, 0, n].into() };
        let config = LaneConfig {
            session: 77,
            lane: 0,
            frames,
            path: FramePath::new(end(1), end(2), 1, PORT),
            protection: protection(1),
            window: 8,
            bandwidth: Bandwidth::default(),
            packings: Packings::Never,
        };
        LaneSender::new(config, Capture(Arc::clone(&old)), Loop::default())
            .send_round(1, view, [0].into_iter(), &AtomicBool::new(false), &AtomicU64::new(0))
            .unwrap();
        sender.on_round(0);
        sender
    };
    stream.write(0, 2);
    stream.settle(stream.set([0]));
    let late = old.lock().unwrap()[0].clone();
    let late: [&[u8]; 1] = [&late];
    let late = Packet::new(&late);
    {
        let mut receiver = stream.receiver.lock().unwrap();
        receiver.take(Datagram::in_ethernet(&late, PORT).as_ref());
        receiver.feedback(true);
    }
    assert_eq!(stream.inbound.figures()[0].stale, 1);
    stream.assert_equal();
}

/// Its window never closes, so that it waits for no word; it hears them while it pauses.
#[test]
fn a_lane_with_a_limit_measures_the_way_and_not_its_pauses() {
    let mut stream = Stream::new(&[40], 9000, Faults::default(), 1);
    (0..40).for_each(|page| stream.write(page, 7));
    // 2 ms for each of 20 frames, which the window has room for.
    stream.bandwidth.set(Some(4 << 20));
    let begun = Instant::now();
    stream.settle(stream.set(0..40));
    let (took, way) = (begun.elapsed(), stream.sender.way().unwrap());
    assert!(took > Duration::from_millis(30), "{took:?}");
    assert!(way < took / 8, "{way:?} of {took:?}");
}

#[test]
fn a_window_that_loses_all_its_frames_does_not_hang() {
    let mut stream = Stream::new(&[200], 9000, Faults { lose: 60, ..Faults::default() }, 12345);
    (0..200).for_each(|page| stream.write(page, 7));
    stream.settle(stream.set(0..200));
    stream.assert_equal();
}

#[test]
fn every_kind_of_fault_is_counted_for_its_queue() {
    let faults = Faults { lose: 5, duplicate: 10, swap: 10, corrupt: 10 };
    for (seed, sealed) in [(100, false), (101, true)] {
        counted(faults, seed, sealed);
    }
}

fn counted(faults: Faults, seed: u64, sealed: bool) {
    let mut stream = Stream::new(&[2000], 9000, faults, seed);
    (0..2000).for_each(|page| stream.write(page, 1 + (page % 250) as u8));
    stream.settle(stream.set(0..2000));
    stream.assert_equal();
    let [figures] = stream.inbound.figures()[..] else { panic!("one queue") };
    assert!(figures.frames >= 1000, "{figures:?}");
    // Damage to the header is found before the guard is looked at.
    let (damaged, other) = match sealed {
        true => (figures.bad_tag, figures.corrupt),
        false => (figures.corrupt, figures.bad_tag),
    };
    for count in [figures.duplicates, figures.reordered, damaged] {
        assert!((20..400).contains(&count), "{figures:?}");
    }
    assert!(other < damaged / 10, "{figures:?}");
    assert_eq!((figures.queue, figures.malformed), (0, 0));
}

#[test]
fn random_losses_do_not_stall_the_stream() {
    let mut stream = Stream::new(&[4000], 9000, Faults { lose: 5, ..Faults::default() }, 4711);
    (0..4000).for_each(|page| stream.write(page, 1 + (page % 250) as u8));
    stream.settle(stream.set(0..4000));
    stream.assert_equal();
    assert!(stream.epoch < 12, "{} rounds", stream.epoch);
    assert_eq!(stream.stalls, 0);
}

#[test]
fn lost_feedback_is_said_again() {
    let mut stream = Stream::new(&[8], 9000, Faults::default(), 1);
    (0..8).for_each(|page| stream.write(page, 3));
    let view = Pages { layout: &stream.layout, mappings: &stream.source, sent: &stream.sent, hashes: None };
    let (stop, progress) = (AtomicBool::new(false), AtomicU64::new(0));
    stream.sender.send_round(1, view, 0..8, &stop, &progress).unwrap();
    let mut receiver = stream.receiver.lock().unwrap();
    assert!(receiver.may_repeat());
    let again = (0..10).take_while(|_| {
        receiver.repeat_feedback();
        receiver.may_repeat()
    });
    assert_eq!(again.count(), 2, "not for ever");
    receiver.close(77, 1);
    assert!(!receiver.may_repeat());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever the wire does, and while the guest goes on writing, memory is equal in the end.
    #[test]
    fn memory_is_equal_whatever_the_wire_does(
        lose in 0u8..30, duplicate in 0u8..20, swap in 0u8..30, corrupt in 0u8..20,
        seed: u64,
        hashes: bool,
        huge: [bool; 2],
        packing in 0usize..3,
        mtu in prop_oneof![Just(1500usize), Just(9000), Just(65535)],
        writes in proptest::collection::vec((0u64..130, 0u8..4), 0..120),
    ) {
        let packings = match packing {
            0 => Packings::Never,
            1 => Packings::Always(Method::Lz4),
            _ => Packings::Always(Method::Zstd),
        };
        let faults = Faults { lose, duplicate, swap, corrupt };
        let mut stream = Stream::between(&[90, 40], huge, mtu, faults, seed, packings);
        stream.hashes = hashes.then(|| SentHashes::new(&stream.layout, 0..2));
        let write = |stream: &Stream, page: u64, value: u8| match page % 3 {
            0 => stream.write(page, value),
            1 => stream.write_text(page, value),
            _ => stream.write_noise(page, value),
        };
        (0..130).for_each(|page| write(&stream, page, (page % 7) as u8));
        let mut pending = stream.set(0..130);
        for batch in writes.chunks(30) {
            let again = stream.round(&pending);
            pending = stream.set(batch.iter().map(|&(page, _)| page));
            for &(page, value) in batch { write(&stream, page, value); }
            pending.union_with(&again);
        }
        stream.settle(pending);
        stream.assert_equal();
        let hashes = stream.inbound.hashes().unwrap();
        hashes.refresh(&stream.layout, stream.inbound.mappings()).unwrap();
        let fresh = crate::memory::PageHashes::zeroed(130);
        fresh.mark_all_stale(&stream.set(0..130));
        fresh.refresh(&stream.layout, &stream.source).unwrap();
        prop_assert_eq!(hashes.digest(), fresh.digest());
    }
}
