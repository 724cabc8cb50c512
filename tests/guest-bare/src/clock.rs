//! Time by the processor's time stamp counter.

use crate::port;

/// Time stamp counter and its measured frequency.
pub struct Clock {
    ticks_per_second: u64,
}

impl Clock {
    /// Takes the given frequency, or measures it against the interval timer.
    pub fn calibrate(khz: Option<u64>) -> Self {
        let khz = khz.unwrap_or_else(measure_khz);
        Clock { ticks_per_second: khz.max(1) * 1000 }
    }

    /// Frequency of [`Clock::now`].
    pub fn ticks_per_second(&self) -> u64 {
        self.ticks_per_second
    }

    /// The counter now.
    pub fn now(&self) -> u64 {
        now()
    }
}

fn now() -> u64 {
    // SAFETY: reading the counter has no side effects; CR4.TSD is clear, so ring 3 may.
    unsafe { core::arch::x86_64::_rdtsc() }
}

const TIMER_HZ: u64 = 1_193_182;
const TIMER_CHANNEL_0: u16 = 0x40;
const TIMER_COMMAND: u16 = 0x43;
/// About 10 ms.
const COUNT: u16 = 11_932;
const ATTEMPTS: usize = 5;
/// For a machine without the timer: pace and time are wrong then, but nothing else.
const ASSUMED_KHZ: u64 = 2_000_000;
/// A timer that did not count for so many ticks is not there.
const PATIENCE: u64 = 1 << 30;

/// Takes the median of a few measurements: the host may run something else in the midst of one.
fn measure_khz() -> u64 {
    let mut ticks = [0; ATTEMPTS];
    for ticks in &mut ticks {
        let Some(measured) = ticks_of_countdown() else {
            return ASSUMED_KHZ;
        };
        *ticks = measured;
    }
    ticks.sort_unstable();
    ticks[ATTEMPTS / 2] * TIMER_HZ / u64::from(COUNT) / 1000
}

/// Channel 0 is read back while it counts: channel 2 has an output that could be polled, but small machine
/// types leave out the port for it.
fn ticks_of_countdown() -> Option<u64> {
    // Mode 0, from the highest count; the first counts go by while the second byte is on its way.
    port::write(TIMER_COMMAND, 0x30);
    port::write(TIMER_CHANNEL_0, 0xff);
    port::write(TIMER_CHANNEL_0, 0xff);
    // Each time is taken right before its count, so that the time a read takes cancels out.
    let (start, first) = (now(), count());
    loop {
        let before = now();
        let passed = first.wrapping_sub(count());
        if (COUNT..u16::MAX - COUNT).contains(&passed) {
            // What was counted beyond the goal was not part of the goal.
            return Some((before - start) * u64::from(COUNT) / u64::from(passed));
        }
        if before - start > PATIENCE {
            return None;
        }
    }
}

/// Latches and reads the counter.
fn count() -> u16 {
    port::write(TIMER_COMMAND, 0x00);
    let low = port::read(TIMER_CHANNEL_0);
    u16::from_le_bytes([low, port::read(TIMER_CHANNEL_0)])
}
