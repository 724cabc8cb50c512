//! What a lane does in one round.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use super::{Packed, Pages, spans::Spans};
use crate::{
    datapath::{accounting::LaneLosses, packing::Work},
    memory::{BackendPage, PageSet, is_zero},
};

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
    /// What of it was packed.
    pub packed: Packed,
    spans: Spans,
}

impl LaneRound {
    /// Adds to `again` the pages of `round` that were in lost frames.
    pub fn lost_pages(&self, losses: &LaneLosses, round: &PageSet, again: &mut PageSet) {
        let mut missing = losses.missing.iter().copied().peekable();
        for (number, (first, last)) in (0..self.frames).zip(self.spans.iter()) {
            // Ranges are ascending, as frames are.
            while missing.next_if(|&(_, end)| end <= number).is_some() {}
            match missing.peek() {
                None => return,
                Some(&(start, _)) if number < start => {}
                Some(_) => {
                    round
                        .iter_from(first)
                        .take_while(|&page| page <= last)
                        .for_each(|page| again.insert(page));
                }
            }
        }
    }
}

/// State of one round while it is being sent.
pub(super) struct Round<'a> {
    pub(super) epoch: u32,
    pub(super) pages: Pages<'a>,
    pub(super) stop: &'a AtomicBool,
    pub(super) progress: &'a AtomicU64,
    pub(super) zero_runs: Vec<(u64, u32)>,
    /// Pages of the frame that is being made of pages where they lie.
    pub(super) places: Vec<BackendPage>,
    /// Highest frame number that feedback told, plus one.
    pub(super) heard: u32,
    /// How long nothing was heard from the receiver while it was waited for.
    pub(super) silent: Duration,
    /// What the policy of packing was told.
    pub(super) told: Work,
    pub(super) result: LaneRound,
}

impl<'a> Round<'a> {
    pub(super) fn new(epoch: u32, pages: Pages<'a>, stop: &'a AtomicBool, progress: &'a AtomicU64) -> Self {
        Self {
            epoch,
            pages,
            stop,
            progress,
            zero_runs: Vec::new(),
            places: Vec::new(),
            heard: 0,
            silent: Duration::ZERO,
            told: Work::default(),
            result: LaneRound::default(),
        }
    }

    /// Copies a page into `to`; `None` when it turns out to be zero, which is noted instead.
    pub(super) fn take_page(&mut self, number: u64, to: &mut [u8]) -> Option<BackendPage> {
        let place = self.pages.layout.locate(number);
        self.pages.mappings[usize::from(place.backend)].read(place.page, 0, to);
        let zero = is_zero(to);
        if let Some(hashes) = self.pages.hashes.filter(|_| !zero) {
            hashes.note(number, to);
        }
        self.note(number, place, zero)
    }

    /// Notes what a page turned out to be: `None` when zero.
    pub(super) fn note(&mut self, number: u64, place: BackendPage, zero: bool) -> Option<BackendPage> {
        self.progress.fetch_add(1, Ordering::Relaxed);
        if !zero {
            self.pages.sent.insert(number);
            self.result.data_pages += 1;
            return Some(place);
        }
        self.result.zero_pages += 1;
        if let Some(hashes) = self.pages.hashes {
            hashes.note_zero(number);
        }
        if self.pages.sent.contains(number) {
            match self.zero_runs.last_mut() {
                // Runs stay within one backend.
                Some((first, pages)) if *first + u64::from(*pages) == number && place.page > 0 => *pages += 1,
                _ => self.zero_runs.push((number, 1)),
            }
        }
        None
    }

    /// Notes that the frame being written carries page `number`; `first` is true for the first of its pages.
    pub(super) fn span(&mut self, first: bool, number: u64) {
        if first {
            self.result.spans.begin(number);
        } else {
            self.result.spans.extend(number);
        }
    }
}
