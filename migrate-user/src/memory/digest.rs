//! A digest of all RAM, kept page by page.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

use migrate_common::PAGE_SIZE;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::{AtomicPageSet, Mapping, MemoryError, PageSet, RamLayout, existing_pages};

/// Pages read by one call: as many as stay in the first-level cache until they are hashed.
const AT_ONCE: usize = 4;

/// Digest of a guest's whole RAM: xxh3-128 over the 64-bit xxh3 of every page in order. Finds accidents, not
/// forgeries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digest(pub [u8; 16]);

impl Digest {
    /// Reads all of a guest's RAM. `mappings` in the layout's order.
    ///
    /// # Errors
    /// When it cannot be told which pages exist, or one cannot be read.
    pub fn of(layout: &RamLayout, mappings: &[Mapping]) -> Result<Self, MemoryError> {
        let hashes = PageHashes::zeroed(layout.pages());
        hashes.mark_all_stale(&existing_pages(layout, mappings)?);
        hashes.refresh(layout, mappings)?;
        Ok(hashes.digest())
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The hash of every page, with a note of those that must be read again.
///
/// All pages start as zero pages, which holes are. Whoever changes a page tells so *after* the change, by
/// [`written`](Self::written) or by marking it [`stale`](Self::mark_stale); the mark is cleared *before* a page is read: a change
/// during the reading is marked again. No two threads write the same page at a time, nor beside [`refresh`](Self::refresh).
pub struct PageHashes {
    hashes: Vec<AtomicU64>,
    stale: AtomicPageSet,
}

impl PageHashes {
    /// Hashes of a guest of `pages` zero pages.
    pub fn zeroed(pages: u64) -> Self {
        let zero = xxh3_64(&[0; PAGE_SIZE]);
        Self { hashes: (0..pages).map(|_| AtomicU64::new(zero)).collect(), stale: AtomicPageSet::new(pages) }
    }

    /// Notes that a page's content has changed.
    pub fn mark_stale(&self, page: u64) {
        self.stale.insert(page);
    }

    /// Notes that all of `pages` changed.
    pub fn mark_all_stale(&self, pages: &PageSet) {
        pages.iter().for_each(|page| self.stale.insert(page));
    }

    /// Notes that `length` bytes of a backend were written, from its byte `start` on; its pages are numbered from `first` on. The
    /// pages whose ends were written are hashed at once, while they are in the cache: they are whole, unless pieces of them were
    /// overtaken, and those mark them when they come. They are read back, because the hash is to tell what memory holds.
    ///
    /// # Errors
    /// When a page cannot be read.
    pub fn written(
        &self,
        mapping: &Mapping,
        first: u64,
        start: u64,
        length: usize,
    ) -> Result<(), MemoryError> {
        let size = PAGE_SIZE as u64;
        let end = start + length as u64;
        if !end.is_multiple_of(size) {
            self.mark_stale(first + end / size);
        }
        let whole = start / size..end / size;
        whole.clone().for_each(|page| self.stale.remove(first + page));
        self.hash(mapping, first, whole)
    }

    /// Reads every stale page from memory and hashes it.
    ///
    /// # Errors
    /// When a page cannot be read; all that were stale remain so.
    pub fn refresh(&self, layout: &RamLayout, mappings: &[Mapping]) -> Result<(), MemoryError> {
        let stale = self.stale.drain();
        for (backend, mapping) in mappings.iter().enumerate() {
            let first = layout.first_page(backend);
            for (start, end) in stale.runs_in(first..first + mapping.pages()) {
                self.hash(mapping, first, start - first..end - first)
                    .inspect_err(|_| self.mark_all_stale(&stale))?;
            }
        }
        Ok(())
    }

    /// Reads `pages` of a backend, whose pages are numbered from `first` on, and hashes them.
    fn hash(&self, mapping: &Mapping, first: u64, pages: Range<u64>) -> Result<(), MemoryError> {
        let mut buffer = [0; AT_ONCE * PAGE_SIZE];
        for begin in pages.clone().step_by(AT_ONCE) {
            let count = (pages.end - begin).min(AT_ONCE as u64);
            let content = &mut buffer[..count as usize * PAGE_SIZE];
            mapping.read(begin, 0, content)?;
            for (page, content) in (first + begin..).zip(content.chunks_exact(PAGE_SIZE)) {
                self.hashes[page as usize].store(xxh3_64(content), Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// The digest of what the hashes say.
    pub fn digest(&self) -> Digest {
        let mut hasher = Xxh3::new();
        let mut buffer = [0u8; 8 * 512];
        for hashes in self.hashes.chunks(512) {
            for (bytes, hash) in buffer.chunks_exact_mut(8).zip(hashes) {
                bytes.copy_from_slice(&hash.load(Ordering::Relaxed).to_le_bytes());
            }
            hasher.update(&buffer[..hashes.len() * 8]);
        }
        Digest(hasher.digest128().to_le_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Access, Backend};
    use super::*;

    fn guest(pages: u64) -> (RamLayout, Vec<Mapping>) {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(pages * 4096).unwrap();
        let layout = RamLayout::new(vec![Backend { id: "ram".into(), size: pages * 4096 }]);
        (layout, vec![Mapping::new(file, "t".into(), Access::Write).unwrap()])
    }

    #[test]
    fn follows_memory_and_equals_a_fresh_reading() {
        let (layout, mappings) = guest(1000);
        let kept = PageHashes::zeroed(1000);
        let untouched = kept.digest();
        mappings[0].write(700, 100, b"hello");
        kept.mark_stale(700);
        kept.refresh(&layout, &mappings).unwrap();
        assert_ne!(kept.digest(), untouched);

        let fresh = PageHashes::zeroed(1000);
        let mut all = PageSet::new(1000);
        all.insert_range(0, 1000);
        fresh.mark_all_stale(&all);
        fresh.refresh(&layout, &mappings).unwrap();
        assert_eq!(fresh.digest(), kept.digest());

        mappings[0].zero(700);
        kept.mark_stale(700);
        kept.refresh(&layout, &mappings).unwrap();
        assert_eq!(kept.digest(), untouched);
    }

    /// Whole pages need no refreshing; pieces of one count when the last of it comes, and when one is overtaken.
    #[test]
    fn what_is_written_is_hashed_at_once() {
        let (layout, mappings) = guest(100);
        let fresh = || Digest::of(&layout, &mappings).unwrap();
        let kept = PageHashes::zeroed(100);
        let write = |byte: usize, length: usize| {
            mappings[0].write((byte / PAGE_SIZE) as u64, byte % PAGE_SIZE, &vec![byte as u8 | 1; length]);
            kept.written(&mappings[0], 0, byte as u64, length).unwrap();
        };
        write(3 * PAGE_SIZE, 11 * PAGE_SIZE);
        assert_eq!(kept.digest(), fresh());
        for (piece, whole) in [(0, false), (1400, false), (2800, true)] {
            write(20 * PAGE_SIZE + piece, (PAGE_SIZE - piece).min(1400));
            assert_eq!(kept.digest() == fresh(), whole, "{piece}");
        }
        // Across a border, from the middle of a page on.
        write(21 * PAGE_SIZE + 1400, 2 * PAGE_SIZE);
        assert_ne!(kept.digest(), fresh());
        write(21 * PAGE_SIZE, 1400);
        write(23 * PAGE_SIZE + 1400, PAGE_SIZE - 1400);
        assert_ne!(kept.digest(), fresh());
        kept.refresh(&layout, &mappings).unwrap();
        assert_eq!(kept.digest(), fresh());
    }

    #[test]
    fn order_of_pages_matters() {
        let (layout, mappings) = guest(4);
        let digest_with = |page: u64| {
            mappings[0].write(page, 0, b"x");
            let hashes = PageHashes::zeroed(4);
            hashes.mark_stale(page);
            hashes.refresh(&layout, &mappings).unwrap();
            mappings[0].zero(page);
            hashes.digest()
        };
        assert_ne!(digest_with(1), digest_with(2));
    }
}
