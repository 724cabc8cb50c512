//! From guest pages to frames.

use std::{
    iter::Peekable,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use migrate_common::{
    PAGE_SIZE,
    wire::{DESCRIPTOR_LEN, FrameHeader, FrameKind, Guard, HEADER_LEN, PageDescriptor, TAG_LEN},
};

use super::{
    accounting::LaneLosses,
    feedback::FeedbackRx,
    layout::FrameLayout,
    pacing::{Bandwidth, Pacer},
    path::FramePath,
    protection::{NonceReused, Protection, Sealer},
    sink::FrameSink,
    window::Window,
};
use crate::memory::{AtomicPageSet, BackendPage, Mapping, PageSet, RamLayout};

/// Silence after which the receiver is asked whether it is there. Longer than a scheduler's slice on a busy host.
const STALL: Duration = Duration::from_millis(40);
/// Silence after which the receiver is taken for gone.
const GONE: Duration = Duration::from_secs(3);
/// Longest way there and back that is believed: a receiver that was stopped for a while must not slow down the rest.
const LONGEST_TRANSIT: Duration = Duration::from_millis(200);

/// Why a round could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// Somebody asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// The link refused.
    #[error("the migration NIC does not take frames: {0}")]
    Link(#[from] std::io::Error),
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
}

/// The pages that one frame carried lie in `first..=last`.
#[derive(Clone, Copy, Debug)]
struct Span {
    first: u64,
    last: u64,
}

/// What one lane sent in a round.
#[derive(Debug, Default)]
pub struct LaneRound {
    /// Frames, numbered from 0.
    pub frames: u32,
    /// Pages sent with content.
    pub data_pages: u64,
    /// Zero pages, sent as runs or not at all.
    pub zero_pages: u64,
    /// Bytes on the wire, Ethernet headers included.
    pub wire_bytes: u64,
    /// Times the receiver was silent for too long.
    pub stalls: u32,
    spans: Vec<Span>,
}

impl LaneRound {
    /// Adds to `again` the pages of `round` that were in lost frames.
    pub fn lost_pages(&self, losses: &LaneLosses, round: &PageSet, again: &mut PageSet) {
        for &(start, end) in &losses.missing {
            for number in start..end.min(self.frames) {
                let Some(span) = self.spans.get(number as usize) else { continue };
                round
                    .iter_from(span.first)
                    .take_while(|&page| page <= span.last)
                    .for_each(|page| again.insert(page));
            }
        }
    }
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

/// How long it takes from a frame's sending until the receiver's word that it came is here: the longest of late.
#[derive(Debug, Default)]
struct Transit {
    longest: Duration,
    /// What is being measured: the number of frames seen that ends it, and its begin.
    timed: Option<(u32, Instant)>,
}

impl Transit {
    fn on_sent(&mut self, frames: u32) {
        if self.timed.is_none() {
            self.timed = Some((frames, Instant::now()));
        }
    }

    fn on_seen(&mut self, seen: u32) {
        if let Some((_, begun)) = self.timed.take_if(|(frames, _)| seen >= *frames) {
            self.longest = (self.longest * 7 / 8).max(begun.elapsed()).min(LONGEST_TRANSIT);
        }
    }
}

/// State of one round while it is being sent.
struct Round<'a> {
    epoch: u32,
    pages: Pages<'a>,
    stop: &'a AtomicBool,
    progress: &'a AtomicU64,
    zero_runs: Vec<(u64, u32)>,
    /// Highest frame number that feedback told, plus one.
    heard: u32,
    /// How long nothing was heard from the receiver while it was waited for.
    silent: Duration,
    result: LaneRound,
}

impl<S: FrameSink, F: FeedbackRx> LaneSender<S, F> {
    /// A lane over a link.
    pub fn new(config: LaneConfig, sink: S, feedback: F) -> Self {
        let window = Window::new(config.window);
        let pacer = Pacer::new(config.bandwidth.clone());
        let sealer = Sealer::new(config.protection.clone());
        Self { config, sink, feedback, window, pacer, transit: Transit::default(), sealer, probes: 0 }
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
        self.window.begin();
        self.transit.timed = None;
        let mut round = Round {
            epoch,
            pages,
            stop,
            progress,
            zero_runs: Vec::with_capacity(self.config.frames.zero_runs),
            heard: 0,
            silent: Duration::ZERO,
            result: LaneRound::default(),
        };
        let mut numbers = numbers.peekable();
        while numbers.peek().is_some() {
            if self.config.frames.frames_per_page == 1 {
                self.whole_pages(&mut round, &mut numbers)?;
            } else {
                self.fragments(&mut round, &mut numbers)?;
            }
            if round.zero_runs.len() >= self.config.frames.zero_runs {
                self.zero_frame(&mut round)?;
            }
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
        self.transit.longest
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
        let payload = frames.frame_len - frames.prefix - HEADER_LEN - TAG_LEN;
        for _ in 0..count {
            let number = FrameNumber { kind: FrameKind::Probe, epoch: 0, sequence: self.probes };
            self.probes += 1;
            self.queue(stop, number, |header, buffer| {
                buffer[body_at..body_at + payload].fill(0);
                header.payload = payload as u32;
                true
            })?;
        }
        while self.sink.flush()? > 0 {
            check(stop)?;
        }
        Ok(())
    }

    /// One frame of as many whole pages as fit.
    fn whole_pages(
        &mut self,
        round: &mut Round<'_>,
        numbers: &mut Peekable<impl Iterator<Item = u64>>,
    ) -> Result<(), SendError> {
        let capacity = self.config.frames.pages_per_frame;
        let zero_capacity = self.config.frames.zero_runs;
        let descriptors_at = self.config.path.len() + HEADER_LEN;
        let payload_at = descriptors_at + capacity * DESCRIPTOR_LEN;
        self.emit(round, |round, header, buffer| {
            let mut count = 0;
            while count < capacity && round.zero_runs.len() < zero_capacity {
                let Some(number) = numbers.next() else { break };
                let at = payload_at + count * PAGE_SIZE;
                if let Some(place) = round.take_page(number, &mut buffer[at..at + PAGE_SIZE]) {
                    let descriptor = PageDescriptor::Data {
                        backend: place.backend,
                        page: place.page,
                        offset: 0,
                        length: PAGE_SIZE as u16,
                    };
                    let at = descriptors_at + count * DESCRIPTOR_LEN;
                    buffer[at..at + DESCRIPTOR_LEN].copy_from_slice(&descriptor.to_bytes());
                    round.span(count == 0, number);
                    count += 1;
                }
            }
            if 0 < count && count < capacity {
                let shorter = descriptors_at + count * DESCRIPTOR_LEN;
                buffer.copy_within(payload_at..payload_at + count * PAGE_SIZE, shorter);
            }
            header.descriptors = count as u16;
            header.payload = (count * PAGE_SIZE) as u32;
        })
    }

    /// One page in as many frames as it takes.
    fn fragments(
        &mut self,
        round: &mut Round<'_>,
        numbers: &mut Peekable<impl Iterator<Item = u64>>,
    ) -> Result<(), SendError> {
        let Some(number) = numbers.next() else { return Ok(()) };
        let mut content = [0; PAGE_SIZE];
        let Some(place) = round.take_page(number, &mut content) else { return Ok(()) };
        let descriptor_at = self.config.path.len() + HEADER_LEN;
        let payload_at = descriptor_at + DESCRIPTOR_LEN;
        for (index, fragment) in content.chunks(self.config.frames.fragment).enumerate() {
            let descriptor = PageDescriptor::Data {
                backend: place.backend,
                page: place.page,
                offset: (index * self.config.frames.fragment) as u16,
                length: fragment.len() as u16,
            };
            self.emit(round, |round, header, buffer| {
                buffer[descriptor_at..payload_at].copy_from_slice(&descriptor.to_bytes());
                buffer[payload_at..payload_at + fragment.len()].copy_from_slice(fragment);
                round.span(true, number);
                header.descriptors = 1;
                header.payload = fragment.len() as u32;
            })?;
        }
        Ok(())
    }

    /// One frame with all zero runs collected so far.
    fn zero_frame(&mut self, round: &mut Round<'_>) -> Result<(), SendError> {
        let runs = std::mem::take(&mut round.zero_runs);
        let descriptors_at = self.config.path.len() + HEADER_LEN;
        self.emit(round, |round, header, buffer| {
            for (index, &(number, pages)) in runs.iter().enumerate() {
                let place = round.pages.layout.locate(number);
                let descriptor = PageDescriptor::Zero { backend: place.backend, page: place.page, pages };
                let at = descriptors_at + index * DESCRIPTOR_LEN;
                buffer[at..at + DESCRIPTOR_LEN].copy_from_slice(&descriptor.to_bytes());
                round.span(index == 0, number);
                round.span(false, number + u64::from(pages) - 1);
            }
            header.descriptors = runs.len() as u16;
            header.payload = 0;
        })
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
        let len = self.queue(stop, number, |header, buffer| {
            fill(round, header, buffer);
            header.descriptors > 0
        })?;
        if len == 0 {
            return Ok(());
        }
        round.result.frames += 1;
        round.result.wire_bytes += len as u64;
        self.window.on_sent();
        self.transit.on_sent(round.result.frames);
        let pause = self.pacer.on_sent(len, Instant::now());
        if !pause.is_zero() {
            self.pause(pause)?;
        }
        Ok(())
    }

    /// Lets `fill` write a frame's body behind the headers, completes the frame and queues it, unless `fill` says that there
    /// is nothing to send. Returns its length on the wire, bytes.
    fn queue(
        &mut self,
        stop: &AtomicBool,
        number: FrameNumber,
        fill: impl FnOnce(&mut FrameHeader, &mut [u8]) -> bool,
    ) -> Result<usize, SendError> {
        let mut header = FrameHeader {
            kind: number.kind,
            descriptors: 0,
            session: self.config.session,
            epoch: number.epoch,
            lane: self.config.lane,
            sequence: number.sequence,
            guard: Guard::Checksum,
            payload: 0,
            checksum: 0,
        };
        let (path, sealer) = (&self.config.path, &mut self.sealer);
        let mut completed = Ok(0);
        let mut fill = Some(fill);
        while !self.sink.frame(|buffer| {
            if let Some(fill) = fill.take()
                && fill(&mut header, buffer)
            {
                completed = sealer.complete(buffer, path, header);
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

    fn pause(&mut self, pause: Duration) -> Result<(), SendError> {
        // Sleeping has a granularity of about 50 µs; shorter debts are left to grow.
        if pause > Duration::from_micros(200) {
            self.sink.flush()?;
            std::thread::sleep(pause);
        }
        Ok(())
    }

    fn wait_for_room(&mut self, round: &mut Round<'_>) -> Result<(), SendError> {
        if self.window.open() {
            return Ok(());
        }
        self.hear(round, Duration::ZERO);
        let mut silent_since = Instant::now();
        let patience = STALL.max(self.transit.longest * 2);
        while !self.window.open() {
            check(round.stop)?;
            self.sink.flush()?;
            if self.hear(round, Duration::from_millis(1)) {
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
                self.window.on_seen(feedback.seen, feedback.received);
                self.transit.on_seen(feedback.seen);
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

impl Round<'_> {
    /// Copies a page into `to`; `None` when it turns out to be zero, which is noted instead.
    fn take_page(&mut self, number: u64, to: &mut [u8]) -> Option<BackendPage> {
        let place = self.pages.layout.locate(number);
        self.pages.mappings[usize::from(place.backend)].read(place.page, 0, to);
        self.progress.fetch_add(1, Ordering::Relaxed);
        if !is_zero(to) {
            self.pages.sent.insert(number);
            self.result.data_pages += 1;
            return Some(place);
        }
        self.result.zero_pages += 1;
        if self.pages.sent.contains(number) {
            match self.zero_runs.last_mut() {
                // Runs stay within one backend.
                Some((first, pages)) if *first + u64::from(*pages) == number && place.page > 0 => *pages += 1,
                _ => self.zero_runs.push((number, 1)),
            }
        }
        None
    }

    /// Notes that the frame being written carries page `number`.
    fn span(&mut self, first: bool, number: u64) {
        match self.result.spans.last_mut() {
            Some(span) if !first => span.last = number,
            _ => self.result.spans.push(Span { first: number, last: number }),
        }
    }
}

/// Whether all bytes are zero. Leaves at the first block that is not.
fn is_zero(page: &[u8]) -> bool {
    page.chunks(256).all(|block| block.iter().fold(0, |any, byte| any | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::is_zero;

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        let mut page = [0u8; 4096];
        assert!(is_zero(&page));
        for at in [0, 255, 256, 4095] {
            page[at] = 1;
            assert!(!is_zero(&page));
            page[at] = 0;
        }
    }
}
