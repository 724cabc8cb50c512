//! What the disk holds: each word is a function of its offset.
//!
//! The lab compiles this file, too: there it writes the disk.

/// Differs from word to word in all bytes, and does not compress.
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
const WORD: usize = size_of::<u64>();

/// A word on the disk that is not what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadWord {
    /// Where on the disk.
    pub offset: u64,
    /// What belongs there.
    pub want: u64,
    /// What was read.
    pub got: u64,
}

/// The word at an offset, which is a multiple of 8.
pub fn word_at(offset: u64) -> u64 {
    (offset / WORD as u64 + 1).wrapping_mul(MULTIPLIER)
}

/// Verifies what was read from an offset on.
pub fn first_bad_word(data: &[u8], offset: u64) -> Option<BadWord> {
    // The loop for the common case has no branch inside, which makes it several times as fast.
    let mut difference = 0;
    let mut want = word_at(offset);
    for word in data.as_chunks::<WORD>().0 {
        difference |= u64::from_le_bytes(*word) ^ want;
        want = want.wrapping_add(MULTIPLIER);
    }
    if difference == 0 {
        return None;
    }
    (offset..).step_by(WORD).zip(data.as_chunks().0).find_map(|(offset, word)| {
        let (want, got) = (word_at(offset), u64::from_le_bytes(*word));
        (want != got).then_some(BadWord { offset, want, got })
    })
}
