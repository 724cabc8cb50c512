//! How many pages fill a frame.

use migrate_common::{
    PAGE_SIZE,
    wire::{DESCRIPTOR_LEN, MAX_UNPACKED},
};

/// Share of a frame that is aimed at: a block that does not fit is packed in vain.
const AIM: f64 = 0.92;
/// Share of the news in the average.
const NEWS: f64 = 0.25;

/// Learns how small pages become, to pack as many as fill a frame.
#[derive(Debug)]
pub struct Fill {
    /// Bytes of a packed page, on average.
    page: f64,
}

impl Default for Fill {
    /// Begins with what seldom is too much.
    fn default() -> Self {
        Self { page: PAGE_SIZE as f64 / 2.0 }
    }
}

impl Fill {
    /// Pages to pack for a frame that has room for `room` bytes of descriptors and payload; 1 at least.
    pub fn pages(&self, room: usize) -> usize {
        let fitting = room as f64 * AIM / (self.page + DESCRIPTOR_LEN as f64);
        (fitting as usize).clamp(1, MAX_UNPACKED / PAGE_SIZE)
    }

    /// Notes that `pages` became `bytes`.
    pub fn packed(&mut self, pages: usize, bytes: usize) {
        self.page += NEWS * (bytes as f64 / pages.max(1) as f64 - self.page);
    }

    /// Notes that `pages` did not fit into `room` bytes.
    pub fn too_many(&mut self, pages: usize, room: usize) {
        let at_least = room as f64 / pages.max(1) as f64;
        self.page = (self.page.max(at_least) * 1.1).min(PAGE_SIZE as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Packs pages of `size` bytes; returns the frames' fill and how many blocks were in vain, in per cent.
    fn run(size: usize, room: usize) -> (usize, usize) {
        let (mut fill, mut used, mut in_vain) = (Fill::default(), 0, 0);
        for _ in 0..100 {
            let pages = fill.pages(room);
            let bytes = pages * size;
            if bytes + pages * DESCRIPTOR_LEN <= room {
                used += bytes + pages * DESCRIPTOR_LEN;
                fill.packed(pages, bytes);
            } else {
                in_vain += 1;
                fill.too_many(pages, room);
            }
        }
        (used * 100 / ((100 - in_vain) * room), in_vain)
    }

    #[test]
    fn frames_become_full_and_few_blocks_do_not_fit() {
        for size in [40, 300, 1365, 2500] {
            for room in [8240, 61_000] {
                let (filled, in_vain) = run(size, room);
                let most = 64 * (size + DESCRIPTOR_LEN) * 100 / room;
                assert!(filled >= 60.min(most - 5), "{size} B a page, room {room}: {filled} % full");
                assert!(in_vain <= 3, "{size} B a page, room {room}: {in_vain} in vain");
            }
        }
    }

    #[test]
    fn never_less_than_a_page_and_never_too_many() {
        let mut fill = Fill::default();
        (0..50).for_each(|_| fill.too_many(1, 1384));
        assert_eq!(fill.pages(1384), 1);
        (0..200).for_each(|_| fill.packed(10, 10));
        assert_eq!(fill.pages(61_000), 64);
    }
}
