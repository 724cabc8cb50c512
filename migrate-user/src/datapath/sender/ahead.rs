//! Pages of a round, read some at a time: into the frame that takes them, or before they are made into frames.

use std::iter::Peekable;

use migrate_common::PAGE_SIZE;

use super::Pages;
use crate::memory::{BackendPage, MemoryError, PageBuffer, is_zero};

/// Pages read at once, at most, ahead of their frames: as many full frames as that makes. The kernel's cost of a call is small then beside
/// that of copying, and the pages are still in the cache when they are made into frames.
const AT_ONCE: usize = 16;
/// Pages that are read to where they are wanted: to read more at once spares less than copying them once more costs.
const ENOUGH: usize = 8;

/// A page as it was read.
pub(super) struct ReadPage<'a> {
    /// In the guest's numbering.
    pub number: u64,
    /// Where it lies.
    pub place: BackendPage,
    /// All of its bytes.
    pub content: &'a [u8],
}

/// Pages for a full frame, none of them zero.
pub(super) struct FullFrame<'a> {
    /// Their numbers, and where they lie.
    pub pages: &'a [(u64, BackendPage)],
    /// Their bytes, one behind the other; `None` when they are to be taken from the mapping where the first lies.
    pub content: Option<&'a [u8]>,
}

/// The pages that a lane sends in a round, ascending.
pub(super) struct Ahead<I: Iterator<Item = u64>> {
    numbers: Peekable<I>,
    /// What was read and not yet taken is `read[next..]`, each with its content at its index.
    read: Vec<(u64, BackendPage)>,
    next: usize,
    content: PageBuffer,
}

impl<I: Iterator<Item = u64>> Ahead<I> {
    /// For frames that take `per_frame` whole pages; 0 where a page takes several frames.
    pub(super) fn new(numbers: I, per_frame: usize) -> Self {
        let per_frame = per_frame.max(1);
        let at_once = per_frame * (AT_ONCE / per_frame).max(1);
        let content = PageBuffer::new(at_once);
        Self { numbers: numbers.peekable(), read: Vec::with_capacity(at_once), next: 0, content }
    }

    /// Whether all pages were taken.
    pub(super) fn is_empty(&mut self) -> bool {
        self.next == self.read.len() && self.numbers.peek().is_none()
    }

    /// Takes the next page, without its content.
    pub(super) fn take_number(&mut self) -> Option<u64> {
        match self.read.get(self.next) {
            Some(&(number, _)) => {
                self.next += 1;
                Some(number)
            }
            None => self.numbers.next(),
        }
    }

    /// Takes the next page of `pages`, which is the same memory every time.
    ///
    /// # Errors
    /// When memory cannot be read; the pages that should have been read are lost then.
    pub(super) fn take(&mut self, pages: &Pages<'_>) -> Result<Option<ReadPage<'_>>, MemoryError> {
        if self.next == self.read.len()
            && let Err(error) = self.fill(pages)
        {
            self.read.clear();
            return Err(error);
        }
        let Some(&(number, place)) = self.read.get(self.next) else { return Ok(None) };
        let content = &self.content[self.next * PAGE_SIZE..][..PAGE_SIZE];
        self.next += 1;
        Ok(Some(ReadPage { number, place, content }))
    }

    /// Takes the next `count` pages, for one full frame, with their content where it is now: as it was read ahead, or, if `mapped` allows
    /// that, in memory of huge pages, when they follow each other there. `None`, and nothing is taken, when there are not as many, or
    /// one of them is zero.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub(super) fn take_full(
        &mut self,
        pages: &Pages<'_>,
        count: usize,
        mapped: bool,
    ) -> Result<Option<FullFrame<'_>>, MemoryError> {
        if self.next == self.read.len() {
            if mapped && self.find_mapped(pages, count)? {
                return Ok(Some(FullFrame { pages: &self.read, content: None }));
            }
            if self.next == self.read.len() {
                self.fill(pages)?;
            }
        }
        let from = self.next;
        let until = from + count;
        if until > self.read.len() {
            return Ok(None);
        }
        let content = &self.content[from * PAGE_SIZE..until * PAGE_SIZE];
        if content.chunks_exact(PAGE_SIZE).any(is_zero) {
            return Ok(None);
        }
        self.next = until;
        Ok(Some(FullFrame { pages: &self.read[from..until], content: Some(content) }))
    }

    /// Looks whether the next `count` pages follow each other in memory of huge pages, and none is zero. Then they are taken, without
    /// their content; else they are read ahead.
    fn find_mapped(&mut self, pages: &Pages<'_>, count: usize) -> Result<bool, MemoryError> {
        let Some(&first) = self.numbers.peek() else { return Ok(false) };
        let start = pages.layout.locate(first);
        let mapping = &pages.mappings[usize::from(start.backend)];
        if !mapping.is_huge() || count * PAGE_SIZE > self.content.len() {
            return Ok(false);
        }
        self.read.clear();
        self.next = 0;
        let numbers = self.numbers.by_ref().take(count);
        self.read.extend(numbers.map(|number| (number, pages.layout.locate(number))));
        let follows = |(index, &(_, place)): (usize, &(u64, BackendPage))| {
            place == BackendPage { page: start.page + index as u64, ..start } && !mapping.is_zero(place.page)
        };
        if self.read.len() == count && self.read.iter().enumerate().all(follows) {
            self.next = count;
            return Ok(true);
        }
        for (&(_, place), to) in self.read.iter().zip(self.content.chunks_exact_mut(PAGE_SIZE)) {
            if let Err(error) = pages.mappings[usize::from(place.backend)].read(place.page, 0, to) {
                self.read.clear();
                return Err(error);
            }
        }
        Ok(false)
    }

    /// Copies the next pages into `to`, as many as it has room for or fewer, and adds them to `taken`: none when there are no more.
    /// `pages` is the same memory every time.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub(super) fn take_into(
        &mut self,
        pages: &Pages<'_>,
        to: &mut [u8],
        taken: &mut Vec<(u64, BackendPage)>,
    ) -> Result<(), MemoryError> {
        if self.next == self.read.len() {
            let Some(&number) = self.numbers.peek() else { return Ok(()) };
            let mapping = &pages.mappings[usize::from(pages.layout.locate(number).backend)];
            if to.len() >= ENOUGH * PAGE_SIZE || mapping.is_huge() {
                return read(&mut self.numbers, pages, to, taken);
            }
        }
        for to in to.chunks_exact_mut(PAGE_SIZE) {
            let Some(page) = self.take(pages)? else { break };
            to.copy_from_slice(page.content);
            taken.push((page.number, page.place));
        }
        Ok(())
    }

    /// Reads the next pages ahead.
    fn fill(&mut self, pages: &Pages<'_>) -> Result<(), MemoryError> {
        self.read.clear();
        self.next = 0;
        read(&mut self.numbers, pages, &mut self.content, &mut self.read)
    }
}

/// Copies the pages with the next `numbers` into `to`, as many as it has room for, and adds them to `taken`. Those that follow
/// each other are read by one call.
fn read(
    numbers: &mut Peekable<impl Iterator<Item = u64>>,
    pages: &Pages<'_>,
    mut to: &mut [u8],
    taken: &mut Vec<(u64, BackendPage)>,
) -> Result<(), MemoryError> {
    while to.len() >= PAGE_SIZE
        && let Some(first) = numbers.next()
    {
        let start = pages.layout.locate(first);
        taken.push((first, start));
        let mut bytes = PAGE_SIZE;
        while bytes + PAGE_SIZE <= to.len()
            && let place = (BackendPage { page: start.page + (bytes / PAGE_SIZE) as u64, ..start })
            && pages.layout.number(place) == numbers.peek().copied()
            && let Some(number) = numbers.next()
        {
            taken.push((number, place));
            bytes += PAGE_SIZE;
        }
        let (run, rest) = to.split_at_mut(bytes);
        pages.mappings[usize::from(start.backend)].read(start.page, 0, run)?;
        to = rest;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Access, AtomicPageSet, Backend, Mapping, RamLayout};

    #[test]
    fn full_frames_are_of_pages_read_ahead_or_of_a_run_in_huge_pages() {
        let sizes = [20u64, 12];
        let layout = RamLayout::new(
            sizes.map(|pages| Backend { id: "ram".into(), size: pages * PAGE_SIZE as u64 }).into(),
        );
        for huge in [true, false] {
            let mappings = sizes.map(|pages| {
                let file = tempfile::tempfile_in("/dev/shm").unwrap();
                file.set_len(pages * PAGE_SIZE as u64).unwrap();
                Mapping::new(file, "ram of a test".into(), Access::Write).unwrap().taken_for_huge(huge)
            });
            for number in (0..32).filter(|&number| number != 9) {
                let place = layout.locate(number);
                mappings[usize::from(place.backend)].write(place.page, 0, &[number as u8 + 1; PAGE_SIZE]);
            }
            let sent = AtomicPageSet::new(32);
            let pages = Pages { layout: &layout, mappings: &mappings, sent: &sent, hashes: None };
            // 9 is zero, 14 is not of the round, and the second backend begins with 20.
            let mut source = Ahead::new((0..32).filter(|&number| number != 14), 4);
            let (mut lying, mut read, mut came) = (Vec::new(), Vec::new(), Vec::new());
            while !source.is_empty() {
                if let Some(full) = source.take_full(&pages, 4, huge).unwrap() {
                    assert_eq!(full.pages.len(), 4);
                    for (index, &(number, place)) in full.pages.iter().enumerate() {
                        assert_eq!(place, layout.locate(number));
                        let page = full.content.map(|content| &content[index * PAGE_SIZE..][..PAGE_SIZE]);
                        assert!(page.is_none_or(|page| page.iter().all(|&byte| byte == number as u8 + 1)));
                        came.push(number);
                    }
                    if full.content.is_some() { &mut read } else { &mut lying }.push(full.pages[0].0);
                    continue;
                }
                let (mut to, mut taken) = ([0; 4 * PAGE_SIZE], Vec::new());
                source.take_into(&pages, &mut to, &mut taken).unwrap();
                for (&(number, place), content) in taken.iter().zip(to.chunks(PAGE_SIZE)) {
                    let expected = if number == 9 { 0 } else { number as u8 + 1 };
                    assert!(content.iter().all(|&byte| byte == expected), "{number}");
                    assert_eq!(place, layout.locate(number));
                    came.push(number);
                }
            }
            assert!(came.iter().copied().eq((0..32).filter(|&number| number != 14)), "{came:?}");
            // 8 to 11 hold a zero page, 12 to 16 have a gap, 17 to 20 are in two backends, and 29 to 31 are too few.
            let expected: [&[u64]; 2] =
                if huge { [&[0, 4, 21, 25], &[12, 17]] } else { [&[], &[0, 4, 12, 17, 21, 25]] };
            assert_eq!([&lying[..], &read], expected);
        }
    }
}
