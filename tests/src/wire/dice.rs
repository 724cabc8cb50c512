//! What becomes of frame n: from a seed alone, so that a bad run can be had again.

use super::config::Faults;

/// Most frames that overtake one which is held back.
const MOST_OVERTAKING: u64 = 8;

/// What becomes of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fate {
    /// It does not arrive.
    pub lost: bool,
    /// It arrives twice.
    pub duplicated: bool,
    /// So many later ones overtake it.
    pub overtaken_by: u64,
    /// Some bit of it is flipped: a number to choose it by.
    pub corrupted: Option<u64>,
}

/// Throws one fate after the other.
#[derive(Clone, Debug)]
pub struct Dice {
    state: u64,
    bad: bool,
}

impl Dice {
    /// Dice that always fall the same for a seed.
    pub fn new(seed: u64) -> Self {
        Self { state: seed, bad: false }
    }

    /// The next frame's fate. Every throw takes as many numbers, so that a fault more or less does not change the others.
    pub fn throw(&mut self, faults: &Faults) -> Fate {
        let [lost, turn, reordered, gap, duplicated, corrupted, place] = std::array::from_fn(|_| self.next());
        Fate {
            lost: self.in_burst(faults, turn) || happens(lost, faults.loss),
            duplicated: happens(duplicated, faults.duplicate),
            overtaken_by: if happens(reordered, faults.reorder) { 1 + gap % MOST_OVERTAKING } else { 0 },
            corrupted: happens(corrupted, faults.corrupt).then_some(place),
        }
    }

    /// The Gilbert-Elliott chain: leaves a burst with the chance that gives its mean length, and enters one as often as
    /// gives its share of frames.
    fn in_burst(&mut self, faults: &Faults, turn: u64) -> bool {
        let Some(burst) = faults.burst else {
            self.bad = false;
            return false;
        };
        let leave = 1.0 / burst.length;
        let enter = leave * burst.share / (1.0 - burst.share);
        self.bad = if self.bad { !happens(turn, leave) } else { happens(turn, enter) };
        self.bad
    }

    /// splitmix64 (Steele, Lea, Flood 2014).
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// Whether something of that chance happens with that number thrown.
fn happens(thrown: u64, chance: f64) -> bool {
    // 53 bits are what a double holds exactly.
    ((thrown >> 11) as f64) < chance * (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::super::config::Burst;
    use super::*;

    const FRAMES: usize = 200_000;

    fn fates(faults: Faults, seed: u64) -> Vec<Fate> {
        let mut dice = Dice::new(seed);
        (0..FRAMES).map(|_| dice.throw(&faults)).collect()
    }

    fn share(fates: &[Fate], what: impl Fn(&Fate) -> bool) -> f64 {
        fates.iter().filter(|fate| what(fate)).count() as f64 / fates.len() as f64
    }

    #[test]
    fn a_good_wire_does_nothing() {
        assert!(fates(Faults::default(), 1).iter().all(|fate| *fate == Fate::default()));
        assert!(fates(Faults::cut(), 1).iter().all(|fate| fate.lost));
    }

    #[test]
    fn shares_are_kept() {
        let faults =
            Faults { loss: 0.01, reorder: 0.02, duplicate: 0.03, corrupt: 0.04, ..Faults::default() };
        let fates = fates(faults, 42);
        let near = |got: f64, want: f64| assert!((got / want - 1.0).abs() < 0.1, "{got} for {want}");
        near(share(&fates, |fate| fate.lost), 0.01);
        near(share(&fates, |fate| fate.overtaken_by > 0), 0.02);
        near(share(&fates, |fate| fate.duplicated), 0.03);
        near(share(&fates, |fate| fate.corrupted.is_some()), 0.04);
        assert!(fates.iter().all(|fate| fate.overtaken_by <= MOST_OVERTAKING));
    }

    #[test]
    fn the_seed_decides() {
        let faults = Faults { loss: 0.5, ..Faults::default() };
        assert_eq!(fates(faults, 7), fates(faults, 7));
        assert_ne!(fates(faults, 7), fates(faults, 8));
        let more = Faults { duplicate: 0.5, ..faults };
        let lost = |fates: Vec<Fate>| fates.iter().map(|fate| fate.lost).collect::<Vec<_>>();
        assert_eq!(lost(fates(faults, 7)), lost(fates(more, 7)), "one fault does not change the other");
    }

    #[test]
    fn bursts_are_as_many_and_as_long_as_wanted() {
        let burst = Burst { share: 0.02, length: 10.0 };
        let fates = fates(Faults { burst: Some(burst), ..Faults::default() }, 3);
        let lost = share(&fates, |fate| fate.lost);
        assert!((0.016..0.024).contains(&lost), "{lost}");
        let begins = fates.windows(2).filter(|pair| !pair[0].lost && pair[1].lost).count();
        let length = lost * FRAMES as f64 / begins as f64;
        assert!((8.0..12.0).contains(&length), "{length}");
    }
}
