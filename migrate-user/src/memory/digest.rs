//! A digest of all RAM, kept page by page.

use std::sync::atomic::{AtomicU64, Ordering};

use migrate_common::PAGE_SIZE;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::{AtomicPageSet, Mapping, MemoryError, PageSet, RamLayout, existing_pages};

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
/// All pages start as zero pages, which holes are. Whoever changes a page marks it
/// [`stale`](Self::mark_stale) *after* the change; [`refresh`](Self::refresh) clears the mark *before* it
/// reads: a change during the reading is marked again.
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

    /// Reads every stale page from memory and hashes it.
    ///
    /// # Errors
    /// When a page cannot be read; all that were stale remain so.
    pub fn refresh(&self, layout: &RamLayout, mappings: &[Mapping]) -> Result<(), MemoryError> {
        let stale = self.stale.drain();
        let mut buffer = [0u8; PAGE_SIZE];
        for page in stale.iter() {
            let at = layout.locate(page);
            if let Err(error) = mappings[usize::from(at.backend)].read(at.page, 0, &mut buffer) {
                self.mark_all_stale(&stale);
                return Err(error);
            }
            self.hashes[page as usize].store(xxh3_64(&buffer), Ordering::Relaxed);
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
