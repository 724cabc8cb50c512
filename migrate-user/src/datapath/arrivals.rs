//! What came of a migration: counted by each receive worker for itself, told after every batch, read by everybody.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::accounting::QueueFigures;

/// Most sender threads one migration may have.
pub(super) const MAX_LANES: u16 = 64;

/// Counted over all receive workers of one migration.
#[derive(Debug, Default)]
pub struct InboundCounters {
    /// Frames placed.
    pub frames: AtomicU64,
    /// Probe frames.
    pub probes: AtomicU64,
}

/// [`QueueFigures`] as they grow.
#[derive(Debug, Default)]
struct QueueCounters {
    frames: AtomicU64,
    reordered: AtomicU64,
    duplicates: AtomicU64,
    corrupt: AtomicU64,
    bad_tag: AtomicU64,
    stale: AtomicU64,
    malformed: AtomicU64,
}

/// What came of a lane in the open epoch, over all workers.
#[derive(Debug, Default)]
struct LaneArrivals {
    /// Frames; duplicates across workers count.
    received: AtomicU32,
    /// One past the highest number.
    end: AtomicU32,
}

/// What all workers have told.
pub(super) struct Arrivals {
    counters: InboundCounters,
    queues: Vec<QueueCounters>,
    lanes: [LaneArrivals; MAX_LANES as usize],
}

/// What one worker has counted and not yet told. Plain numbers, so that counters which all workers share are written once a
/// batch and not for every frame. On one core that made no difference that could be measured.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Frames by what became of them; the queue's number means nothing here.
    pub figures: QueueFigures,
    /// Probe frames.
    pub probes: u64,
}

impl Arrivals {
    /// Nothing has come to any of the queues, at least one.
    pub fn new(queues: u32) -> Self {
        Self {
            counters: InboundCounters::default(),
            queues: (0..queues.max(1)).map(|_| QueueCounters::default()).collect(),
            lanes: std::array::from_fn(|_| LaneArrivals::default()),
        }
    }

    /// How many queues there are.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// Over all workers.
    pub fn counters(&self) -> &InboundCounters {
        &self.counters
    }

    /// By queue.
    pub fn figures(&self) -> Vec<QueueFigures> {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let queues = self.queues.iter().zip(0..);
        let figures = queues.map(|(counters, queue)| QueueFigures {
            queue,
            frames: read(&counters.frames),
            reordered: read(&counters.reordered),
            duplicates: read(&counters.duplicates),
            corrupt: read(&counters.corrupt),
            bad_tag: read(&counters.bad_tag),
            stale: read(&counters.stale),
            malformed: read(&counters.malformed),
        });
        figures.collect()
    }

    /// Adds what the worker of `queue` has counted, and empties it.
    pub fn add(&self, queue: usize, tally: &mut Tally) {
        let Tally { figures, probes } = std::mem::take(tally);
        let counters = &self.queues[queue];
        for (counter, more) in [
            (&self.counters.frames, figures.frames),
            (&self.counters.probes, probes),
            (&counters.frames, figures.frames),
            (&counters.reordered, figures.reordered),
            (&counters.duplicates, figures.duplicates),
            (&counters.corrupt, figures.corrupt),
            (&counters.bad_tag, figures.bad_tag),
            (&counters.stale, figures.stale),
            (&counters.malformed, figures.malformed),
        ] {
            if more > 0 {
                counter.fetch_add(more, Ordering::Relaxed);
            }
        }
    }

    /// Adds `frames` frames of a lane, all placed, whose numbers are below `end`.
    pub fn add_lane(&self, lane: usize, frames: u32, end: u32) {
        let lane = &self.lanes[lane];
        // Release: whoever sees the count sees the pages.
        lane.end.fetch_max(end, Ordering::Release);
        lane.received.fetch_add(frames, Ordering::Release);
    }

    /// Frames of a lane in the open epoch, as far as they were told.
    pub fn received(&self, lane: usize) -> u32 {
        self.lanes[lane].received.load(Ordering::Relaxed)
    }

    /// Frames of the open epoch that arrived so far; a hint.
    pub fn arrived(&self) -> u64 {
        self.lanes.iter().map(|lane| u64::from(lane.received.load(Ordering::Acquire))).sum()
    }

    /// Whether the last of `frames` of every lane has come: what is missing then is lost or was overtaken.
    pub fn ends_seen(&self, frames: &[u32]) -> bool {
        self.lanes.iter().zip(frames).all(|(lane, &frames)| lane.end.load(Ordering::Acquire) >= frames)
    }

    /// Begins counting a new epoch. Call after all workers closed the old one.
    pub fn reset(&self) {
        for lane in &self.lanes {
            lane.received.store(0, Ordering::Release);
            lane.end.store(0, Ordering::Release);
        }
    }
}
