//! What a lane does in one round.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use migrate_common::PAGE_SIZE;

use super::{
    Packed, Pages,
    ahead::{Ahead, ReadPage},
    spans::Spans,
};
use crate::{
    datapath::{accounting::LaneLosses, packing::Work},
    memory::{BackendPage, MemoryError, PageSet, is_zero},
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
    /// Pages done by all lanes.
    progress: &'a AtomicU64,
    /// Pages of this lane in `progress`.
    done: u64,
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

impl<'a> Round<'a> {
    pub(super) fn new(epoch: u32, pages: Pages<'a>, stop: &'a AtomicBool, progress: &'a AtomicU64) -> Self {
        Self {
            epoch,
            pages,
            stop,
            progress,
            done: 0,
            zero_runs: Vec::new(),
            taken: Vec::new(),
            heard: 0,
            silent: Duration::ZERO,
            told: Work::default(),
            failure: None,
            result: LaneRound::default(),
        }
    }

    /// The next page of `source`; `None` when there is none, or it cannot be read: then [`failure`](Self::failure) says why.
    pub(super) fn read<'b>(
        &mut self,
        source: &'b mut Ahead<impl Iterator<Item = u64>>,
    ) -> Option<ReadPage<'b>> {
        source.take(&self.pages).unwrap_or_else(|error| {
            self.failure = Some(error);
            None
        })
    }

    /// Copies the next pages of `source` into `to`, as many as it has room for, and adds them to `taken`; less those that turn
    /// out to be zero, which are noted instead, in no more than `zero_runs` runs.
    pub(super) fn take_pages(
        &mut self,
        source: &mut Ahead<impl Iterator<Item = u64>>,
        to: &mut [u8],
        zero_runs: usize,
        taken: &mut Vec<(u64, BackendPage)>,
    ) {
        let mut room = to;
        while !room.is_empty() && self.zero_runs.len() < zero_runs {
            // Each may turn out to be a run.
            let most = (zero_runs - self.zero_runs.len()).min(room.len() / PAGE_SIZE);
            let begin = taken.len();
            if let Err(error) = source.take_into(&self.pages, &mut room[..most * PAGE_SIZE], taken) {
                self.failure = Some(error);
                taken.truncate(begin);
                return;
            }
            if taken.len() == begin {
                return;
            }
            let mut kept = begin;
            for index in begin..taken.len() {
                let (number, place) = taken[index];
                let at = (index - begin) * PAGE_SIZE;
                if self.judge(&ReadPage { number, place, content: &room[at..at + PAGE_SIZE] }) {
                    if kept < index {
                        room.copy_within(at..at + PAGE_SIZE, (kept - begin) * PAGE_SIZE);
                    }
                    taken[kept] = (number, place);
                    kept += 1;
                }
            }
            taken.truncate(kept);
            room = &mut room[(kept - begin) * PAGE_SIZE..];
        }
    }

    /// Notes what a page turned out to be that was read. Whether there is something in it.
    pub(super) fn judge(&mut self, page: &ReadPage<'_>) -> bool {
        let zero = is_zero(page.content);
        if let Some(hashes) = self.pages.hashes.filter(|_| !zero) {
            hashes.note(page.number, page.content);
        }
        self.note(page.number, page.place, zero)
    }

    /// Notes that a page is sent that is not zero, with this content, or with what is in memory.
    pub(super) fn sends(&mut self, number: u64, content: Option<&[u8]>) {
        if let Some((hashes, content)) = self.pages.hashes.zip(content) {
            hashes.note(number, content);
        }
        self.pages.sent.insert(number);
        self.result.data_pages += 1;
    }

    /// Notes what a page turned out to be. Whether there is something in it.
    pub(super) fn note(&mut self, number: u64, place: BackendPage, zero: bool) -> bool {
        if !zero {
            self.sends(number, None);
            return true;
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
        false
    }

    /// Adds to `progress` what was done since the last time.
    pub(super) fn tell_progress(&mut self) {
        let done = self.result.data_pages + self.result.zero_pages;
        let news = done - std::mem::replace(&mut self.done, done);
        self.progress.fetch_add(news, Ordering::Relaxed);
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
    use crate::memory::{Access, AtomicPageSet, Backend, Mapping, RamLayout};

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
            let mut source = Ahead::new([0, 1, 2, 3, 4, 5, 6, 7, 9, 10].into_iter(), 2);
            let mut came = Vec::new();
            while !source.is_empty() {
                let (mut to, mut taken) = (vec![0xa5; room * PAGE_SIZE], Vec::new());
                round.take_pages(&mut source, &mut to, 9, &mut taken);
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
    fn more_pages_than_are_read_at_once_come_in_order_each_with_its_content() {
        let pages = 100;
        let layout = RamLayout::new(vec![Backend { id: "ram".into(), size: pages * PAGE_SIZE as u64 }]);
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(layout.bytes()).unwrap();
        let mapping = Mapping::new(file, "ram of a test".into(), Access::Write).unwrap();
        (0..pages).for_each(|page| mapping.write(page, 0, &[page as u8 + 1; PAGE_SIZE]));
        let sent = AtomicPageSet::new(pages);
        let mappings = [mapping];
        let pages = Pages { layout: &layout, mappings: &mappings, sent: &sent, hashes: None };
        let (stop, progress) = (AtomicBool::new(false), AtomicU64::new(0));
        let mut round = Round::new(1, pages, &stop, &progress);
        // Runs of 5 to 33 pages, and gaps between them.
        let wanted: Vec<u64> = (0..100).filter(|page| ![5, 6, 12, 46, 60].contains(page)).collect();
        let mut source = Ahead::new(wanted.iter().copied(), 2);
        let mut came = Vec::new();
        while !source.is_empty() {
            let number = if came.len() % 7 == 3 {
                // As a page that goes from where it lies.
                source.take_number().unwrap()
            } else {
                let page = round.read(&mut source).unwrap();
                assert!(page.content.iter().all(|&byte| u64::from(byte) == page.number + 1));
                assert!(page.content.len() == PAGE_SIZE && page.place == layout.locate(page.number));
                page.number
            };
            came.push(number);
        }
        assert_eq!(came, wanted);
        assert!(round.read(&mut source).is_none() && round.failure.is_none());
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
        let mut source = Ahead::new(0..11, 2);
        round.take_pages(&mut source, &mut to, 2, &mut taken);
        assert_eq!(round.zero_runs.len(), 2);
        assert_eq!((taken.len(), source.take_number()), (1, Some(3)));
    }
}
