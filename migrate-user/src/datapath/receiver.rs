//! From frames to guest pages.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use migrate_common::{
    PAGE_SIZE,
    wire::{FrameHeader, FrameKind, PageDescriptor},
};

use super::{
    accounting::{FrameSet, QueueFigures},
    arrivals::{Arrivals, InboundCounters, MAX_LANES, Tally},
    behind::{Behind, Gathered},
    datagram::{Datagram, Pieces},
    feedback::{Feedback, FeedbackTx},
    frame::Frame,
    layout::FrameLayout,
    packing::{Codec, Unpacker},
    protection::{Opener, Protection, Unproved},
};
use crate::memory::{
    BackendPage, Mapping, MemoryError, PageHashes, RESERVE_CHUNK, RamLayout, Reservation, fence,
};
use crate::sync::lock;

/// How often the last feedback is said again while nothing comes.
const REPEATS: u32 = 3;

/// What a receiving migration consists of.
pub struct InboundSpec {
    /// Random number of the migration.
    pub session: u64,
    /// The guest's pages.
    pub layout: RamLayout,
    /// The waiting guest's RAM, one mapping per backend.
    pub mappings: Vec<Mapping>,
    /// What is reserved of it.
    pub reservations: Vec<Reservation>,
    /// How the peer cuts pages.
    pub frames: FrameLayout,
    /// How it guards frames.
    pub protection: Protection,
    /// Its sender threads, at most 64.
    pub lanes: u16,
    /// Whether to keep a hash of every page.
    pub hash: bool,
    /// Where feedback goes.
    pub feedback: Box<dyn FeedbackTx>,
    /// Frames after which feedback is sent also while more are waiting.
    pub feedback_every: u32,
    /// Queues of the NIC, each with a receive worker.
    pub queues: u32,
}

/// A receiving migration, shared by all receive workers.
pub struct Inbound {
    spec: InboundSpec,
    hashes: Option<PageHashes>,
    arrivals: Arrivals,
    failure: Mutex<Option<MemoryError>>,
    /// Set when nothing more is to be placed or reserved.
    closed: AtomicBool,
    max_sequence: u64,
}

impl Inbound {
    /// Prepares receiving.
    pub fn new(spec: InboundSpec) -> Arc<Self> {
        let pages = spec.layout.pages();
        Arc::new(Self {
            hashes: spec.hash.then(|| PageHashes::zeroed(pages)),
            arrivals: Arrivals::new(spec.queues),
            failure: Mutex::new(None),
            closed: AtomicBool::new(false),
            // Every page in frames of its own, and as many frames of zero runs.
            max_sequence: pages * (spec.frames.frames_per_page as u64 + 1) + 1,
            spec,
        })
    }

    /// Number of the migration.
    pub fn session(&self) -> u64 {
        self.spec.session
    }

    /// Whether so many frames of each lane can belong to one epoch.
    pub fn can_be(&self, frames: &[u32]) -> bool {
        frames.len() <= usize::from(self.lanes())
            && frames.iter().all(|&frames| u64::from(frames) <= self.max_sequence)
    }

    /// Sender threads.
    fn lanes(&self) -> u16 {
        self.spec.lanes.min(MAX_LANES)
    }

    /// The guest's pages.
    pub fn layout(&self) -> &RamLayout {
        &self.spec.layout
    }

    /// The guest's RAM.
    pub fn mappings(&self) -> &[Mapping] {
        &self.spec.mappings
    }

    /// Page hashes, when asked for.
    pub fn hashes(&self) -> Option<&PageHashes> {
        self.hashes.as_ref()
    }

    /// Counters.
    pub fn counters(&self) -> &InboundCounters {
        self.arrivals.counters()
    }

    /// What came to each queue so far.
    pub fn figures(&self) -> Vec<QueueFigures> {
        self.arrivals.figures()
    }

    /// Frames of the open epoch that arrived so far; a hint.
    pub fn arrived(&self) -> u64 {
        self.arrivals.arrived()
    }

    /// Whether the last of `frames` of every lane has come: what is missing then is lost or was overtaken.
    pub fn ends_seen(&self, frames: &[u32]) -> bool {
        self.arrivals.ends_seen(frames)
    }

    /// Begins counting a new epoch. Call after all workers closed the old one.
    pub fn reset_arrived(&self) {
        self.arrivals.reset();
    }

    /// The first failure to place a page, if any; takes it out.
    pub fn take_failure(&self) -> Option<MemoryError> {
        lock(&self.failure).take()
    }

    /// Takes the memory of `chunks` (numbers of [`RESERVE_CHUNK`] pages, ascending), until [`close`](Self::close). Runs beside the
    /// first round, a little ahead of its frames; several threads may share the chunks. A failure shows like one of placing a page.
    pub fn reserve(&self, chunks: impl Iterator<Item = u64>) {
        for chunk in chunks {
            let page = chunk * RESERVE_CHUNK;
            if self.closed.load(Ordering::Relaxed) || page >= self.spec.layout.pages() {
                return;
            }
            let at = self.spec.layout.locate(page);
            let backend = usize::from(at.backend);
            let (reservation, mapping) = (&self.spec.reservations[backend], &self.spec.mappings[backend]);
            if let Err(error) = reservation.cover(mapping, at.page) {
                return self.fail(error);
            }
        }
    }

    /// Whether any of the memory must be covered before pages are placed in it.
    pub fn must_reserve(&self) -> bool {
        self.spec.reservations.iter().any(Reservation::must_cover)
    }

    /// Ends [`reserve`](Self::reserve).
    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    fn fail(&self, error: MemoryError) {
        lock(&self.failure).get_or_insert(error);
    }

    /// Places `length` bytes from `offset` of a page on, all in one backend: at once, or as part of `behind`, when more is to be
    /// expected that follows them.
    fn place(
        &self,
        behind: &mut Behind,
        page: u64,
        offset: usize,
        length: usize,
        pieces: Pieces<'_>,
    ) -> Result<(), MemoryError> {
        let at = self.spec.layout.locate(page);
        let backend = usize::from(at.backend);
        let start = at.page * PAGE_SIZE as u64 + offset as u64;
        let reservation = &self.spec.reservations[backend];
        let gathered = Behind::takes(length) && reservation.by_write(start, length);
        if !gathered || !behind.is_followed_by(backend, start, length) {
            self.catch_up(behind)?;
        }
        if gathered {
            behind.add(backend, start, pieces);
            if behind.is_enough() && !reservation.is_written_to() {
                self.catch_up(behind)?;
            }
            return Ok(());
        }
        self.place_at(backend, start, length, pieces)
    }

    /// Places what is behind.
    fn catch_up(&self, behind: &mut Behind) -> Result<(), MemoryError> {
        let Some(Gathered { backend, start, bytes }) = behind.gathered() else { return Ok(()) };
        let placed = self.place_at(backend, start, bytes.len(), std::iter::once(bytes));
        behind.clear();
        placed
    }

    fn place_at<'a>(
        &self,
        backend: usize,
        start: u64,
        length: usize,
        pieces: impl Iterator<Item = &'a [u8]>,
    ) -> Result<(), MemoryError> {
        let mapping = &self.spec.mappings[backend];
        self.spec.reservations[backend].place(mapping, start, length, pieces)?;
        match &self.hashes {
            Some(hashes) => hashes.written(mapping, self.spec.layout.first_page(backend), start, length),
            None => Ok(()),
        }
    }

    fn clear(&self, first: u64, pages: u32) -> Result<(), MemoryError> {
        for page in first..first + u64::from(pages) {
            let at = self.spec.layout.locate(page);
            let backend = usize::from(at.backend);
            self.spec.reservations[backend].zero(&self.spec.mappings[backend], at.page)?;
            if let Some(hashes) = &self.hashes {
                hashes.mark_stale(page);
            }
        }
        Ok(())
    }

    fn tell(&self, epoch: u32, lane: usize, seen: u32) {
        let received = self.arrivals.received(lane);
        let session = self.spec.session;
        self.spec.feedback.send(Feedback { session, epoch, lane: lane as u16, seen, received });
    }
}

/// A descriptor whose bounds were checked against the guest.
enum Placement {
    /// Part of a page, or whole pages one behind the other in one backend.
    Data {
        page: u64,
        offset: usize,
        length: usize,
    },
    Zero {
        page: u64,
        pages: u32,
    },
}

/// The bytes that a frame's pages take, or `None` where a descriptor does not hold or disagrees with the header: a frame is
/// placed whole or not at all.
fn placed_bytes(layout: &RamLayout, frame: &Frame<'_>) -> Option<usize> {
    let (mut bytes, mut cleared) = (0, 0);
    for placement in placements(layout, frame) {
        match placement? {
            Placement::Data { length, .. } => bytes += length,
            // Every page at most once in an epoch: a small frame cannot ask for endless clearing.
            Placement::Zero { pages, .. } => cleared += u64::from(pages),
        }
    }
    let packed = Codec::of(frame.header.packing).is_some();
    let agrees = packed || bytes == frame.header.payload as usize;
    (agrees && cleared <= layout.pages()).then_some(bytes)
}

/// The placements of a frame whose descriptors hold, neighbouring pages as one.
fn runs(layout: &RamLayout, frame: &Frame<'_>) -> impl Iterator<Item = Placement> {
    let mut all = placements(layout, frame).flatten().peekable();
    std::iter::from_fn(move || {
        let placement = all.next()?;
        let Placement::Data { page, offset: 0, mut length } = placement else { return Some(placement) };
        let follows = |next: &Placement, length: usize| match *next {
            Placement::Data { page: number, offset, length: PAGE_SIZE } => {
                // Backends are numbered one behind the other, and are different files.
                offset == 0 && number == page + (length / PAGE_SIZE) as u64 && layout.locate(number).page > 0
            }
            _ => false,
        };
        while length.is_multiple_of(PAGE_SIZE) && all.next_if(|next| follows(next, length)).is_some() {
            length += PAGE_SIZE;
        }
        Some(Placement::Data { page, offset: 0, length })
    })
}

/// What the descriptors say, in order; `None` for one that does not hold or leaves the guest.
fn placements(layout: &RamLayout, frame: &Frame<'_>) -> impl Iterator<Item = Option<Placement>> {
    frame.descriptors().iter().map(|bytes| match PageDescriptor::parse(bytes).ok()? {
        PageDescriptor::Data { backend, page, offset, length } => {
            debug_assert!(usize::from(length) <= PAGE_SIZE);
            let page = layout.number(BackendPage { backend, page })?;
            Some(Placement::Data { page, offset: offset.into(), length: length.into() })
        }
        PageDescriptor::Zero { backend, page, pages } => {
            let last = page.checked_add(u64::from(pages) - 1)?;
            layout.number(BackendPage { backend, page: last })?;
            let page = layout.number(BackendPage { backend, page })?;
            Some(Placement::Zero { page, pages })
        }
    })
}

#[derive(Default)]
struct LaneProgress {
    received: FrameSet,
    /// Frames placed that nobody was told of.
    placed: u32,
    /// What the last feedback said.
    told: u32,
    /// How often it may yet be said again.
    repeats: u32,
}

/// One receive worker's part of a migration. Lives on the worker's thread: when [`close`](Self::close) returns, no
/// frame of that epoch is being placed here, nor ever will be.
pub struct SessionReceiver {
    inbound: Arc<Inbound>,
    queue: usize,
    open: u32,
    opener: Opener,
    unpacker: Unpacker,
    lanes: Vec<LaneProgress>,
    tally: Tally,
    /// What was counted and is not yet in its place.
    behind: Behind,
}

impl SessionReceiver {
    /// Begins with epoch 1 open, for a queue of the NIC.
    pub fn new(inbound: Arc<Inbound>, queue: u32) -> Self {
        let queue = (queue as usize).min(inbound.arrivals.queues() - 1);
        let opener = Opener::new(inbound.spec.protection.clone());
        let (unpacker, tally) = (Unpacker::default(), Tally::default());
        Self { inbound, queue, open: 1, opener, unpacker, lanes: Vec::new(), tally, behind: Behind::new() }
    }

    /// Counts a frame that says to be of this migration and does not hold.
    pub fn corrupt(&mut self) {
        self.tally.figures.corrupt += 1;
    }

    /// The migration.
    pub fn inbound(&self) -> &Arc<Inbound> {
        &self.inbound
    }

    /// Checks what guards a frame with this header and places its pages, or counts why not.
    ///
    /// # Errors
    /// When the guard does not hold.
    pub fn handle(&mut self, datagram: &Datagram<'_>, header: FrameHeader) -> Result<(), Unproved> {
        // Out of `self` for as long as `self` places what it opened.
        let mut opener = std::mem::take(&mut self.opener);
        let opened = opener.open(datagram, header, |frame| self.place(frame));
        self.opener = opener;
        match opened {
            Ok(()) => {}
            Err(Unproved::Corrupt) => self.tally.figures.corrupt += 1,
            Err(Unproved::BadTag) => self.tally.figures.bad_tag += 1,
        }
        opened
    }

    /// Places a proved frame's pages, or counts why not.
    fn place(&mut self, frame: &Frame<'_>) {
        let header = frame.header;
        let figures = &mut self.tally.figures;
        if header.kind == FrameKind::Probe {
            self.tally.probes += 1;
            return;
        }
        if header.epoch != self.open {
            figures.stale += 1;
            return;
        }
        if header.lane >= self.inbound.lanes() || u64::from(header.sequence) >= self.inbound.max_sequence {
            figures.malformed += 1;
            return;
        }
        let Some(len) = placed_bytes(&self.inbound.spec.layout, frame) else {
            figures.malformed += 1;
            return;
        };
        // All of it, before anything is placed.
        let unpacked = match Codec::of(header.packing) {
            None => None,
            Some(codec) => {
                let packed = frame.payload(0, header.payload as usize);
                match self.unpacker.unpack(codec, packed, len) {
                    Some(pages) => Some([pages]),
                    None => {
                        figures.malformed += 1;
                        return;
                    }
                }
            }
        };
        let payload = |at, len| match &unpacked {
            None => frame.payload(at, len),
            Some(pages) => Pieces::new(pages, at, len),
        };
        let lane = usize::from(header.lane);
        if lane >= self.lanes.len() {
            self.lanes.resize_with(lane + 1, LaneProgress::default);
        }
        let progress = &mut self.lanes[lane];
        let overtaken = header.sequence < progress.received.end();
        if !progress.received.insert(header.sequence) {
            figures.duplicates += 1;
            return;
        }
        figures.reordered += u64::from(overtaken);
        let mut at = 0;
        for placement in runs(&self.inbound.spec.layout, frame) {
            let placed = match placement {
                Placement::Data { page, offset, length } => {
                    let pieces = payload(at, length);
                    at += length;
                    self.inbound.place(&mut self.behind, page, offset, length, pieces)
                }
                Placement::Zero { page, pages } => {
                    let caught_up = self.inbound.catch_up(&mut self.behind);
                    caught_up.and_then(|()| self.inbound.clear(page, pages))
                }
            };
            if let Err(error) = placed {
                return self.inbound.fail(error);
            }
        }
        figures.frames += 1;
        progress.placed += 1;
    }

    /// Tells everybody here what came since the last time, all of which is in its place by then. Call after a batch.
    fn publish(&mut self) {
        if let Err(error) = self.inbound.catch_up(&mut self.behind) {
            self.inbound.fail(error);
        }
        fence();
        let arrivals = &self.inbound.arrivals;
        arrivals.add(self.queue, &mut self.tally);
        for (number, lane) in self.lanes.iter_mut().enumerate().filter(|(_, lane)| lane.placed > 0) {
            arrivals.add_lane(number, std::mem::take(&mut lane.placed), lane.received.end());
        }
    }

    /// Tells everybody here what came, and the sender how far its lanes got. Call after a batch; `idle` says that nothing more is
    /// waiting here. A lane of which nothing was in the batch is told all: it may have sent what its window allows, and wait.
    pub fn feedback(&mut self, idle: bool) {
        let still: u64 = (0..).zip(&self.lanes).map(|(lane, it)| u64::from(it.placed == 0) << lane).sum();
        self.publish();
        for (lane, progress) in self.lanes.iter_mut().enumerate() {
            let seen = progress.received.end();
            let news = seen - progress.told;
            let waits = idle || still >> lane & 1 == 1;
            if news >= self.inbound.spec.feedback_every || (waits && news > 0) {
                progress.told = seen;
                progress.repeats = REPEATS;
                self.inbound.tell(self.open, lane, seen);
            }
        }
    }

    /// Says the last feedback once more, in case it was lost: nobody else wakes a sender that waits for it. Call after
    /// a while without frames. Returns whether it is worth calling again.
    pub fn repeat_feedback(&mut self) -> bool {
        for (lane, progress) in self.lanes.iter_mut().enumerate().filter(|(_, lane)| lane.repeats > 0) {
            progress.repeats -= 1;
            self.inbound.tell(self.open, lane, progress.told);
        }
        self.may_repeat()
    }

    /// Whether there is feedback that may have been lost.
    pub fn may_repeat(&self) -> bool {
        self.lanes.iter().any(|lane| lane.repeats > 0)
    }

    /// Ends `epoch` and opens the next: returns the frames that arrived, by lane. An epoch that is not open
    /// yields nothing.
    pub fn close(&mut self, epoch: u32) -> Vec<FrameSet> {
        if epoch != self.open {
            return Vec::new();
        }
        self.publish();
        self.open += 1;
        std::mem::take(&mut self.lanes).into_iter().map(|lane| lane.received).collect()
    }
}

#[cfg(test)]
mod tests {
    use migrate_common::wire::{Guard, Packing};

    use super::*;

    #[derive(Clone, Default)]
    struct Told(Arc<Mutex<Vec<(u16, u32)>>>);

    impl FeedbackTx for Told {
        fn send(&self, feedback: Feedback) {
            lock(&self.0).push((feedback.lane, feedback.seen));
        }
    }

    #[test]
    fn a_lane_that_waits_beside_a_busy_one_is_told() {
        let told = Told::default();
        let inbound = Inbound::new(InboundSpec {
            session: 77,
            layout: RamLayout::new(vec![crate::memory::Backend { id: "ram".into(), size: 64 << 20 }]),
            mappings: Vec::new(),
            reservations: Vec::new(),
            frames: FrameLayout::new(9000, false, false).unwrap(),
            protection: Protection::Checksum,
            lanes: 2,
            hash: false,
            feedback: Box::new(told.clone()),
            feedback_every: 4,
            queues: 1,
        });
        let mut receiver = SessionReceiver::new(inbound, 0);
        let mut batch = |frames: &[(u16, u32)], idle| {
            for &(lane, sequence) in frames {
                let header = FrameHeader {
                    kind: FrameKind::Pages,
                    descriptors: 0,
                    session: 77,
                    epoch: 1,
                    lane,
                    sequence,
                    guard: Guard::Checksum,
                    packing: Packing::Plain,
                    payload: 0,
                    checksum: 0,
                };
                receiver.place(&Frame::new(header, &[], 0));
            }
            receiver.feedback(idle);
            std::mem::take(&mut *lock(&told.0))
        };
        let both = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3)];
        assert_eq!(batch(&both, false), [(1, 4)], "lane 0 goes on, as far as anybody knows");
        assert_eq!(batch(&[(1, 4)], false), [(0, 2)], "it does not");
        assert_eq!(batch(&[(1, 5)], false), [], "once is enough");
        assert_eq!(batch(&[], true), [(1, 6)]);
    }
}
