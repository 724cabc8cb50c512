//! Which frames of an epoch arrived.

use serde::{Deserialize, Serialize};

/// A growing set of frame numbers, all of them below `u32::MAX`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FrameSet {
    words: Vec<u64>,
    /// One past the highest number in the set.
    end: u32,
}

impl FrameSet {
    /// Adds a number; returns whether it is new. The last number there is, which would have no end behind it, is
    /// never new.
    pub fn insert(&mut self, number: u32) -> bool {
        if number == u32::MAX {
            return false;
        }
        let word = (number / 64) as usize;
        if word >= self.words.len() {
            self.words.resize((word + 1).next_power_of_two(), 0);
        }
        let bit = 1 << (number % 64);
        let new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        self.end = self.end.max(number + 1);
        new
    }

    /// One past the highest number in the set.
    pub fn end(&self) -> u32 {
        self.end
    }

    /// Adds all numbers of `other`.
    pub fn union_with(&mut self, other: &Self) {
        if other.words.len() > self.words.len() {
            self.words.resize(other.words.len(), 0);
        }
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
        self.end = self.end.max(other.end);
    }

    /// The numbers below `expected` that are missing, as ranges `start..end`. Takes time for what is in the set, not
    /// for what is expected.
    pub fn missing(&self, expected: u32) -> Vec<(u32, u32)> {
        let mut ranges: Vec<(u32, u32)> = Vec::new();
        let mut add = |start: u32, end: u32| match ranges.last_mut() {
            Some((_, last)) if *last == start => *last = end,
            _ => ranges.push((start, end)),
        };
        let known = self.end.min(expected);
        let mut number = 0;
        while number < known {
            let word = self.words[(number / 64) as usize] >> (number % 64);
            // Numbers up to the end of the word, or of what is known.
            let left = (64 - number % 64).min(known - number);
            if word & 1 == 1 {
                number += word.trailing_ones().min(left);
            } else {
                let gap = word.trailing_zeros().min(left);
                add(number, number + gap);
                number += gap;
            }
        }
        if known < expected {
            add(known, expected);
        }
        ranges
    }
}

/// What the frames of one migration were that came to one queue, up to now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct QueueFigures {
    /// The NIC's queue at the destination.
    pub queue: u32,
    /// Frames placed.
    pub frames: u64,
    /// Placed although later ones had come before them.
    pub reordered: u64,
    /// Frames that had come already.
    pub duplicates: u64,
    /// Frames that had changed on the way, as their checksum or header says.
    pub corrupt: u64,
    /// Frames that should be sealed and are not, or whose tag does not match: forged, or changed on the way.
    pub bad_tag: u64,
    /// Frames of an epoch that was closed: they came after they had been taken for lost.
    pub stale: u64,
    /// Frames whose content makes no sense for this guest.
    pub malformed: u64,
}

/// The frames of one lane that did not arrive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneLosses {
    /// The lane.
    pub lane: u16,
    /// Missing frame numbers as ranges `start..end`, ascending.
    pub missing: Vec<(u32, u32)>,
}

impl LaneLosses {
    /// How many frames that are.
    pub fn frames(&self) -> u64 {
        self.missing.iter().map(|(start, end)| u64::from(end.saturating_sub(*start))).sum()
    }
}

/// What is missing of an epoch, given the frames each lane sent and those that arrived.
pub fn losses(expected: &[u32], received: &[FrameSet]) -> Vec<LaneLosses> {
    let none = FrameSet::default();
    expected
        .iter()
        .enumerate()
        .map(|(lane, &frames)| LaneLosses {
            lane: lane as u16,
            missing: received.get(lane).unwrap_or(&none).missing(frames),
        })
        .filter(|losses| !losses.missing.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn missing_is_the_complement(numbers in proptest::collection::btree_set(0u32..400, 0..300), expected in 0u32..400) {
            let mut set = FrameSet::default();
            for &number in &numbers {
                prop_assert!(set.insert(number));
                prop_assert!(!set.insert(number));
            }
            let missing: Vec<u32> = set.missing(expected).into_iter().flat_map(|(a, b)| a..b).collect();
            let model: Vec<u32> = (0..expected).filter(|n| !numbers.contains(n)).collect();
            prop_assert_eq!(missing, model);
            prop_assert_eq!(set.end(), numbers.last().map_or(0, |n| n + 1));
        }
    }

    #[test]
    fn the_last_numbers_there_are() {
        let mut set = FrameSet::default();
        assert!(!set.insert(u32::MAX), "it would have no end behind it");
        assert_eq!(set.end(), 0);
        // By word and not by number: it returns at once.
        assert_eq!(set.missing(u32::MAX), [(0, u32::MAX)]);
        set.insert(70);
        assert_eq!(set.missing(u32::MAX), [(0, 70), (71, u32::MAX)]);
    }

    #[test]
    fn lanes_are_told_apart() {
        let mut one = FrameSet::default();
        one.insert(0);
        one.insert(2);
        let lost = losses(&[3, 2], &[one]);
        assert_eq!(lost[0], LaneLosses { lane: 0, missing: vec![(1, 2)] });
        assert_eq!(lost[1], LaneLosses { lane: 1, missing: vec![(0, 2)] });
    }
}
