//! The whole page stream in memory: real sender, real receiver, a wire that drops, repeats, reorders and
//! corrupts, and no kernel.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use migrate_common::PAGE_SIZE;
use proptest::prelude::*;

use super::*;
use crate::{
    memory::{Access, AtomicPageSet, Backend, Mapping, PageSet, RamLayout, Reservation},
    xsk::Packet,
};

const PORT: u16 = 4791;

/// What the wire does to a frame, drawn from a seed.
#[derive(Clone, Copy, Debug, Default)]
struct Faults {
    lose: u8,
    duplicate: u8,
    swap: u8,
    corrupt: u8,
}

struct Wire {
    receiver: Arc<Mutex<Demux>>,
    faults: Faults,
    seed: u64,
    held: Option<Vec<u8>>,
    lost: u64,
}

impl Wire {
    fn chance(&mut self, percent: u8) -> bool {
        // xorshift64: any source of varied numbers will do.
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed % 100 < u64::from(percent)
    }

    fn deliver(&mut self, frame: &[u8]) {
        let cut = frame.len().min(3840);
        let pieces: Vec<&[u8]> =
            if cut < frame.len() { vec![&frame[..cut], &frame[cut..]] } else { vec![frame] };
        let mut receiver = self.receiver.lock().unwrap();
        let damaged = receiver.damaged().load(Relaxed);
        receiver.take(Datagram::in_ethernet(&Packet::new(&pieces), PORT).as_ref());
        receiver.feedback(true);
        self.lost += receiver.damaged().load(Relaxed) - damaged;
    }

    fn push(&mut self, mut frame: Vec<u8>) {
        if self.chance(self.faults.lose) {
            self.lost += 1;
            return;
        }
        if self.chance(self.faults.corrupt) {
            let at = 42 + (self.seed as usize) % (frame.len() - 42);
            frame[at] ^= 0x10;
        }
        if self.chance(self.faults.duplicate) {
            self.deliver(&frame);
        }
        if self.held.is_none() && self.chance(self.faults.swap) {
            self.held = Some(frame);
            return;
        }
        self.deliver(&frame);
        if let Some(held) = self.held.take() {
            self.deliver(&held);
        }
    }
}

struct WireSink {
    wire: Wire,
    capacity: usize,
}

impl FrameSink for WireSink {
    fn frame(&mut self, fill: impl FnOnce(&mut [u8]) -> usize) -> std::io::Result<bool> {
        // Old content, as in a reused slot: nothing may depend on zeroes.
        let mut buffer = vec![0xa5; self.capacity];
        let len = fill(&mut buffer);
        if len > 0 {
            buffer.truncate(len);
            self.wire.push(buffer);
        }
        Ok(true)
    }
    fn flush(&mut self) -> std::io::Result<usize> {
        Ok(0)
    }
}

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

fn ram(pages: u64) -> Mapping {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(pages * PAGE_SIZE as u64).unwrap();
    Mapping::new(file, "test".into(), Access::Write).unwrap()
}

struct Stream {
    layout: RamLayout,
    source: Vec<Mapping>,
    sent: AtomicPageSet,
    inbound: Arc<Inbound>,
    receiver: Arc<Mutex<Demux>>,
    sender: LaneSender<WireSink, Loop>,
    epoch: u32,
    stalls: u32,
}

impl Stream {
    fn new(backends: &[u64], mtu: usize, faults: Faults, seed: u64) -> Self {
        let layout = RamLayout::new(
            backends
                .iter()
                .enumerate()
                .map(|(n, pages)| Backend { id: format!("ram{n}"), size: pages * PAGE_SIZE as u64 })
                .collect(),
        );
        let frames = FrameLayout::new(mtu, false, false).unwrap();
        let mappings: Vec<Mapping> = backends.iter().map(|&pages| ram(pages)).collect();
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
        let config = LaneConfig {
            session: 77,
            lane: 0,
            frames,
            path: FramePath::new(end(1), end(2), 50_000, PORT),
            protection: protection(seed),
            window: 32,
            bandwidth: Bandwidth::default(),
        };
        let wire = Wire { receiver: Arc::clone(&receiver), faults, seed: seed | 1, held: None, lost: 0 };
        let sink = WireSink { wire, capacity: frames.frame_len };
        Self {
            sent: AtomicPageSet::new(layout.pages()),
            source: backends.iter().map(|&pages| ram(pages)).collect(),
            layout,
            inbound,
            receiver,
            sender: LaneSender::new(config, sink, feedback),
            epoch: 0,
            stalls: 0,
        }
    }

    fn write(&self, page: u64, value: u8) {
        let at = self.layout.locate(page);
        self.source[usize::from(at.backend)].write(at.page, 0, &[value; PAGE_SIZE]);
    }

    /// Sends a round and returns the pages to send again.
    fn round(&mut self, pages: &PageSet) -> PageSet {
        self.epoch += 1;
        let view = Pages { layout: &self.layout, mappings: &self.source, sent: &self.sent };
        let (stop, progress) = (AtomicBool::new(false), AtomicU64::new(0));
        let sent = self.sender.send_round(self.epoch, view, pages.iter(), &stop, &progress).unwrap();
        assert_eq!(progress.into_inner(), pages.count());
        self.stalls += sent.stalls;
        let received = self.receiver.lock().unwrap().close(77, self.epoch);
        self.inbound.reset_arrived();
        let mut again = PageSet::new(self.layout.pages());
        let mut lost_frames = 0;
        for lost in losses(&[sent.frames], &received) {
            sent.lost_pages(&lost, pages, &mut again);
            lost_frames += lost.frames();
        }
        self.sender.on_round(lost_frames);
        again
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
            self.source[usize::from(at.backend)].read(at.page, 0, &mut a);
            self.inbound.mappings()[usize::from(at.backend)].read(at.page, 0, &mut b);
            assert!(a == b, "page {page} differs: {} and {}", a[0], b[0]);
        }
        assert!(self.inbound.take_failure().is_none());
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

#[test]
fn frames_of_a_closed_epoch_are_never_placed() {
    let mut stream = Stream::new(&[4], 9000, Faults::default(), 1);
    stream.write(0, 1);
    let old = Arc::new(Mutex::new(Vec::new()));
    // Capture the frame of epoch 1 by sending it into a wire that holds it back.
    stream.sender = {
        let mut sender =
            std::mem::replace(&mut stream.sender, Stream::new(&[4], 9000, Faults::default(), 1).sender);
        let view = Pages { layout: &stream.layout, mappings: &stream.source, sent: &stream.sent };
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
    stream.receiver.lock().unwrap().take(Datagram::in_ethernet(&late, PORT).as_ref());
    assert_eq!(stream.inbound.figures()[0].stale, 1);
    stream.assert_equal();
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
    let view = Pages { layout: &stream.layout, mappings: &stream.source, sent: &stream.sent };
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
        mtu in prop_oneof![Just(1500usize), Just(9000), Just(65535)],
        writes in proptest::collection::vec((0u64..130, 0u8..4), 0..120),
    ) {
        let mut stream = Stream::new(&[90, 40], mtu, Faults { lose, duplicate, swap, corrupt }, seed);
        (0..130).for_each(|page| stream.write(page, (page % 7) as u8));
        let mut pending = stream.set(0..130);
        for batch in writes.chunks(30) {
            let again = stream.round(&pending);
            pending = stream.set(batch.iter().map(|&(page, _)| page));
            for &(page, value) in batch { stream.write(page, value); }
            pending.union_with(&again);
        }
        stream.settle(pending);
        stream.assert_equal();
        let hashes = stream.inbound.hashes().unwrap();
        hashes.refresh(&stream.layout, stream.inbound.mappings());
        let fresh = crate::memory::PageHashes::zeroed(130);
        fresh.mark_all_stale(&stream.set(0..130));
        fresh.refresh(&stream.layout, &stream.source);
        prop_assert_eq!(hashes.digest(), fresh.digest());
    }
}
