//! From guest pages to frames.

mod ahead;
mod cutting;
mod direct;
mod packed;
mod round;
mod spans;
mod transit;

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use migrate_common::wire::{FrameHeader, FrameKind, Guard, HEADER_LEN, Packing};

use self::{ahead::Ahead, packed::Packs, round::Round, transit::Transit};
pub use self::{packed::Packed, round::LaneRound};
use super::{
    feedback::FeedbackRx,
    layout::FrameLayout,
    pacing::{Bandwidth, Pacer},
    packing::Packings,
    path::FramePath,
    protection::{NonceReused, Protection, Sealer},
    sink::FrameSink,
    unchanged::SentHashes,
    window::Window,
};
use crate::memory::{AtomicPageSet, Mapping, MemoryError, RamLayout};

/// Silence after which the receiver is asked whether it is there. Longer than a scheduler's slice on a busy host.
const STALL: Duration = Duration::from_millis(40);
/// Silence after which the receiver is taken for gone.
const GONE: Duration = Duration::from_secs(3);

/// Why a round could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// Somebody asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// The link refused.
    #[error("the migration NIC does not take frames: {0}")]
    Link(#[from] std::io::Error),
    /// The guest's memory could not be read.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A mistake in this program, found before it could do harm.
    #[error("this is a defect of xferry: {0}")]
    Numbering(#[from] NonceReused),
    /// The receiver says nothing.
    #[error(
        "the destination has not confirmed a page for {} s: is the migration network cut?",
        GONE.as_secs()
    )]
    Silent,
}

/// The guest's memory as senders see it.
#[derive(Clone, Copy)]
pub struct Pages<'a> {
    /// Numbering of the pages.
    pub layout: &'a RamLayout,
    /// The RAM, one mapping per backend.
    pub mappings: &'a [Mapping],
    /// Pages that were ever sent with content. A zero page not among them needs no frame.
    pub sent: &'a AtomicPageSet,
    /// Where hashes of what is sent are kept, if they are.
    pub hashes: Option<&'a SentHashes>,
}

/// What one lane needs to know.
#[derive(Clone)]
pub struct LaneConfig {
    /// Number of the migration.
    pub session: u64,
    /// Number of the lane.
    pub lane: u16,
    /// How pages are cut.
    pub frames: FrameLayout,
    /// Headers of its frames.
    pub path: FramePath,
    /// How frames are guarded.
    pub protection: Protection,
    /// Frames the receiver has room for.
    pub window: u32,
    /// Limit on the wire.
    pub bandwidth: Bandwidth,
    /// How its pages may be packed.
    pub packings: Packings,
}

/// One sender thread's end of the page stream.
pub struct LaneSender<S, F> {
    config: LaneConfig,
    sink: S,
    feedback: F,
    window: Window,
    pacer: Pacer,
    transit: Transit,
    sealer: Sealer,
    packs: Packs,
    /// Probe frames sent so far.
    probes: u32,
}

/// What tells a lane's frames apart.
#[derive(Clone, Copy)]
struct FrameNumber {
    kind: FrameKind,
    epoch: u32,
    sequence: u32,
}

impl<S: FrameSink, F: FeedbackRx> LaneSender<S, F> {
    /// A lane over a link.
    pub fn new(config: LaneConfig, sink: S, feedback: F) -> Self {
        let window = Window::new(config.window);
        let pacer = Pacer::new(config.bandwidth.clone());
        let sealer = Sealer::new(config.protection.clone());
        let packs = Packs::new(config.packings.clone(), config.frames.body_room(), config.window);
        Self { config, sink, feedback, window, pacer, transit: Transit::default(), sealer, packs, probes: 0 }
    }

    /// The link, for its owner.
    pub fn into_sink(self) -> S {
        self.sink
    }

    /// Sends `numbers` (ascending) under `epoch` and returns when all is on its way. `progress` counts pages.
    ///
    /// # Errors
    /// [`SendError`].
    pub fn send_round(
        &mut self,
        epoch: u32,
        pages: Pages<'_>,
        numbers: impl Iterator<Item = u64>,
        stop: &AtomicBool,
        progress: &AtomicU64,
    ) -> Result<LaneRound, SendError> {
        self.window.begin(Instant::now());
        self.transit.begin();
        let mut round = Round::new(epoch, pages, stop, progress);
        let mut source = Ahead::new(numbers, self.config.frames.pages_per_frame);
        self.packs.auto.begin(Instant::now());
        while !source.is_empty() {
            if let Some(method) = self.packs.auto.method() {
                self.packed_pages(&mut round, &mut source, method)?;
            } else if self.config.frames.frames_per_page == 1 {
                if !self.direct_pages(&mut round, &mut source)?
                    && !self.full_frame(&mut round, &mut source)?
                {
                    self.whole_pages(&mut round, &mut source)?;
                }
            } else {
                self.fragments(&mut round, &mut source)?;
            }
            if let Some(failure) = round.failure.take() {
                return Err(failure.into());
            }
            if round.zero_runs.len() >= self.config.frames.zero_runs {
                self.zero_frame(&mut round)?;
            }
            self.tell_auto(&mut round);
            round.tell_progress();
        }
        if !round.zero_runs.is_empty() {
            self.zero_frame(&mut round)?;
        }
        while self.sink.flush()? > 0 {
            check(stop)?;
            std::thread::yield_now();
        }
        self.hear(&mut round, Duration::ZERO);
        Ok(round.result)
    }

    /// How long frames take to the receiver, and its word of them back, at most of late.
    pub fn transit(&self) -> Duration {
        self.transit.longest()
    }

    /// The same at least, ever: where no frame met a queue. `None` before any was measured.
    pub fn way(&self) -> Option<Duration> {
        self.transit.shortest()
    }

    /// Tells the lane how many frames of its last round were lost.
    pub fn on_round(&mut self, lost: u64) {
        self.window.on_round(lost);
    }

    /// Sends `count` probe frames of full size.
    ///
    /// # Errors
    /// [`SendError`].
    pub fn probe(&mut self, frames: FrameLayout, count: u32, stop: &AtomicBool) -> Result<(), SendError> {
        let body_at = self.config.path.len() + HEADER_LEN;
        let payload = frames.body_room();
        for _ in 0..count {
            let number = FrameNumber { kind: FrameKind::Probe, epoch: 0, sequence: self.probes };
            self.probes += 1;
            self.queue(stop, number, |sealer, path, mut header, buffer| {
                buffer[body_at..body_at + payload].fill(0);
                header.payload = payload as u32;
                sealer.complete(buffer, path, header)
            })?;
        }
        while self.sink.flush()? > 0 {
            check(stop)?;
        }
        Ok(())
    }

    /// Waits for room, lets `fill` write descriptors and payload, completes and queues the frame. A frame left
    /// without descriptors is not sent.
    fn emit(
        &mut self,
        round: &mut Round<'_>,
        fill: impl FnOnce(&mut Round<'_>, &mut FrameHeader, &mut [u8]),
    ) -> Result<(), SendError> {
        self.wait_for_room(round)?;
        let stop = round.stop;
        let number =
            FrameNumber { kind: FrameKind::Pages, epoch: round.epoch, sequence: round.result.frames };
        let len = self.queue(stop, number, |sealer, path, mut header, buffer| {
            fill(round, &mut header, buffer);
            if header.descriptors > 0 { sealer.complete(buffer, path, header) } else { Ok(0) }
        })?;
        self.sent(round, len)
    }

    /// Counts a frame of `len` bytes on the wire; none when that is 0.
    fn sent(&mut self, round: &mut Round<'_>, len: usize) -> Result<(), SendError> {
        if len == 0 {
            return Ok(());
        }
        round.result.frames += 1;
        round.result.wire_bytes += len as u64;
        self.window.on_sent();
        self.transit.on_sent(round.result.frames);
        let pause = self.pacer.on_sent(len, Instant::now());
        self.pause(round, pause)
    }

    /// Lets `make` write a frame's body behind the headers and complete it, and queues the frame; `make` returns its length, 0 when
    /// there is nothing to send. Returns its length on the wire, bytes.
    fn queue(
        &mut self,
        stop: &AtomicBool,
        number: FrameNumber,
        make: impl FnOnce(&mut Sealer, &FramePath, FrameHeader, &mut [u8]) -> Result<usize, NonceReused>,
    ) -> Result<usize, SendError> {
        let header = self.header(number);
        let (path, sealer) = (&self.config.path, &mut self.sealer);
        let mut completed = Ok(0);
        let mut make = Some(make);
        while !self.sink.frame(|buffer| {
            if let Some(make) = make.take() {
                completed = make(sealer, path, header, buffer);
            }
            completed.unwrap_or(0)
        })? {
            check(stop)?;
            if self.sink.flush()? > 0 {
                std::thread::yield_now();
            }
        }
        // Whatever the sink takes, on the wire there are headers before it.
        Ok(match completed? {
            0 => 0,
            len => len - self.config.path.len() + self.config.frames.prefix,
        })
    }

    fn header(&self, number: FrameNumber) -> FrameHeader {
        FrameHeader {
            kind: number.kind,
            descriptors: 0,
            session: self.config.session,
            epoch: number.epoch,
            lane: self.config.lane,
            sequence: number.sequence,
            guard: Guard::Checksum,
            packing: Packing::Plain,
            payload: 0,
            checksum: 0,
        }
    }

    /// Rests for so long, and hears meanwhile what the receiver says: how long frames take is measured by when it is heard.
    fn pause(&mut self, round: &mut Round<'_>, pause: Duration) -> Result<(), SendError> {
        // Sleeping has a granularity of about 50 µs; shorter debts are left to grow.
        if pause <= Duration::from_micros(200) {
            return Ok(());
        }
        self.sink.flush()?;
        let end = Instant::now() + pause;
        // Whatever is no news may be there without end.
        while self.hear(round, end.saturating_duration_since(Instant::now())) {
            check(round.stop)?;
        }
        std::thread::sleep(end.saturating_duration_since(Instant::now()));
        Ok(())
    }

    fn wait_for_room(&mut self, round: &mut Round<'_>) -> Result<(), SendError> {
        if self.window.open() {
            return Ok(());
        }
        self.hear(round, Duration::ZERO);
        let mut silent_since = Instant::now();
        let patience = STALL.max(self.transit.longest() * 2);
        while !self.window.open() {
            check(round.stop)?;
            self.sink.flush()?;
            let heard = self.hear(round, Duration::from_millis(1));
            self.window.on_time(Instant::now());
            if heard {
                silent_since = Instant::now();
            } else if silent_since.elapsed() > patience {
                round.result.stalls += 1;
                round.silent += silent_since.elapsed();
                if round.silent > GONE {
                    return Err(SendError::Silent);
                }
                self.window.on_stall();
                silent_since = Instant::now();
            }
        }
        Ok(())
    }

    /// Takes in feedback, waiting at most `wait` for the first. Whether the receiver got on.
    fn hear(&mut self, round: &mut Round<'_>, wait: Duration) -> bool {
        let before = round.heard;
        let mut wait = wait;
        while let Some(feedback) = self.feedback.recv(wait) {
            if feedback.session == self.config.session
                && feedback.lane == self.config.lane
                && feedback.epoch == round.epoch
            {
                let now = Instant::now();
                self.transit.on_seen(feedback.seen, now);
                if let Some(shortest) = self.transit.shortest() {
                    self.window.on_way(shortest, self.transit.is_surely_long());
                }
                self.window.on_seen(feedback.seen, feedback.received, now);
                round.heard = round.heard.max(feedback.seen);
            }
            wait = Duration::ZERO;
        }
        if round.heard > before {
            round.silent = Duration::ZERO;
        }
        round.heard > before
    }
}

fn check(stop: &AtomicBool) -> Result<(), SendError> {
    if stop.load(Ordering::Relaxed) { Err(SendError::Cancelled) } else { Ok(()) }
}
