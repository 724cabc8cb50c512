//! Sets of pages.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

/// A set of page numbers below a fixed bound, one bit each.
#[derive(Clone, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl std::fmt::Debug for PageSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PageSet({} of {})", self.count(), self.pages)
    }
}

impl PageSet {
    /// The empty set over pages `0..pages`.
    pub fn new(pages: u64) -> Self {
        Self { words: vec![0; pages.div_ceil(64) as usize], pages }
    }

    /// Bound of the page numbers.
    pub fn bound(&self) -> u64 {
        self.pages
    }

    /// Adds one page. Numbers beyond the bound are ignored.
    pub fn insert(&mut self, page: u64) {
        if page < self.pages {
            self.words[(page / 64) as usize] |= 1 << (page % 64);
        }
    }

    /// Adds `start..end`, cut to the bound.
    pub fn insert_range(&mut self, start: u64, end: u64) {
        let end = end.min(self.pages);
        let mut page = start;
        while page < end {
            let word = (page / 64) as usize;
            let last = end.min((page / 64 + 1) * 64);
            let bits = last - page;
            let mask = if bits == 64 { u64::MAX } else { ((1u64 << bits) - 1) << (page % 64) };
            self.words[word] |= mask;
            page = last;
        }
    }

    /// Removes one page.
    pub fn remove(&mut self, page: u64) {
        if page < self.pages {
            self.words[(page / 64) as usize] &= !(1 << (page % 64));
        }
    }

    /// Whether `page` is in the set.
    pub fn contains(&self, page: u64) -> bool {
        page < self.pages && self.words[(page / 64) as usize] & (1 << (page % 64)) != 0
    }

    /// Adds all pages of `other`.
    ///
    /// # Panics
    /// When the bounds differ: the sets are of different guests.
    pub fn union_with(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "sets of different guests");
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
    }

    /// Number of pages in the set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether the set has no page.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// The pages in ascending order, from `from` on.
    pub fn iter_from(&self, from: u64) -> impl Iterator<Item = u64> + '_ {
        let first = (from / 64) as usize;
        let low = from % 64;
        self.words.iter().enumerate().skip(first).flat_map(move |(index, &word)| {
            let mut rest = if index == first { word & (u64::MAX << low) } else { word };
            std::iter::from_fn(move || {
                if rest == 0 {
                    return None;
                }
                let bit = rest.trailing_zeros();
                rest &= rest - 1;
                Some(index as u64 * 64 + u64::from(bit))
            })
        })
    }

    /// The pages in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.iter_from(0)
    }

    /// Cuts the set into `parts` ranges of page numbers, each with about as many pages of the set: `parts + 1` borders.
    pub fn shares(&self, parts: usize) -> Vec<u64> {
        let share = self.count().div_ceil(parts.max(1) as u64).max(1);
        let mut borders = vec![0];
        let mut before = 0;
        for (index, word) in self.words.iter().enumerate() {
            let within = u64::from(word.count_ones());
            while borders.len() < parts && before + within > borders.len() as u64 * share {
                let mut rest = *word;
                for _ in before..borders.len() as u64 * share {
                    rest &= rest - 1;
                }
                borders.push(index as u64 * 64 + u64::from(rest.trailing_zeros()));
            }
            before += within;
        }
        borders.resize(parts + 1, self.pages);
        borders
    }

    /// The set as maximal runs `start..end`, ascending.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.runs_in(0..self.pages)
    }

    /// What of the set lies in `range`, as maximal runs `start..end`, ascending.
    pub fn runs_in(&self, range: Range<u64>) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut pages = self.iter_from(range.start).take_while(move |&page| page < range.end).peekable();
        std::iter::from_fn(move || {
            let start = pages.next()?;
            let mut end = start + 1;
            while pages.next_if_eq(&end).is_some() {
                end += 1;
            }
            Some((start, end))
        })
    }
}

/// A set of pages that several threads add to.
pub struct AtomicPageSet {
    words: Vec<AtomicU64>,
    pages: u64,
}

impl AtomicPageSet {
    /// The empty set over pages `0..pages`.
    pub fn new(pages: u64) -> Self {
        Self { words: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(), pages }
    }

    /// Adds one page. Numbers beyond the bound are ignored.
    pub fn insert(&self, page: u64) {
        if page < self.pages {
            self.words[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::AcqRel);
        }
    }

    /// Takes one page out. Numbers beyond the bound are ignored.
    pub fn remove(&self, page: u64) {
        // Looked at first: a word that is only read stays in the caches of all who look at it.
        if self.contains(page) {
            self.words[(page / 64) as usize].fetch_and(!(1 << (page % 64)), Ordering::AcqRel);
        }
    }

    /// Whether `page` is in the set.
    pub fn contains(&self, page: u64) -> bool {
        page < self.pages
            && self.words[(page / 64) as usize].load(Ordering::Acquire) & (1 << (page % 64)) != 0
    }

    /// Takes all pages out.
    pub fn drain(&self) -> PageSet {
        PageSet {
            words: self.words.iter().map(|word| word.swap(0, Ordering::AcqRel)).collect(),
            pages: self.pages,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_like_a_set(
            ranges in proptest::collection::vec((0u64..300, 0u64..300), 0..8),
            singles in proptest::collection::vec(0u64..320, 0..20),
            removed in proptest::collection::vec(0u64..320, 0..20),
            from in 0u64..300,
        ) {
            let mut model = BTreeSet::new();
            let mut set = PageSet::new(300);
            for (a, b) in ranges {
                set.insert_range(a, b);
                model.extend(a..b);
            }
            for page in singles {
                set.insert(page);
                if page < 300 { model.insert(page); }
            }
            for page in removed {
                set.remove(page);
                model.remove(&page);
            }
            prop_assert_eq!(set.count(), model.len() as u64);
            prop_assert_eq!(set.is_empty(), model.is_empty());
            prop_assert!(set.iter().eq(model.iter().copied()));
            prop_assert!(set.iter_from(from).eq(model.range(from..).copied()));
            prop_assert!(set.runs().flat_map(|(a, b)| a..b).eq(model.iter().copied()));
            let runs: Vec<_> = set.runs().collect();
            prop_assert!(runs.windows(2).all(|w| w[0].1 < w[1].0), "runs are maximal");
            let (below, above) = (set.runs_in(0..from), set.runs_in(from..300));
            prop_assert!(below.chain(above).flat_map(|(a, b)| a..b).eq(model.iter().copied()));
        }
    }

    #[test]
    fn shares_cover_every_page_once() {
        let mut pages = PageSet::new(1000);
        (0..1000).filter(|page| page % 7 == 0 || *page > 900).for_each(|page| pages.insert(page));
        for parts in 1..6 {
            let borders = pages.shares(parts);
            assert_eq!(borders.len(), parts + 1);
            let counts: Vec<usize> =
                borders.windows(2).map(|b| pages.iter_from(b[0]).take_while(|&p| p < b[1]).count()).collect();
            assert_eq!(counts.iter().sum::<usize>() as u64, pages.count());
            assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= parts);
        }
        assert_eq!(PageSet::new(10).shares(3), [0, 10, 10, 10]);
    }

    #[test]
    fn draining_leaves_nothing() {
        let set = AtomicPageSet::new(100);
        [3, 4, 99, 100].into_iter().for_each(|page| set.insert(page));
        [4, 5, 100].into_iter().for_each(|page| set.remove(page));
        assert!(set.drain().iter().eq([3, 99]));
        assert!(set.drain().is_empty());
    }
}
