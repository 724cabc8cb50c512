//! What a lane does in one round.

use std::{
    iter::Peekable,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use migrate_common::PAGE_SIZE;

use super::{Packed, Pages, spans::Spans};
use crate::{
    datapath::{accounting::LaneLosses, packing::Work},
    memory::{BackendPage, MemoryError, PageSet, RamLayout, is_zero},
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
    /// Pages of the frame that is being made.
    pub(super) taken: Vec<(u64, BackendPage)>,
    /// Highest frame number that feedback told, plus one.
    pub(super) heard: u32,
    /// How long nothing was heard from the receiver while it was waited for.
    pub(super) silent: Duration,
    /// What the policy of packing was told.
    pub(super) told: Work,
    /// Why a page could not be read: the round is over.
    pub(super) failure: Option<MemoryError>,
    pub(super) result: LaneRound,
}

/// The next of `numbers` that follow each other in one backend: the first, and how many, `most` at most.
fn next_run(
    numbers: &mut Peekable<impl Iterator<Item = u64>>,
    layout: &RamLayout,
    most: usize,
) -> Option<(u64, usize)> {
    let first = numbers.next_if(|_| most > 0)?;
    let backend = layout.locate(first).backend;
    let mut pages = 1;
    while pages < most
        && let next = first + pages as u64
        && numbers.next_if(|&number| number == next && layout.locate(next).backend == backend).is_some()
    {
        pages += 1;
    }
    Some((first, pages))
}

impl<'a> Round<'a> {
    pub(super) fn new(epoch: u32, pages: Pages<'a>, stop: &'a AtomicBool, progress: &'a AtomicU64) -> Self {
        Self {
            epoch,
            pages,
            stop,
            progress,
            zero_runs: Vec::new(),
            taken: Vec::new(),
            heard: 0,
            silent: Duration::ZERO,
            told: Work::default(),
            failure: None,
            result: LaneRound::default(),
        }
    }

    /// Copies a page into `to`; `None` when it turns out to be zero, which is noted instead, or cannot be read.
    pub(super) fn take_page(&mut self, number: u64, to: &mut [u8]) -> Option<BackendPage> {
        let place = self.pages.layout.locate(number);
        if self.read(place, to) { self.judge(number, place, to) } else { None }
    }

    /// Copies the next of `numbers` into `to`, as many as it has room for, and adds them to `taken`; less those that turn out to
    /// be zero, which are noted instead, in no more than `zero_runs` runs. Pages that follow each other are read at once.
    pub(super) fn take_pages(
        &mut self,
        numbers: &mut Peekable<impl Iterator<Item = u64>>,
        to: &mut [u8],
        zero_runs: usize,
        taken: &mut Vec<(u64, BackendPage)>,
    ) {
        let room = to.len() / PAGE_SIZE;
        while taken.len() < room {
            let most = (room - taken.len()).min(zero_runs.saturating_sub(self.zero_runs.len()));
            let Some((first, pages)) = next_run(numbers, self.pages.layout, most) else { return };
            let place = self.pages.layout.locate(first);
            let at = taken.len() * PAGE_SIZE;
            if !self.read(place, &mut to[at..at + pages * PAGE_SIZE]) {
                return;
            }
            for index in 0..pages {
                let from = at + index * PAGE_SIZE;
                let number = first + index as u64;
                let place = BackendPage { page: place.page + index as u64, ..place };
                let Some(place) = self.judge(number, place, &to[from..from + PAGE_SIZE]) else { continue };
                // Only behind a zero page is there anything to close up.
                if taken.len() * PAGE_SIZE < from {
                    to.copy_within(from..from + PAGE_SIZE, taken.len() * PAGE_SIZE);
                }
                taken.push((number, place));
            }
        }
    }

    /// Reads what lies from `place` on. Whether it could; if not, [`failure`](Self::failure) says why.
    fn read(&mut self, place: BackendPage, to: &mut [u8]) -> bool {
        let read = self.pages.mappings[usize::from(place.backend)].read(place.page, 0, to);
        self.failure = self.failure.take().or(read.err());
        self.failure.is_none()
    }

    /// Notes what a page turned out to be that was copied: `None` when zero.
    fn judge(&mut self, number: u64, place: BackendPage, content: &[u8]) -> Option<BackendPage> {
        let zero = is_zero(content);
        if let Some(hashes) = self.pages.hashes.filter(|_| !zero) {
            hashes.note(number, content);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Access, AtomicPageSet, Backend, Mapping};

    /// Two backends of 5 and 6 pages; page n is full of n + 1, or zero.
    fn guest(zeros: &[u64]) -> (RamLayout, Vec<Mapping>) {
        let layout = RamLayout::new(
            [5, 6].map(|pages| Backend { id: "ram".into(), size: pages * PAGE_SIZE as u64 }).into(),
        );
        let mappings: Vec<_> = [5, 6]
            .map(|pages| {
                let file = tempfile::tempfile_in("/dev/shm").unwrap();
                file.set_len(pages * PAGE_SIZE as u64).unwrap();
                Mapping::new(file, "ram of a test".into(), Access::Write).unwrap()
            })
            .into();
        for number in (0..11).filter(|number| !zeros.contains(number)) {
            let at = layout.locate(number);
            mappings[usize::from(at.backend)].write(at.page, 0, &[number as u8 + 1; PAGE_SIZE]);
        }
        (layout, mappings)
    }

    #[test]
    fn pages_are_taken_in_order_across_backends_gaps_and_zeros() {
        let (layout, mappings) = guest(&[2, 6, 7]);
        let sent = AtomicPageSet::new(11);
        (0..11).for_each(|page| sent.insert(page));
        let pages = Pages { layout: &layout, mappings: &mappings, sent: &sent, hashes: None };
        let (stop, progress) = (AtomicBool::new(false), AtomicU64::new(0));
        for room in 1..12 {
            let mut round = Round::new(1, pages, &stop, &progress);
            let mut numbers = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10].into_iter().peekable();
            let mut came = Vec::new();
            while numbers.peek().is_some() {
                let (mut to, mut taken) = (vec![0xa5; room * PAGE_SIZE], Vec::new());
                round.take_pages(&mut numbers, &mut to, 9, &mut taken);
                for (&(number, place), content) in taken.iter().zip(to.chunks(PAGE_SIZE)) {
                    assert_eq!(place, layout.locate(number));
                    assert!(content.iter().all(|&byte| u64::from(byte) == number + 1), "{number}, {room}");
                    came.push(number);
                }
            }
            assert_eq!(came, [0, 1, 3, 4, 5, 9, 10], "room for {room}");
            assert_eq!(round.zero_runs, [(2, 1), (6, 2)]);
            assert_eq!((round.result.data_pages, round.result.zero_pages), (7, 3));
        }
    }

    #[test]
    fn no_more_zero_runs_than_there_is_room_for() {
        let (layout, mappings) = guest(&[0, 2, 4, 6, 8, 10]);
        let sent = AtomicPageSet::new(11);
        (0..11).for_each(|page| sent.insert(page));
        let pages = Pages { layout: &layout, mappings: &mappings, sent: &sent, hashes: None };
        let (stop, progress) = (AtomicBool::new(false), AtomicU64::new(0));
        let mut round = Round::new(1, pages, &stop, &progress);
        let (mut to, mut taken) = (vec![0; 11 * PAGE_SIZE], Vec::new());
        let mut numbers = (0..11).peekable();
        round.take_pages(&mut numbers, &mut to, 2, &mut taken);
        assert_eq!(round.zero_runs.len(), 2);
        assert_eq!((taken.len(), numbers.next()), (1, Some(3)));
    }
}
