//! When packing makes a lane faster, and by what.
//!
//! A lane begins with plain pages, and packs a few of them for nobody, to know what each method gains and costs. When the wire as
//! it is measured would carry clearly more packed pages than plain ones, the lane packs. From then on the proof is what it
//! achieves: when that is not more than it was with plain pages, it stops, and waits longer before it tries again; and when
//! another method promises clearly more, it goes over to that. As a link may become faster unseen while the packing is the
//! bottleneck, plain pages are measured anew now and then.
//!
//! What the wire carries shows only once the window is full: until then frames leave as fast as they are made, into
//! queues. So nothing is judged before a window's worth of frames has left, of a round or after a change.

#[cfg(test)]
mod simulation;

use std::time::{Duration, Instant};

use super::{Method, Packings, Sample};

/// Shortest time that is judged. A lane's frames of a few ms are on their way at once; it must not be shorter than they.
const INTERVAL: Duration = Duration::from_millis(10);
/// Fewest pages that are judged.
const PAGES: u64 = 64;
/// Longest time that a window takes to fill, as far as that is waited for.
const SETTLED: Duration = Duration::from_millis(250);
/// Packing must promise to take at most this share of a plain page's time.
const CLEARLY: f64 = 0.75;
/// Intervals in a row that must promise it, over which plain pages are measured.
const TIMES: u32 = 3;
/// Time over which packing proves itself: a lane's frames go in bursts, and one interval may fall between two.
const TRIAL: Duration = Duration::from_millis(60);
/// Packing that takes more than this share of a plain page's time is given up.
const WORTH: f64 = 0.92;
/// Another method must promise to take at most this share of the time that the one in use takes.
const BETTER: f64 = 0.9;
/// Methods that promise as much but for this are alike, and the one that needs less processor time is taken.
const ALIKE: f64 = 1.03;
/// Time after which plain pages are measured anew, and for which it is believed what a method achieved.
const RECHECK: Duration = Duration::from_secs(4);
/// First wait after packing was given up; every further one is twice as long.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// Longest such wait.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// Share of a lane's time that samples may take, as a divisor, beside what the first ones take.
const SAMPLING: u32 = 200;
/// Time that the first samples may take.
const FIRST_SAMPLES: Duration = Duration::from_millis(1);

/// What a lane has just done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    /// Frames sent.
    pub frames: u64,
    /// Pages put into them.
    pub pages: u64,
    /// Their bytes on the wire.
    pub wire_bytes: u64,
}

/// Decides for one lane. Time is passed in, so that it is tested without waiting.
#[derive(Debug)]
pub struct Auto {
    /// What may be used at all.
    packings: Packings,
    /// What is used now.
    now: Option<Method>,
    samples: [Sample; Method::ALL.len()],
    /// Which method the next sample is for.
    next_sample: usize,
    /// Time spent on samples, and the lane's time that earned it.
    sampling: Duration,
    active: Duration,
    /// Bytes of descriptors and payload in a frame.
    room: usize,
    /// Frames that may be on their way.
    window: u64,
    /// While frames leave into queues that are not full yet, or were filled in another way.
    settling: Option<Settling>,
    interval: Interval,
    /// Intervals in a row that promised something, and what was done in them.
    promises: u32,
    promised: Tally,
    /// What plain pages took when last measured.
    plain: Tally,
    /// What packed pages took since they were last judged.
    trial: Tally,
    /// What methods achieved of late.
    proofs: [Option<Proof>; Method::ALL.len()],
    /// When packing began.
    since: Option<Instant>,
    /// Until when it is not tried again, and how long the next wait is.
    not_before: Option<Instant>,
    wait: Duration,
}

/// Work with its time.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    time: Duration,
    /// CPU time in it that was not spent on packing.
    busy: Duration,
    pages: u64,
    wire_bytes: u64,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.time += other.time;
        self.busy += other.busy;
        self.pages += other.pages;
        self.wire_bytes += other.wire_bytes;
    }
}

impl Tally {
    /// Time of a page, s; infinite without any.
    fn page(self) -> f64 {
        self.time.as_secs_f64() / self.pages as f64
    }

    /// CPU time of a page besides packing it, s.
    fn busy(self) -> f64 {
        self.busy.as_secs_f64() / self.pages.max(1) as f64
    }

    /// Bytes/s on the wire; 0 where nothing is known.
    fn rate(self) -> f64 {
        if self.time.is_zero() { 0.0 } else { self.wire_bytes as f64 / self.time.as_secs_f64() }
    }
}

/// What a method achieved.
#[derive(Clone, Copy, Debug)]
struct Proof {
    /// Time of a page, s.
    page: f64,
    until: Instant,
}

/// Until frames leave as fast as the wire takes them.
#[derive(Debug)]
struct Settling {
    begun: Instant,
    /// Frames that are still to leave.
    frames: u64,
}

/// Work that is judged as one.
#[derive(Debug)]
struct Interval {
    begun: Instant,
    /// The thread's CPU time then.
    cpu: Duration,
    /// Time spent packing since.
    packing: Duration,
    pages: u64,
    wire_bytes: u64,
}

impl Interval {
    const fn new(begun: Instant, cpu: Duration) -> Self {
        Self { begun, cpu, packing: Duration::ZERO, pages: 0, wire_bytes: 0 }
    }
}

impl Auto {
    /// For a lane of which `window` frames may be on their way, with `room` bytes for descriptors and payload each.
    pub fn new(packings: Packings, room: usize, window: u32) -> Self {
        let now = Instant::now();
        Self {
            now: match packings {
                Packings::Always(method) => Some(method),
                _ => None,
            },
            packings,
            samples: Default::default(),
            next_sample: 0,
            sampling: Duration::ZERO,
            active: Duration::ZERO,
            room,
            window: window.into(),
            settling: None,
            interval: Interval::new(now, Duration::ZERO),
            promises: 0,
            promised: Tally::default(),
            plain: Tally::default(),
            trial: Tally::default(),
            proofs: Default::default(),
            since: None,
            not_before: None,
            wait: FIRST_WAIT,
        }
    }

    /// By what the next pages are to be packed; `None`: not at all.
    pub const fn method(&self) -> Option<Method> {
        self.now
    }

    fn candidates(&self) -> &[Method] {
        match &self.packings {
            Packings::WhenFaster(methods) => methods,
            _ => &[],
        }
    }

    /// Whether there is anything to decide.
    pub fn decides(&self) -> bool {
        !self.candidates().is_empty()
    }

    /// A round begins at `now`, and nothing is on its way: the time between rounds is nobody's.
    pub fn begin(&mut self, now: Instant) {
        self.settle(now);
    }

    /// By which method the pages just sent should be packed too, to see what it does to them.
    pub fn wants_sample(&mut self) -> Option<Method> {
        if self.sampling > FIRST_SAMPLES + self.active / SAMPLING {
            return None;
        }
        let candidates = self.candidates();
        let method = *candidates.get(self.next_sample % candidates.len().max(1))?;
        self.next_sample = self.next_sample.wrapping_add(1);
        // Of what is in use every block is one.
        Some(method).filter(|_| self.now != Some(method))
    }

    /// Notes that `pages` were packed by `method` into `bytes`, or did not become smaller, to be sent so.
    pub fn packed(&mut self, method: Method, pages: usize, bytes: Option<usize>, took: Duration) {
        self.samples[method as usize].add(pages, bytes, took);
        self.interval.packing += took;
    }

    /// The same of a sample, which nobody gets.
    pub fn sampled(&mut self, method: Method, pages: usize, bytes: Option<usize>, took: Duration) {
        self.packed(method, pages, bytes, took);
        self.sampling += took;
    }

    /// Notes what was sent up to `now`, and decides anew when that is enough to judge by. `cpu`, the CPU time that the
    /// thread has used, is asked for only then.
    pub fn sent(&mut self, now: Instant, work: Work, cpu: impl FnOnce() -> Duration) {
        if !self.decides() {
            return;
        }
        if let Some(settling) = &mut self.settling {
            settling.frames = settling.frames.saturating_sub(work.frames);
            if settling.frames == 0 || now.saturating_duration_since(settling.begun) >= SETTLED {
                self.settling = None;
                self.interval = Interval::new(now, cpu());
            }
            return;
        }
        let interval = &mut self.interval;
        interval.pages += work.pages;
        interval.wire_bytes += work.wire_bytes;
        let elapsed = now.saturating_duration_since(interval.begun);
        if elapsed < INTERVAL || interval.pages < PAGES {
            return;
        }
        let cpu = cpu();
        let over = std::mem::replace(interval, Interval::new(now, cpu));
        self.active += elapsed;
        let busy = cpu.saturating_sub(over.cpu).min(elapsed).saturating_sub(over.packing);
        let done = Tally { time: elapsed, busy, pages: over.pages, wire_bytes: over.wire_bytes };
        match self.now {
            None => self.judge_plain(now, done),
            Some(method) => self.judge_packed(now, method, done),
        }
    }

    fn judge_plain(&mut self, now: Instant, done: Tally) {
        if self.not_before.is_some_and(|time| now < time) {
            return;
        }
        match self.best(now, done.rate(), done.busy()) {
            Some((method, time)) if time < CLEARLY * done.page() => {
                self.promises += 1;
                self.promised += done;
                if self.promises >= TIMES {
                    self.plain = self.promised;
                    self.since = Some(now);
                    self.switch(now, Some(method));
                }
            }
            _ => (self.promises, self.promised) = (0, Tally::default()),
        }
    }

    fn judge_packed(&mut self, now: Instant, method: Method, done: Tally) {
        self.trial += done;
        if self.trial.time < TRIAL {
            return;
        }
        let trial = std::mem::take(&mut self.trial);
        if trial.page() > WORTH * self.plain.page() {
            self.not_before = Some(now + self.wait);
            self.wait = (self.wait * 2).min(LONGEST_WAIT);
            return self.switch(now, None);
        }
        if self.since.is_none_or(|since| now - since > RECHECK) {
            self.wait = FIRST_WAIT;
            return self.switch(now, None);
        }
        self.proofs[method as usize] = Some(Proof { page: trial.page(), until: now + RECHECK });
        // Where packing is the bottleneck, the wire carries more than it is given.
        let rate = trial.rate().max(self.plain.rate());
        if let Some((other, time)) = self.best(now, rate, trial.busy())
            && other != method
            && time < BETTER * trial.page()
        {
            self.switch(now, Some(other));
        }
    }

    /// The method by which a page takes least on a wire of `rate` bytes/s when it costs `busy` seconds besides, and what it takes,
    /// s: as predicted, but no less than it took of late.
    fn best(&self, now: Instant, rate: f64, busy: f64) -> Option<(Method, f64)> {
        let expected = |&method: &Method| {
            let predicted = self.samples[method as usize].predict(rate, busy, self.room)?;
            let proof = self.proofs[method as usize].filter(|proof| now < proof.until);
            Some((method, proof.map_or(predicted, |proof| predicted.max(proof.page))))
        };
        let least =
            self.candidates().iter().filter_map(expected).map(|(_, time)| time).min_by(f64::total_cmp)?;
        let alike = self.candidates().iter().filter_map(expected).filter(|(_, time)| *time <= least * ALIKE);
        let cost = |method: Method| self.samples[method as usize].seconds();
        alike.min_by(|(one, _), (other, _)| cost(*one).total_cmp(&cost(*other)))
    }

    fn switch(&mut self, now: Instant, to: Option<Method>) {
        self.now = to;
        (self.promises, self.promised, self.trial) = (0, Tally::default(), Tally::default());
        self.settle(now);
    }

    /// What was sent so far says nothing of what comes.
    fn settle(&mut self, now: Instant) {
        self.settling = Some(Settling { begun: now, frames: self.window });
    }
}
