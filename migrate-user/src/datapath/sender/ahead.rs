//! Pages of a round, read some at a time before they are made into frames.

use std::iter::Peekable;

use migrate_common::PAGE_SIZE;

use super::Pages;
use crate::memory::{BackendPage, MemoryError};

/// Pages read at once, at most. With as many the kernel's cost of a call is small beside that of copying, and they are still
/// in the cache when they are made into frames.
const AT_ONCE: usize = 16;

/// A page as it was read.
pub(super) struct ReadPage<'a> {
    /// In the guest's numbering.
    pub number: u64,
    /// Where it lies.
    pub place: BackendPage,
    /// All of its bytes.
    pub content: &'a [u8],
}

/// The pages that a lane sends in a round, ascending.
pub(super) struct Ahead<I: Iterator<Item = u64>> {
    numbers: Peekable<I>,
    /// What was read and not yet taken is `read[next..]`, each with its content at its index.
    read: Vec<(u64, BackendPage)>,
    next: usize,
    content: Vec<u8>,
}

impl<I: Iterator<Item = u64>> Ahead<I> {
    pub(super) fn new(numbers: I) -> Self {
        let content = vec![0; AT_ONCE * PAGE_SIZE];
        Self { numbers: numbers.peekable(), read: Vec::with_capacity(AT_ONCE), next: 0, content }
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

    /// Reads the next pages; those that follow each other by one call.
    fn fill(&mut self, pages: &Pages<'_>) -> Result<(), MemoryError> {
        self.read.clear();
        self.next = 0;
        while self.read.len() < AT_ONCE
            && let Some(first) = self.numbers.next()
        {
            let begin = self.read.len();
            let start = pages.layout.locate(first);
            self.read.push((first, start));
            while self.read.len() < AT_ONCE
                && let offset = (self.read.len() - begin) as u64
                && let place = (BackendPage { page: start.page + offset, ..start })
                && pages.layout.number(place) == self.numbers.peek().copied()
                && let Some(number) = self.numbers.next()
            {
                self.read.push((number, place));
            }
            let to = &mut self.content[begin * PAGE_SIZE..self.read.len() * PAGE_SIZE];
            pages.mappings[usize::from(start.backend)].read(start.page, 0, to)?;
        }
        Ok(())
    }
}
