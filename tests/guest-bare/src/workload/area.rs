//! The pages of the workload and the table that knows what each of them must hold.

use super::page::{BadWord, PAGE_WORDS, Page};
use super::params::Fill;
use super::report::Mismatch;

/// Pages, and their generations: 0 for one that was never written.
///
/// The table lies elsewhere in memory than the pages. It can get lost as they can, and its entries are only
/// ever counted up: their sum is checked against the number of writes.
pub struct Area {
    base: *mut u64,
    generations: &'static mut [u32],
    fill: Fill,
    sum: u64,
}

impl Area {
    /// # Safety
    /// `base` is the page-aligned start of `pages` pages that may be read and written for ever by nobody
    /// else in this program. `generations` holds that many zeroes.
    pub unsafe fn new(base: *mut u64, pages: usize, generations: &'static mut [u32], fill: Fill) -> Self {
        assert!(pages == generations.len() && pages <= u32::MAX as usize);
        Area { base, generations, fill, sum: 0 }
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.generations.len()
    }

    fn page(&self, number: usize) -> Page {
        debug_assert!(number < self.pages());
        // SAFETY: `new` was promised that many pages; no reference points into them, they are only ever
        // reached by way of this function.
        unsafe { Page::new(self.base.add(number * PAGE_WORDS), number as u32, self.fill) }
    }

    /// Writes all pages once, when they shall have a content from the beginning.
    pub fn fill_up(&mut self) {
        if self.fill == Fill::None {
            return;
        }
        for number in 0..self.pages() {
            self.page(number).write_all(1);
            self.generations[number] = 1;
            self.sum += 1;
        }
    }

    /// Verifies a page's stamps, then writes its next generation.
    pub fn visit(&mut self, number: usize) -> Option<Mismatch> {
        let generation = self.generations[number];
        let page = self.page(number);
        let bad = if generation == 0 { None } else { page.check_stamps(generation) };
        let next = generation.wrapping_add(1).max(1);
        if generation == 0 || bad.is_some() {
            page.write_all(next);
        } else {
            page.write_stamps(next);
        }
        self.set_generation(number, next);
        bad.map(|bad| mismatch(number, bad))
    }

    /// Verifies all of a page. One that is wrong is made right, so that it counts once.
    pub fn verify(&mut self, number: usize) -> Option<Mismatch> {
        let generation = self.generations[number];
        // Reading a page that was never written would make it exist.
        if generation == 0 {
            return None;
        }
        let page = self.page(number);
        let bad = page.check_all(generation)?;
        page.write_all(generation);
        Some(mismatch(number, bad))
    }

    /// Verifies the table as a whole: a part of it that went back to an older state lowers the sum.
    pub fn verify_table(&mut self) -> Option<Mismatch> {
        // Volatile for the reason given at `Page`.
        let sum = self
            .generations
            .iter()
            // SAFETY: reading through a reference.
            .map(|generation| u64::from(unsafe { core::ptr::from_ref(generation).read_volatile() }))
            .sum();
        let want = core::mem::replace(&mut self.sum, sum);
        (sum != want).then_some(Mismatch::Table { want, got: sum })
    }

    fn set_generation(&mut self, number: usize, next: u32) {
        let previous = core::mem::replace(&mut self.generations[number], next);
        self.sum = self.sum.wrapping_sub(u64::from(previous)).wrapping_add(u64::from(next));
    }
}

fn mismatch(number: usize, bad: BadWord) -> Mismatch {
    Mismatch::Page { number, word: bad.word, want: bad.want, got: bad.got }
}
