//! Pages that the destination has already, though they count as written.
//!
//! A guest in huge pages is tracked by the huge page: one byte written makes 512 pages of 4 KiB dirty, or 262 144. For such
//! guests a keyed hash is kept of what was last sent of every page, and a page whose hash is still the same is not sent
//! again.
//!
//! **Why that is sound.** The hash is of the very bytes that went into the frame, never of a second reading. A page is looked
//! at after its dirty bit was taken, and hashed from a private copy. If that copy equals what was last sent, the destination
//! has it; and whatever the guest writes after the dirty bit was taken, before, during or after the copy, makes the page
//! dirty again. Whatever of a round is not known to have arrived is [forgotten](SentHashes::forget).
//!
//! A difference goes unseen with a probability of 2^-128 for each page looked at, and a guest cannot look for one: it does
//! not know the key.

use std::sync::{
    OnceLock,
    atomic::{AtomicU64, Ordering},
};

use migrate_common::PAGE_SIZE;
use xxhash_rust::xxh3::xxh3_128_with_secret;

use crate::{
    cpus,
    memory::{Mapping, PageSet, RamLayout},
};

/// Pages whose hashes are allocated at once: those of a huge page of 2 MiB. What a guest never touched costs nothing.
const CHUNK: usize = 512;
/// Length of the secret, bytes: that of xxh3's own, `XXH3_SECRET_DEFAULT_SIZE` of `xxhash.h`.
const SECRET_LEN: usize = 192;
/// Most threads that look at pages: memory is read no faster by more.
const MAX_THREADS: usize = 8;
/// Fewest pages that are worth a thread.
const PER_THREAD: u64 = 4096;

/// A hash in two halves; all zero where nothing is known to be at the destination.
#[derive(Default)]
struct Entry([AtomicU64; 2]);

impl Entry {
    // Relaxed throughout: within a round a page belongs to one thread alone, and threads of different rounds are joined in
    // between, which orders what they do.
    fn get(&self) -> u128 {
        let [low, high] = &self.0;
        u128::from(low.load(Ordering::Relaxed)) | u128::from(high.load(Ordering::Relaxed)) << 64
    }

    fn set(&self, hash: u128) {
        let [low, high] = &self.0;
        low.store(hash as u64, Ordering::Relaxed);
        high.store((hash >> 64) as u64, Ordering::Relaxed);
    }
}

/// Hashes of what was last sent, 16 bytes for each page that ever was. Belongs to one migration.
pub struct SentHashes {
    secret: [u8; SECRET_LEN],
    zero: u128,
    chunks: Vec<OnceLock<Box<[Entry; CHUNK]>>>,
    /// Pages that it is kept for, as ranges `start..end`: others are never unchanged.
    kept: Vec<(u64, u64)>,
}

/// What was found of a round's pages.
#[derive(Debug)]
pub struct Changed {
    /// Pages that must be sent.
    pub pages: PageSet,
    /// Pages that were read to find that out.
    pub looked_at: u64,
    /// Pages that need not be sent.
    pub unchanged: u64,
}

impl SentHashes {
    /// For the pages of `backends` (by index in the layout), none of which was sent yet, under a new random secret.
    pub fn new(layout: &RamLayout, backends: impl Iterator<Item = usize>) -> Self {
        let mut secret = [0; SECRET_LEN];
        rand::fill(&mut secret);
        let chunks = layout.pages().div_ceil(CHUNK as u64);
        Self {
            zero: xxh3_128_with_secret(&[0; PAGE_SIZE], &secret),
            secret,
            chunks: (0..chunks).map(|_| OnceLock::new()).collect(),
            kept: backends.map(|at| (layout.first_page(at), layout.first_page(at + 1))).collect(),
        }
    }

    fn keeps(&self, page: u64) -> bool {
        self.kept.iter().any(|&(start, end)| (start..end).contains(&page))
    }

    fn known(&self, page: u64) -> Option<&Entry> {
        let chunk = self.chunks.get(page as usize / CHUNK)?.get()?;
        Some(&chunk[page as usize % CHUNK])
    }

    fn hash(&self, content: &[u8]) -> u128 {
        xxh3_128_with_secret(content, &self.secret)
    }

    fn set(&self, page: u64, hash: u128) {
        if self.keeps(page)
            && let Some(chunk) = self.chunks.get(page as usize / CHUNK)
        {
            let chunk = chunk.get_or_init(|| Box::new(std::array::from_fn(|_| Entry::default())));
            chunk[page as usize % CHUNK].set(hash);
        }
    }

    /// Notes that `content`, the whole page, is about to be sent.
    pub fn note(&self, page: u64, content: &[u8]) {
        self.set(page, self.hash(content));
    }

    /// Notes that the destination is about to be told, or knows, that `page` is zero.
    pub fn note_zero(&self, page: u64) {
        self.set(page, self.zero);
    }

    /// What of `pages` was sent did not arrive, or is not known to have.
    pub fn forget(&self, pages: &PageSet) {
        pages.iter().filter_map(|page| self.known(page)).for_each(|entry| entry.set(0));
    }

    /// Looks at `pages`, whose dirty bits were taken before, on as many threads as there are processors.
    pub fn changed(&self, pages: &PageSet, layout: &RamLayout, mappings: &[Mapping]) -> Changed {
        let processors = cpus::usable().min(MAX_THREADS);
        let worth = usize::try_from(pages.count() / PER_THREAD).unwrap_or(usize::MAX);
        self.changed_by(pages, layout, mappings, processors.min(worth).max(1))
    }

    /// The same on so many threads.
    pub fn changed_by(
        &self,
        pages: &PageSet,
        layout: &RamLayout,
        mappings: &[Mapping],
        threads: usize,
    ) -> Changed {
        let borders = pages.shares(threads);
        let mut parts = borders.windows(2).map(|border| (border[0], border[1]));
        let look = |(from, to)| self.look(pages, from, to, layout, mappings);
        let first = parts.next();
        std::thread::scope(|scope| {
            let others: Vec<_> = parts.map(|part| scope.spawn(move || look(part))).collect();
            let mut all = first.map_or_else(|| Changed::none(pages), look);
            for other in others {
                // A panic there is a defect here too: the round must not go on as if its pages were unchanged.
                let part = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                all.pages.union_with(&part.pages);
                all.looked_at += part.looked_at;
                all.unchanged += part.unchanged;
            }
            all
        })
    }

    fn look(&self, pages: &PageSet, from: u64, to: u64, layout: &RamLayout, mappings: &[Mapping]) -> Changed {
        let mut found = Changed::none(pages);
        let mut content = [0; PAGE_SIZE];
        for page in pages.iter_from(from).take_while(|&page| page < to) {
            let known = self.known(page).map_or(0, Entry::get);
            if known != 0 {
                let place = layout.locate(page);
                let read = mappings[usize::from(place.backend)].read(place.page, 0, &mut content);
                found.looked_at += 1;
                // What cannot be read is not known to be unchanged; sending it says why.
                if read.is_ok() && self.hash(&content) == known {
                    found.unchanged += 1;
                    continue;
                }
            }
            found.pages.insert(page);
        }
        found
    }
}

impl Changed {
    fn none(pages: &PageSet) -> Self {
        Self { pages: PageSet::new(pages.bound()), looked_at: 0, unchanged: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Access, Backend};

    fn guest(backends: &[u64]) -> (RamLayout, Vec<Mapping>) {
        let size = |&pages: &u64| pages * PAGE_SIZE as u64;
        let layout = backends.iter().map(|pages| Backend { id: "ram".into(), size: size(pages) }).collect();
        let map = |pages| {
            let file = tempfile::tempfile_in("/dev/shm").unwrap();
            file.set_len(size(pages)).unwrap();
            Mapping::new(file, "t".into(), Access::Write).unwrap()
        };
        (RamLayout::new(layout), backends.iter().map(map).collect())
    }

    fn all(layout: &RamLayout) -> PageSet {
        let mut pages = PageSet::new(layout.pages());
        pages.insert_range(0, layout.pages());
        pages
    }

    #[test]
    fn only_what_is_as_it_was_sent_is_unchanged() {
        let (layout, mappings) = guest(&[20_000]);
        let hashes = SentHashes::new(&layout, 0..1);
        let (pages, mut buffer) = (all(&layout), [0; PAGE_SIZE]);
        let nothing_sent = hashes.changed(&pages, &layout, &mappings);
        assert_eq!((nothing_sent.looked_at, nothing_sent.pages.count()), (0, 20_000));

        for page in 0..20_000 {
            mappings[0].write(page, 7, &[page as u8]);
            mappings[0].read(page, 0, &mut buffer).unwrap();
            if page % 256 == 0 { hashes.note_zero(page) } else { hashes.note(page, &buffer) }
        }
        let changed = hashes.changed(&pages, &layout, &mappings);
        assert_eq!((changed.looked_at, changed.unchanged), (20_000, 20_000));

        // One bit, one page that becomes zero, one that was zero.
        mappings[0].write(5, 4095, &[1]);
        mappings[0].zero(19_999);
        mappings[0].write(512, 0, &[1]);
        let changed = hashes.changed(&pages, &layout, &mappings);
        assert!(changed.pages.iter().eq([5, 512, 19_999]), "{changed:?}");

        let mut lost = PageSet::new(20_000);
        lost.insert(7);
        hashes.forget(&lost);
        assert!(hashes.changed(&pages, &layout, &mappings).pages.contains(7));
    }

    #[test]
    fn other_backends_have_no_hashes_and_other_migrations_other_ones() {
        let (layout, mappings) = guest(&[10, 20]);
        let (one, other) = (SentHashes::new(&layout, 1..2), SentHashes::new(&layout, 0..2));
        let page = [3; PAGE_SIZE];
        (0..30).for_each(|number| {
            one.note(number, &page);
            other.note(number, &page);
            let at = layout.locate(number);
            mappings[usize::from(at.backend)].write(at.page, 0, &page);
        });
        let changed = one.changed(&all(&layout), &layout, &mappings);
        assert!(changed.pages.iter().eq(0..10));
        let hash = |hashes: &SentHashes| hashes.known(20).map(Entry::get);
        assert_ne!(hash(&one), hash(&other));
    }
}
