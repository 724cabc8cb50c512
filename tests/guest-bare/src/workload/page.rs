//! What a page holds: stamps that change with every write, and filler between them.
//!
//! Stamps lie in the first and last word and at most 512 bytes apart, so that the loss of any fragment of
//! a page hits one. Word 0 is readable in an error message: generation in the upper half, page number in
//! the lower. The filler never changes; a full check looks at it too.

use super::params::Fill;

/// Size of a page in bytes.
pub const PAGE_SIZE: usize = 4096;
/// Size of a page in words.
pub const PAGE_WORDS: usize = PAGE_SIZE / size_of::<u64>();
/// Words that hold a stamp, ascending.
const STAMPS: [usize; 10] = [0, 1, 65, 130, 191, 255, 318, 382, 446, PAGE_WORDS - 1];

/// Length of a record of [`Fill::Records`].
const RECORD_WORDS: usize = 8;
/// What each of them begins with.
const FIELDS: [[u8; 8]; 4] = [*b"{\"type\":", *b"\"order\",", *b"\"state\":", *b"\"open\", "];
/// Words that come up in them.
const VOCABULARY: [[u8; 8]; 16] = [
    *b"customer",
    *b"delivery",
    *b"invoice ",
    *b"quantity",
    *b"shipment",
    *b"discount",
    *b"overdue ",
    *b"priority",
    *b"returned",
    *b"approved",
    *b"supplier",
    *b"currency",
    *b"internal",
    *b"external",
    *b"archived",
    *b"pending ",
];

/// The last eight decimal digits of a number as text.
fn digits(number: u64) -> u64 {
    (0..8).fold((0, number), |(text, left), _| (text << 8 | (u64::from(b'0') + left % 10), left / 10)).0
}

/// A word of a page that is not what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadWord {
    /// Which word of the page.
    pub word: usize,
    /// What belongs there.
    pub want: u64,
    /// What is there.
    pub got: u64,
}

/// Spreads each bit of the input over the whole output.
pub fn mix(value: u64) -> u64 {
    let value = (value ^ value >> 32).wrapping_mul(0x9fb2_1c65_1e98_df25);
    let value = (value ^ value >> 29).wrapping_mul(0xd6e8_feb8_6659_fd93);
    value ^ value >> 32
}

/// One page of the area: its address, number and first content.
#[derive(Clone, Copy)]
pub struct Page {
    words: *mut u64,
    number: u32,
    fill: Fill,
}

impl Page {
    /// # Safety
    /// `words` is the start of a page that may be read and written as long as the result is used, and that
    /// no reference points into.
    pub unsafe fn new(words: *mut u64, number: u32, fill: Fill) -> Self {
        Page { words, number, fill }
    }

    // Volatile throughout: what is looked for is memory that changed behind the program's back, which the
    // compiler may otherwise assume not to happen.

    fn read(self, word: usize) -> u64 {
        debug_assert!(word < PAGE_WORDS);
        // SAFETY: within the page that `new` was promised.
        unsafe { self.words.add(word).read_volatile() }
    }

    fn write(self, word: usize, value: u64) {
        debug_assert!(word < PAGE_WORDS);
        // SAFETY: within the page that `new` was promised.
        unsafe { self.words.add(word).write_volatile(value) }
    }

    fn name(self, generation: u32) -> u64 {
        u64::from(generation) << 32 | u64::from(self.number)
    }

    fn stamp(self, seed: u64, index: usize) -> u64 {
        if index == 0 {
            seed
        } else {
            // The product differs in the upper bits for each index, the seed in all for each generation.
            seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(index as u32 * 6) ^ index as u64
        }
    }

    fn filler(self, word: usize) -> u64 {
        match self.fill {
            Fill::None => 0,
            Fill::Random => mix(self.seed(word)),
            Fill::Records => self.record(word),
        }
    }

    fn seed(self, word: usize) -> u64 {
        u64::from(self.number) * PAGE_WORDS as u64 + word as u64 + 1
    }

    /// A word of a record: field names, two words of text, a number in digits, and eight bytes that do not compress.
    /// LZ4 makes such a page three times smaller, zstd four times.
    fn record(self, word: usize) -> u64 {
        let text = |bytes: &[u8; 8]| u64::from_le_bytes(*bytes);
        match word % RECORD_WORDS {
            field @ 0..4 => text(&FIELDS[field]),
            4 | 5 => text(&VOCABULARY[mix(self.seed(word)) as usize % VOCABULARY.len()]),
            6 => digits(self.seed(word) / RECORD_WORDS as u64),
            _ => mix(self.seed(word)),
        }
    }

    /// Writes the stamps of a generation.
    pub fn write_stamps(self, generation: u32) {
        let seed = self.name(generation);
        for (index, &word) in STAMPS.iter().enumerate() {
            self.write(word, self.stamp(seed, index));
        }
    }

    /// Writes filler and stamps.
    pub fn write_all(self, generation: u32) {
        for word in 0..PAGE_WORDS {
            self.write(word, self.filler(word));
        }
        self.write_stamps(generation);
    }

    /// Finds the first stamp that is not of this generation.
    pub fn check_stamps(self, generation: u32) -> Option<BadWord> {
        let seed = self.name(generation);
        let mut difference = 0;
        for (index, &word) in STAMPS.iter().enumerate() {
            difference |= self.read(word) ^ self.stamp(seed, index);
        }
        // The common case costs one branch; a page that has a difference is looked at again.
        if difference == 0 { None } else { self.check_all(generation) }
    }

    /// Finds the first word that is wrong, filler included.
    pub fn check_all(self, generation: u32) -> Option<BadWord> {
        let seed = self.name(generation);
        let mut stamps = STAMPS.iter().enumerate().peekable();
        for word in 0..PAGE_WORDS {
            let want = match stamps.next_if(|(_, stamped)| **stamped == word) {
                Some((index, _)) => self.stamp(seed, index),
                None => self.filler(word),
            };
            let got = self.read(word);
            if want != got {
                return Some(BadWord { word, want, got });
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_are_close_enough_to_notice_any_lost_fragment() {
        assert!(STAMPS.windows(2).all(|pair| pair[0] < pair[1] && pair[1] - pair[0] <= 65));
        assert_eq!((STAMPS[0], STAMPS[STAMPS.len() - 1]), (0, PAGE_WORDS - 1));
    }

    #[test]
    fn each_word_counts() {
        for fill in [Fill::None, Fill::Random, Fill::Records] {
            let mut memory = [0; PAGE_WORDS];
            let words = memory.as_mut_ptr();
            // SAFETY: the array lives until the end of the scope and is used through `page` only.
            let page = unsafe { Page::new(words, 7, fill) };
            page.write_all(3);
            assert_eq!((page.check_stamps(3), page.check_all(3)), (None, None));
            for word in 0..PAGE_WORDS {
                let right = page.read(word);
                page.write(word, right ^ 1 << 40);
                let bad = page.check_all(3).map(|bad| (bad.word, bad.want));
                assert_eq!(bad, Some((word, right)));
                assert_eq!(page.check_stamps(3).is_some(), STAMPS.contains(&word));
                page.write(word, right);
            }
        }
    }

    #[test]
    fn records_are_text_and_numbers() {
        let mut memory = [0u64; PAGE_WORDS];
        // SAFETY: as above.
        let page = unsafe { Page::new(memory.as_mut_ptr(), 3, Fill::Records) };
        page.write_all(1);
        let bytes: [u8; 64] = core::array::from_fn(|at| (page.read(8 + at / 8) >> (at % 8 * 8)) as u8);
        assert_eq!(&bytes[..32], b"{\"type\":\"order\",\"state\":\"open\", ");
        assert!(bytes[32..48].chunks(8).all(|word| VOCABULARY.iter().any(|known| known == word)));
        assert_eq!(&bytes[48..56], b"00000193");
    }

    #[test]
    fn every_stamp_differs_between_generations_and_pages() {
        let mut memory = [0; PAGE_WORDS];
        let words = memory.as_mut_ptr();
        // SAFETY: as above.
        let (page, other) = unsafe { (Page::new(words, 1, Fill::None), Page::new(words, 2, Fill::None)) };
        for generation in 1..100 {
            for index in 0..STAMPS.len() {
                let of = |page: Page, generation| page.stamp(page.name(generation), index);
                assert_ne!(of(page, generation), of(page, generation + 1));
                assert_ne!(of(page, generation), of(other, generation));
            }
        }
    }
}
