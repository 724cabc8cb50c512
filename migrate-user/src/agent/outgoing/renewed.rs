//! The pages of a round while the VM runs: what was written before it is read need not be sent again.

use std::ops::Range;

use crate::memory::{MemoryError, PageSet};

/// Pages for which it is found out at once what was written (8 MiB): one call of the kernel for so many that sending them takes
/// hundreds of times as long.
const STRETCH: u64 = 2048;

/// A part of a round's pages, ascending. Before the first of each stretch it takes what was written there: those pages are
/// about to be read, and their dirty bits say no more than that. **Clear before read** holds, for every page later than at the round's
/// begin. What was written there and is not of the round is kept for the next.
pub(super) struct Renewed<'a, I, T> {
    round: &'a PageSet,
    numbers: I,
    /// One past the last page of the part. Others send, and may have sent, what lies beyond.
    end: u64,
    /// What was written below is found out.
    known: u64,
    take_written: T,
    written: PageSet,
    failure: Option<MemoryError>,
}

impl<'a, T> Renewed<'a, (), T>
where
    T: FnMut(Range<u64>, &mut dyn FnMut(u64, u64)) -> Result<(), MemoryError>,
{
    /// The pages of `round` in `part`. `take_written` calls back with the pages of a range that were written since it was asked.
    pub(super) fn new(
        round: &'a PageSet,
        part: Range<u64>,
        take_written: T,
    ) -> Renewed<'a, impl Iterator<Item = u64> + 'a, T> {
        let end = part.end;
        let numbers = round.iter_from(part.start).take_while(move |&page| page < end);
        let written = PageSet::new(round.bound());
        Renewed { round, numbers, end, known: 0, take_written, written, failure: None }
    }
}

impl<I, T> Renewed<'_, I, T> {
    /// What was found written besides the round's pages.
    ///
    /// # Errors
    /// When it could not be found out; then not all pages were given.
    pub(super) fn finish(self) -> Result<PageSet, MemoryError> {
        self.failure.map_or(Ok(self.written), Err)
    }
}

impl<I, T> Iterator for Renewed<'_, I, T>
where
    I: Iterator<Item = u64>,
    T: FnMut(Range<u64>, &mut dyn FnMut(u64, u64)) -> Result<(), MemoryError>,
{
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        if self.failure.is_some() {
            return None;
        }
        let page = self.numbers.next()?;
        if page >= self.known {
            self.known = ((page / STRETCH + 1) * STRETCH).min(self.end);
            let (round, written) = (self.round, &mut self.written);
            // From `page` on: those of the round before it have been read.
            let taken = (self.take_written)(page..self.known, &mut |first, end| {
                (first..end).filter(|&page| !round.contains(page)).for_each(|page| written.insert(page));
            });
            if let Err(error) = taken {
                self.failure = Some(error);
                return None;
            }
        }
        Some(page)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 3 * STRETCH + 100;

    /// A guest whose pages are versions, and its dirty bits.
    struct Guest {
        versions: Vec<u32>,
        dirty: PageSet,
    }

    impl Guest {
        fn write(&mut self, page: u64) {
            self.versions[page as usize] += 1;
            self.dirty.insert(page);
        }
    }

    fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
        let mut set = PageSet::new(PAGES);
        pages.into_iter().for_each(|page| set.insert(page));
        set
    }

    proptest! {
        /// Whatever is written when, what the destination has is current, or known to be sent again. And what was written
        /// before it was read is not sent again.
        #[test]
        fn nothing_written_is_forgotten(
            round in proptest::collection::btree_set(0..PAGES, 1..300),
            // Before which of the pages that are given, and where.
            writes in proptest::collection::vec((0usize..300, 0..PAGES), 0..400),
            border in 0..PAGES,
            backwards: bool,
        ) {
            let round = set(round);
            let guest = RefCell::new(Guest { versions: vec![1; PAGES as usize], dirty: PageSet::new(PAGES) });
            let mut sent = vec![1; PAGES as usize];
            round.iter().for_each(|page| sent[page as usize] = 0);
            let mut left = PageSet::new(PAGES);
            let mut step = 0;
            // Of two lanes either may be done before the other begins.
            let mut parts = [0..border, border..PAGES];
            if backwards {
                parts.reverse();
            }
            for part in parts {
                let take = |stretch: Range<u64>, found: &mut dyn FnMut(u64, u64)| {
                    let mut guest = guest.borrow_mut();
                    for page in stretch {
                        if guest.dirty.contains(page) {
                            guest.dirty.remove(page);
                            found(page, page + 1);
                        }
                    }
                    Ok(())
                };
                let mut renewed = Renewed::new(&round, part, take);
                loop {
                    let page = renewed.next();
                    for &(_, page) in writes.iter().filter(|&&(when, _)| when == step) {
                        guest.borrow_mut().write(page);
                    }
                    step += 1;
                    let Some(page) = page else { break };
                    sent[page as usize] = guest.borrow().versions[page as usize];
                }
                left.union_with(&renewed.finish().unwrap());
            }
            let guest = guest.into_inner();
            left.union_with(&guest.dirty);
            for page in 0..PAGES {
                prop_assert!(left.contains(page) || sent[page as usize] == guest.versions[page as usize], "{page}");
            }
        }
    }

    #[test]
    fn what_was_written_before_it_is_read_is_not_left() {
        let round = set(10..2 * STRETCH);
        let mut asked = Vec::new();
        let mut renewed =
            Renewed::new(&round, 5..PAGES, |stretch: Range<u64>, found: &mut dyn FnMut(u64, u64)| {
                asked.push(stretch.clone());
                // Everything, also what is not of the round.
                found(stretch.start, stretch.end);
                Ok(())
            });
        assert!(renewed.by_ref().eq(10..2 * STRETCH));
        assert!(renewed.finish().unwrap().is_empty());
        assert_eq!(asked, [10..STRETCH, STRETCH..2 * STRETCH]);
        // Pages of no round are kept.
        let round = set([3, 7]);
        let all = |stretch: Range<u64>, found: &mut dyn FnMut(u64, u64)| {
            found(stretch.start, stretch.end);
            Ok(())
        };
        let mut renewed = Renewed::new(&round, 0..9, all);
        assert!(renewed.by_ref().eq([3, 7]));
        assert!(renewed.finish().unwrap().iter().eq([4, 5, 6, 8]));
    }

    #[test]
    fn what_cannot_be_found_out_ends_the_round() {
        let round = set(0..PAGES);
        let mut renewed =
            Renewed::new(&round, 0..PAGES, |stretch: Range<u64>, _: &mut dyn FnMut(u64, u64)| {
                if stretch.start < STRETCH {
                    return Ok(());
                }
                Err(MemoryError::Gone { pid: 1 })
            });
        assert_eq!(renewed.by_ref().count() as u64, STRETCH);
        assert!(renewed.next().is_none() && renewed.finish().is_err());
    }
}
