//! What packing would gain and cost, from a few pages.

use std::time::Duration;

use migrate_common::{PAGE_SIZE, wire::DESCRIPTOR_LEN};

/// Share of the news in the averages.
const NEWS: f64 = 0.125;
/// Blocks without which nothing is said.
const ENOUGH: u32 = 8;

/// What one method does to a page, on average.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    blocks: u32,
    /// Bytes it becomes.
    bytes: f64,
    /// Time it takes, s.
    seconds: f64,
}

impl Sample {
    /// Notes that `pages` became `bytes`, or did not become smaller, within `took`.
    pub fn add(&mut self, pages: usize, bytes: Option<usize>, took: Duration) {
        let pages = pages.max(1) as f64;
        let bytes = bytes.map_or(PAGE_SIZE as f64, |bytes| bytes as f64 / pages).min(PAGE_SIZE as f64);
        let seconds = took.as_secs_f64() / pages;
        // The first few count alike.
        let news = NEWS.max(1.0 / f64::from(self.blocks + 1));
        self.bytes += news * (bytes - self.bytes);
        self.seconds += news * (seconds - self.seconds);
        self.blocks = self.blocks.saturating_add(1);
    }

    /// Time that packing a page takes, s.
    pub const fn seconds(&self) -> f64 {
        self.seconds
    }

    /// Time that a packed page would take, s, where the wire carries `rate` bytes/s and a page costs the sender `busy`
    /// seconds besides; frames have `room` bytes for descriptors and payload. `None` when too little is known.
    pub fn predict(&self, rate: f64, busy: f64, room: usize) -> Option<f64> {
        if self.blocks < ENOUGH || rate <= 0.0 {
            return None;
        }
        let one = self.bytes + DESCRIPTOR_LEN as f64;
        // Where a frame holds only few packed pages, what is left over counts.
        let fitting = (room as f64 / one).floor();
        let bytes = match fitting {
            0.0 => PAGE_SIZE as f64,
            few if few < 4.0 && room < PAGE_SIZE => room as f64 / few,
            _ => one,
        };
        // Packing goes on while the wire carries what was packed before.
        Some((bytes / rate).max(self.seconds + busy))
    }
}
