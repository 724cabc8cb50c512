//! Pages that are sent from where they lie.

use std::{os::fd::AsFd, sync::atomic::AtomicU32};

use rustix::net::xdp::{XdpDesc, XdpDescOptions};

use super::*;
use crate::{
    datapath::{DirectSink, LaidOut},
    xsk::{CHUNK_SIZE, Consumer, FilePart, JoinedMemory, Producer, TxQueue, Umem, ring_pair},
};

const SLOTS: u32 = 8;
const SLOT_CHUNKS: u32 = 3;

/// A direct sink and the kernel behind it, which reads frames late, and brings them to the receiver.
struct Kernel {
    sink: DirectSink,
    tx: Consumer<XdpDesc>,
    completion: Producer<u64>,
    umem: Umem,
    receiver: Arc<Mutex<Demux>>,
    /// Done before the first frame is read.
    before: Option<Box<dyn FnOnce() + Send>>,
    /// Descriptors of guest's RAM that were sent.
    direct: Arc<AtomicU32>,
    pages_at: u64,
}

impl FrameSink for Kernel {
    fn frame(&mut self, fill: impl FnOnce(&mut [u8]) -> usize) -> std::io::Result<bool> {
        self.sink.frame(fill)
    }

    fn flush(&mut self) -> std::io::Result<usize> {
        if let Some(before) = self.before.take() {
            before();
        }
        let mut frame = Vec::new();
        while let Some(descriptor) = self.tx.take() {
            frame.extend(self.umem.copy(descriptor.addr, descriptor.len as usize));
            self.direct.fetch_add(u32::from(descriptor.addr >= self.pages_at), Relaxed);
            assert!(self.completion.stage([descriptor.addr].into_iter()));
            if !descriptor.options.contains(XdpDescOptions::XDP_PKT_CONTD) {
                let pieces: Vec<&[u8]> = frame.chunks(3840).collect();
                let datagram = Datagram::in_ethernet(&Packet::new(&pieces), PORT);
                self.receiver.lock().unwrap().take(datagram.as_ref());
                frame.clear();
            }
        }
        assert!(frame.is_empty(), "no half a frame");
        self.tx.release();
        self.completion.publish();
        self.sink.flush()
    }

    fn direct(&mut self) -> Option<&mut DirectSink> {
        self.sink.direct()
    }
}

/// A guest of a chunk that is laid out and one with a hole, and a lane that sends it directly.
struct Direct {
    stream: Stream,
    sender: LaneSender<Kernel, Loop>,
    /// Pages sent from where they lie, so far.
    direct: Arc<AtomicU32>,
    epoch: u32,
}

impl Direct {
    fn new(before: Option<fn(&Mapping)>) -> Self {
        let stream = Stream::new(&[1024], 9000, Faults::default(), 0);
        (0..1024).filter(|page| page % 5 != 0).for_each(|page| stream.write(page, page as u8 | 1));
        let mut existing = stream.set(0..1024);
        existing.remove(600);
        let pages = LaidOut::of(&existing, &stream.layout);
        let file = stream.source[0].file();
        let part = FilePart { file: file.as_fd(), offset: 0, len: 512 * PAGE_SIZE };
        let memory = JoinedMemory::new((SLOTS * SLOT_CHUNKS) as usize * CHUNK_SIZE, &[part]).unwrap();
        let pages_at = memory.parts_at();
        let umem = Umem::over(Arc::new(memory)).unwrap();
        let (producer, tx) = ring_pair(32, XdpDesc { addr: 0, len: 0, options: XdpDescOptions::empty() });
        let (completion, consumer) = ring_pair(32, 0);
        let queue = TxQueue::new(producer, consumer, umem.clone(), 0, SLOTS, SLOT_CHUNKS, None);
        let guest = Mapping::new(file.try_clone().unwrap(), "guest".into(), Access::Write).unwrap();
        let direct = Arc::new(AtomicU32::new(0));
        let kernel = Kernel {
            sink: DirectSink::new(queue, pages, pages_at),
            tx,
            completion,
            umem,
            receiver: Arc::clone(&stream.receiver),
            before: before.map(|before| Box::new(move || before(&guest)) as Box<dyn FnOnce() + Send>),
            direct: Arc::clone(&direct),
            pages_at,
        };
        let end = |n: u8| Endpoint { mac: [2, 0, 0, 0, 0, n], ip: [10, 0, 0, n].into() };
        let config = LaneConfig {
            session: 77,
            lane: 0,
            frames: FrameLayout::new(9000, false, false).unwrap(),
            path: FramePath::new(end(1), end(2), 50_000, PORT),
            protection: Protection::Checksum,
            window: 10_000,
            bandwidth: Bandwidth::default(),
            packings: Packings::Never,
        };
        let sender = LaneSender::new(config, kernel, Loop::default());
        Self { stream, sender, direct, epoch: 0 }
    }

    /// Sends a round: the pages to send again, and how many were sent from where they lie.
    fn round(&mut self, pages: &PageSet) -> (PageSet, u32) {
        self.epoch += 1;
        let stream = &self.stream;
        let view =
            Pages { layout: &stream.layout, mappings: &stream.source, sent: &stream.sent, hashes: None };
        let (stop, progress) = (AtomicBool::new(false), AtomicU64::new(0));
        let sent = self.sender.send_round(self.epoch, view, pages.iter(), &stop, &progress).unwrap();
        assert_eq!(progress.into_inner(), pages.count());
        let received = stream.receiver.lock().unwrap().close(77, self.epoch);
        stream.inbound.reset_arrived();
        let mut again = PageSet::new(1024);
        for lost in losses(&[sent.frames], &received) {
            sent.lost_pages(&lost, pages, &mut again);
        }
        (again, self.direct.swap(0, Relaxed))
    }
}

#[test]
fn pages_go_from_where_they_lie_once() {
    let mut direct = Direct::new(None);
    let (again, taken) = direct.round(&direct.stream.set(0..1024));
    // A fifth of each chunk's pages are zero.
    assert_eq!((again.count(), taken), (0, 409), "and the second chunk is copied");
    direct.stream.assert_equal();
    direct.stream.write(7, 0);
    direct.stream.write(8, 99);
    let (again, taken) = direct.round(&direct.stream.set([7, 8]));
    assert_eq!((again.count(), taken), (0, 0), "what was written once is written again: it is copied");
    direct.stream.assert_equal();
}

/// What the guest writes while a frame is on its way is found by the frame's checksum, and copied the next time.
#[test]
fn a_page_that_changes_on_its_way_is_sent_again() {
    let mut direct = Direct::new(Some(|guest: &Mapping| guest.write(2, 100, b"written meanwhile")));
    let (again, _) = direct.round(&direct.stream.set(0..1024));
    assert!(again.iter().eq([1, 2]), "the page, and its neighbour in the frame: {again:?}");
    assert_eq!(direct.stream.inbound.figures()[0].corrupt, 1);
    assert_eq!(direct.round(&again), (PageSet::new(1024), 0));
    direct.stream.assert_equal();
}
