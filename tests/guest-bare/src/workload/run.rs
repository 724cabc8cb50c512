//! The loop's body: writes at a rate, and a steady sweep over everything besides.

use super::area::Area;
use super::pace::Pacer;
use super::page::mix;
use super::params::Rate;
use super::report::{Counters, Mismatch};

/// Pages written before the clock is looked at again.
const BATCH: u64 = 256;
/// Pages swept in one go.
const SWEEP_CHUNK: usize = 256;
/// Pages swept per second at most,
const SWEEP_RATE: u64 = 1 << 17;
/// and sweeps: as many as reports.
const SWEEPS_PER_SECOND: u64 = 10;
/// After each chunk the sweep rests for so many times as long as the chunk took,
const SWEEP_REST: u64 = 8;
/// but for this part of a second at most: a chunk in which the VM was stopped seems to have taken very long.
const LONGEST_REST: u64 = 20;

/// What a step left to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// More is due already.
    Busy,
    /// Nothing, until time has passed.
    Idle,
}

/// A pause of the sweep.
struct Rest {
    since: u64,
    ticks: u64,
}

impl Rest {
    /// A clock that went back ends it, too.
    fn is_over(&self, now: u64) -> bool {
        now.wrapping_sub(self.since) >= self.ticks
    }
}

/// An area, its pace and its figures.
pub struct Workload {
    area: Area,
    writes: Option<Pacer>,
    sweeps: Pacer,
    rest: Rest,
    longest_rest: u64,
    cursor: usize,
    counters: Counters,
}

impl Workload {
    /// Starts at the time `now`.
    pub fn new(area: Area, rate: Rate, ticks_per_second: u64, now: u64) -> Self {
        let sweep_rate = (area.pages() as u64 * SWEEPS_PER_SECOND).min(SWEEP_RATE);
        Workload {
            area,
            writes: match rate {
                Rate::Max => None,
                Rate::PerSecond(rate) => Some(Pacer::new(rate, ticks_per_second, now)),
            },
            sweeps: Pacer::new(sweep_rate, ticks_per_second, now),
            rest: Rest { since: now, ticks: 0 },
            longest_rest: ticks_per_second / LONGEST_REST,
            cursor: 0,
            counters: Counters::default(),
        }
    }

    /// The figures so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Does what is due, but not for long.
    pub fn step(&mut self, clock: impl Fn() -> u64, mut on_error: impl FnMut(&Mismatch, u64)) -> Progress {
        if self.area.pages() == 0 {
            return Progress::Idle;
        }
        let progress = self.write_batch(clock(), &mut on_error);
        self.sweep_chunk(&clock, &mut on_error);
        progress
    }

    fn write_batch(&mut self, now: u64, on_error: &mut impl FnMut(&Mismatch, u64)) -> Progress {
        let due = self.writes.as_mut().map_or(u64::MAX, |pacer| pacer.due(now));
        let batch = due.min(BATCH);
        for _ in 0..batch {
            self.counters.count += 1;
            // Upper half of the product: a number below the number of pages.
            let random = mix(self.counters.count);
            let number = ((u128::from(random) * self.area.pages() as u128) >> 64) as usize;
            if let Some(mismatch) = self.area.visit(number) {
                self.counters.errors += 1;
                on_error(&mismatch, self.counters.errors);
            }
        }
        if let Some(pacer) = &mut self.writes {
            pacer.spend(batch);
        }
        if due > batch { Progress::Busy } else { Progress::Idle }
    }

    fn sweep_chunk(&mut self, clock: &impl Fn() -> u64, on_error: &mut impl FnMut(&Mismatch, u64)) {
        let start = clock();
        let due = self.sweeps.due(start);
        if due == 0 || !self.rest.is_over(start) {
            return;
        }
        let end = self.area.pages().min(self.cursor + SWEEP_CHUNK.min(due as usize));
        self.sweeps.spend((end - self.cursor) as u64);
        for number in self.cursor..end {
            if let Some(mismatch) = self.area.verify(number) {
                self.counters.errors += 1;
                on_error(&mismatch, self.counters.errors);
            }
        }
        self.cursor = end;
        if end == self.area.pages() {
            self.finish_sweep(on_error);
        }
        let now = clock();
        let ticks = now.saturating_sub(start).saturating_mul(SWEEP_REST);
        self.rest = Rest { since: now, ticks: ticks.min(self.longest_rest) };
    }

    fn finish_sweep(&mut self, on_error: &mut impl FnMut(&Mismatch, u64)) {
        self.cursor = 0;
        self.counters.sweeps += 1;
        if let Some(mismatch) = self.area.verify_table() {
            self.counters.errors += 1;
            on_error(&mismatch, self.counters.errors);
        }
    }
}
