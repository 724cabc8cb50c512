//! One direction of the wire between its two ends: frames wait here for their time and their turn.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::config::Faults;
use super::dice::Dice;

/// A frame that was to be overtaken goes on after this long when nothing overtook it.
const PATIENCE: Duration = Duration::from_millis(2);
/// Ethernet, IPv4, UDP and page frame headers: half of all flipped bits are in here.
const HEADERS: u64 = 14 + 20 + 8 + 40;

/// A frame in a buffer that is used again.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Long enough for any frame.
    pub buffer: Vec<u8>,
    /// Bytes of it that are the frame.
    pub len: usize,
}

impl Frame {
    /// The frame.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[..self.len]
    }
}

/// Why frames did not arrive as they were sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Frames that came.
    pub taken: u64,
    /// Lost by chance.
    pub lost: u64,
    /// Lost because the queue for the rate was full.
    pub overflowed: u64,
    /// Sent twice.
    pub duplicated: u64,
    /// Held back until others had overtaken them.
    pub reordered: u64,
    /// Changed.
    pub corrupted: u64,
}

/// A frame on its way.
struct Moving {
    frame: Frame,
    due: Instant,
}

/// A frame held back until enough others have passed.
struct Held {
    frame: Frame,
    overtaken_by: u64,
    until: Instant,
}

/// One direction.
pub struct Line {
    faults: Faults,
    dice: Dice,
    moving: VecDeque<Moving>,
    held: Vec<Held>,
    /// When the last byte of all that was accepted will have been sent at the limited rate.
    free: Option<Instant>,
    /// Buffers that wait for frames.
    pool: Vec<Vec<u8>>,
    tally: Tally,
}

impl Line {
    /// An empty line.
    pub fn new(faults: Faults, seed: u64) -> Self {
        Self {
            faults,
            dice: Dice::new(seed),
            moving: VecDeque::new(),
            held: Vec::new(),
            free: None,
            pool: Vec::new(),
            tally: Tally::default(),
        }
    }

    /// Changes what happens to frames from now on.
    pub fn set(&mut self, faults: Faults, seed: u64) {
        (self.faults, self.dice, self.free) = (faults, Dice::new(seed), None);
    }

    /// What happened so far.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// A buffer of `len` bytes for the next frame.
    pub fn buffer(&mut self, len: usize) -> Vec<u8> {
        let mut buffer = self.pool.pop().unwrap_or_default();
        buffer.resize(len, 0);
        buffer
    }

    /// Takes a buffer back.
    pub fn recycle(&mut self, buffer: Vec<u8>) {
        self.pool.push(buffer);
    }

    /// A frame enters the line at `now`.
    pub fn push(&mut self, mut frame: Frame, now: Instant) {
        self.tally.taken += 1;
        let fate = self.dice.throw(&self.faults);
        if fate.lost {
            self.tally.lost += 1;
            return self.recycle(frame.buffer);
        }
        if let Some(place) = fate.corrupted.filter(|_| is_ip(frame.bytes())) {
            flip(&mut frame, place);
            self.tally.corrupted += 1;
        }
        if fate.duplicated {
            let mut buffer = self.buffer(frame.buffer.len());
            buffer[..frame.len].copy_from_slice(frame.bytes());
            self.tally.duplicated += 1;
            self.pass(Frame { buffer, len: frame.len }, now);
        }
        if fate.overtaken_by > 0 {
            self.tally.reordered += 1;
            let overtaken_by = fate.overtaken_by;
            return self.held.push(Held { frame, overtaken_by, until: now + PATIENCE });
        }
        self.pass(frame, now);
    }

    /// Lets a frame go on, and behind it those that it is the last to overtake.
    fn pass(&mut self, frame: Frame, now: Instant) {
        self.depart(frame, now);
        self.held.iter_mut().for_each(|held| held.overtaken_by = held.overtaken_by.saturating_sub(1));
        self.let_go(now);
    }

    fn let_go(&mut self, now: Instant) {
        while let Some(at) = self.held.iter().position(|held| held.overtaken_by == 0 || held.until <= now) {
            let held = self.held.remove(at);
            self.depart(held.frame, now);
        }
    }

    /// Puts a frame behind the others, unless too many wait for the rate.
    fn depart(&mut self, frame: Frame, now: Instant) {
        let Some(rate) = self.faults.rate else {
            return self.moving.push_back(Moving { frame, due: now + self.faults.delay });
        };
        let waiting =
            self.moving.iter().rev().take_while(|other| other.due > now + self.faults.delay).count();
        if waiting >= self.faults.queue {
            self.tally.overflowed += 1;
            return self.recycle(frame.buffer);
        }
        let cost = Duration::from_secs_f64(frame.len as f64 / rate.max(1) as f64);
        let sent = self.free.map_or(now, |free| free.max(now)) + cost;
        self.free = Some(sent);
        self.moving.push_back(Moving { frame, due: sent + self.faults.delay });
    }

    /// Moves up to `most` frames that arrive by `now` to `out`.
    pub fn arrive(&mut self, now: Instant, most: usize, out: &mut Vec<Frame>) {
        self.let_go(now);
        while out.len() < most && self.moving.front().is_some_and(|first| first.due <= now) {
            out.extend(self.moving.pop_front().map(|moving| moving.frame));
        }
    }

    /// When there is something to do next.
    pub fn next(&self) -> Option<Instant> {
        let held = self.held.iter().map(|held| held.until).min();
        self.moving.front().map(|first| first.due).into_iter().chain(held).min()
    }
}

/// Whether it is an IP packet. ARP has no checksum but Ethernet's, which would have stopped a changed frame: an address
/// learnt wrong here would be an evil of the lab's own.
fn is_ip(frame: &[u8]) -> bool {
    matches!(frame.get(12..14), Some([0x08, 0x00] | [0x86, 0xdd]))
}

/// Flips a bit, in the headers or behind them.
fn flip(frame: &mut Frame, place: u64) {
    let (len, bit) = (frame.len as u64, place % 8);
    let place = place / 8;
    let (half, place) = (place % 2, place / 2);
    let at = if half == 0 || len <= HEADERS {
        place % len.min(HEADERS)
    } else {
        HEADERS + place % (len - HEADERS)
    };
    frame.buffer[at as usize] ^= 1 << bit;
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: usize = 1000;

    fn frame(line: &mut Line, number: u8) -> Frame {
        let mut buffer = line.buffer(LEN);
        buffer.fill(number);
        buffer[12..14].copy_from_slice(&[8, 0]);
        Frame { buffer, len: LEN }
    }

    /// Numbers of the frames that arrive by `now`.
    fn arrived(line: &mut Line, now: Instant) -> Vec<u8> {
        let mut out = Vec::new();
        line.arrive(now, 1000, &mut out);
        out.iter().map(|frame| frame.bytes()[LEN - 1]).collect()
    }

    fn run(faults: Faults, frames: u8) -> (Line, Instant) {
        let (mut line, now) = (Line::new(faults, 5), Instant::now());
        for number in 0..frames {
            let frame = frame(&mut line, number);
            line.push(frame, now);
        }
        (line, now)
    }

    #[test]
    fn a_good_line_passes_everything_in_order() {
        let (mut line, now) = run(Faults::default(), 100);
        assert_eq!(arrived(&mut line, now), (0..100).collect::<Vec<_>>());
        assert_eq!(line.next(), None);
    }

    #[test]
    fn overtaken_frames_come_later_and_none_is_missing() {
        let (mut line, now) = run(Faults { reorder: 0.3, ..Faults::default() }, 100);
        let mut numbers = arrived(&mut line, now);
        numbers.extend(arrived(&mut line, now + PATIENCE));
        assert!(!numbers.is_sorted());
        numbers.sort_unstable();
        assert_eq!(numbers, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn all_can_be_overtaken_and_still_arrive() {
        let (mut line, now) = run(Faults { reorder: 1.0, ..Faults::default() }, 20);
        assert_eq!(line.next(), Some(now + PATIENCE));
        assert_eq!(arrived(&mut line, now + PATIENCE).len(), 20);
    }

    #[test]
    fn duplicates_come_twice() {
        let (mut line, now) = run(Faults { duplicate: 1.0, ..Faults::default() }, 3);
        assert_eq!(arrived(&mut line, now), [0, 0, 1, 1, 2, 2]);
        assert_eq!(line.tally().duplicated, 3);
    }

    #[test]
    fn one_bit_is_flipped_anywhere_but_not_in_arp() {
        let (mut line, now) = (Line::new(Faults { corrupt: 1.0, ..Faults::default() }, 5), Instant::now());
        let mut places = [0; 2];
        for _ in 0..200 {
            let mut frame = frame(&mut line, 0);
            frame.buffer[12] = 8;
            line.push(frame, now);
        }
        let mut out = Vec::new();
        line.arrive(now, 1000, &mut out);
        for frame in &out {
            let changed: Vec<usize> =
                (0..LEN).filter(|&at| frame.buffer[at] != if at == 12 { 8 } else { 0 }).collect();
            let [at] = changed[..] else { panic!("{changed:?}") };
            places[usize::from(at as u64 >= HEADERS)] += 1;
        }
        assert!(places.iter().all(|&count| count > 60), "{places:?}");
        let mut arp = frame(&mut line, 0);
        arp.buffer[13] = 6;
        let before = arp.buffer.clone();
        line.push(arp, now);
        let mut out = Vec::new();
        line.arrive(now, 1, &mut out);
        assert_eq!(out[0].buffer, before);
    }

    #[test]
    fn a_delay_delays() {
        let delay = Duration::from_millis(5);
        let (mut line, now) = run(Faults { delay, ..Faults::default() }, 2);
        assert_eq!(line.next(), Some(now + delay));
        assert_eq!(arrived(&mut line, now + delay / 2), [0; 0]);
        assert_eq!(arrived(&mut line, now + delay), [0, 1]);
    }

    #[test]
    fn a_rate_is_kept_and_a_full_queue_loses_the_last() {
        let (mut line, now) = run(Faults { rate: Some(1_000_000), queue: 10, ..Faults::default() }, 30);
        assert_eq!(line.tally().overflowed, 20);
        // 1000 bytes at 1 MB/s take a millisecond each.
        assert_eq!(arrived(&mut line, now + Duration::from_micros(3500)), [0, 1, 2]);
        let later = now + Duration::from_millis(100);
        assert_eq!(arrived(&mut line, later).len(), 7);
        let frame = frame(&mut line, 99);
        line.push(frame, later);
        assert_eq!(line.next(), Some(later + Duration::from_millis(1)), "idle time earns nothing");
    }
}
