//! When packing makes a lane faster.
//!
//! A lane begins with plain pages, and packs a few of them for nobody, to know what packing gains and costs. When the wire as it
//! is measured would carry clearly more packed pages than plain ones, the lane packs. From then on the proof is what it
//! achieves: when that is not more than it was with plain pages, it stops, and waits longer before it tries again. As a
//! link may become faster unseen while the packing is the bottleneck, plain pages are measured anew now and then.

use std::time::{Duration, Instant};

use super::{Codec, Packings, Sample};

/// Shortest time that is judged. A lane's frames of a few ms are on their way at once; it must not be shorter than they.
const INTERVAL: Duration = Duration::from_millis(10);
/// Fewest pages that are judged.
const PAGES: u64 = 64;
/// Packing must promise to take at most this share of a plain page's time.
const CLEARLY: f64 = 0.75;
/// Intervals in a row that must promise it, over which plain pages are measured.
const TIMES: u32 = 3;
/// Time over which packing proves itself: a lane's frames go in bursts, and one interval may fall between two.
const TRIAL: Duration = Duration::from_millis(60);
/// Packing that takes more than this share of a plain page's time is given up.
const WORTH: f64 = 0.92;
/// Time after which plain pages are measured anew.
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
    /// Pages put into frames.
    pub pages: u64,
    /// Bytes of these frames on the wire.
    pub wire_bytes: u64,
}

/// Decides for one lane. Time is passed in, so that it is tested without waiting.
#[derive(Debug)]
pub struct Auto {
    /// What may be used at all.
    packings: Packings,
    /// What is used now.
    now: Option<Codec>,
    samples: [Sample; Codec::ALL.len()],
    /// Which codec the next sample is for.
    next_sample: usize,
    /// Time spent on samples, and the lane's time that earned it.
    sampling: Duration,
    active: Duration,
    /// Bytes of descriptors and payload in a frame.
    room: usize,
    interval: Interval,
    /// Whether the next interval still has frames of another kind in it.
    mixed: bool,
    /// Intervals in a row that promised something, and what they took together.
    promises: u32,
    promised: Tally,
    /// Time of a plain page when last measured, s.
    plain: f64,
    /// What packed pages took since they were last judged.
    trial: Tally,
    /// When packing began.
    since: Option<Instant>,
    /// Until when it is not tried again, and how long the next wait is.
    not_before: Option<Instant>,
    wait: Duration,
}

/// Time and pages.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    time: Duration,
    pages: u64,
}

impl Tally {
    fn add(&mut self, time: Duration, pages: u64) {
        self.time += time;
        self.pages += pages;
    }

    /// Time of a page, s.
    fn page(self) -> f64 {
        self.time.as_secs_f64() / self.pages.max(1) as f64
    }
}

/// Work that is judged as one.
#[derive(Debug, Default)]
struct Interval {
    begun: Option<Instant>,
    /// The thread's CPU time then.
    cpu: Duration,
    work: Work,
}

impl Auto {
    /// For a lane whose frames have `room` bytes for descriptors and payload.
    pub fn new(packings: Packings, room: usize) -> Self {
        Self {
            now: match packings {
                Packings::Always(codec) => Some(codec),
                _ => None,
            },
            packings,
            samples: Default::default(),
            next_sample: 0,
            sampling: Duration::ZERO,
            active: Duration::ZERO,
            room,
            interval: Interval::default(),
            mixed: false,
            promises: 0,
            promised: Tally::default(),
            trial: Tally::default(),
            plain: f64::INFINITY,
            since: None,
            not_before: None,
            wait: FIRST_WAIT,
        }
    }

    /// By what the next pages are to be packed; `None`: not at all.
    pub const fn codec(&self) -> Option<Codec> {
        self.now
    }

    fn candidates(&self) -> &[Codec] {
        match &self.packings {
            Packings::WhenFaster(codecs) => codecs,
            _ => &[],
        }
    }

    /// Whether there is anything to decide.
    pub fn decides(&self) -> bool {
        !self.candidates().is_empty()
    }

    /// A round begins: the time between rounds is nobody's. `cpu` is the CPU time that the thread has used.
    pub fn begin(&mut self, now: Instant, cpu: Duration) {
        self.interval = Interval { begun: Some(now), cpu, work: Work::default() };
    }

    /// Which codec the pages just sent as they are should be packed by, to see what it does to them.
    pub fn wants_sample(&mut self) -> Option<Codec> {
        if self.now.is_some() || self.sampling > FIRST_SAMPLES + self.active / SAMPLING {
            return None;
        }
        let candidates = self.candidates();
        let codec = *candidates.get(self.next_sample % candidates.len().max(1))?;
        self.next_sample = self.next_sample.wrapping_add(1);
        Some(codec)
    }

    /// Notes that `pages` were packed by `codec` into `bytes`, or did not become smaller.
    pub fn packed(&mut self, codec: Codec, pages: usize, bytes: Option<usize>, took: Duration) {
        self.samples[codec as usize].add(pages, bytes, took);
        if self.now.is_none() {
            self.sampling += took;
        }
    }

    /// Notes what was sent up to `now`, and decides anew when that is enough to judge by. `cpu`, the CPU time that the
    /// thread has used, is asked for only then.
    pub fn sent(&mut self, now: Instant, work: Work, cpu: impl FnOnce() -> Duration) {
        if !self.decides() {
            return;
        }
        let sum = &mut self.interval.work;
        sum.pages += work.pages;
        sum.wire_bytes += work.wire_bytes;
        let begun = *self.interval.begun.get_or_insert(now);
        let elapsed = now.saturating_duration_since(begun);
        if elapsed < INTERVAL || sum.pages < PAGES {
            return;
        }
        let work = *sum;
        let cpu = cpu();
        let busy = cpu.saturating_sub(self.interval.cpu).min(elapsed);
        self.interval = Interval { begun: Some(now), cpu, work: Work::default() };
        self.active += elapsed;
        if !std::mem::take(&mut self.mixed) {
            self.judge(now, elapsed, busy, work);
        }
    }

    fn judge(&mut self, now: Instant, elapsed: Duration, busy: Duration, work: Work) {
        let pages = work.pages as f64;
        let page = elapsed.as_secs_f64() / pages;
        if self.now.is_some() {
            self.trial.add(elapsed, work.pages);
            if self.trial.time < TRIAL {
                return;
            }
            let trial = std::mem::take(&mut self.trial);
            if trial.page() > WORTH * self.plain {
                self.not_before = Some(now + self.wait);
                self.wait = (self.wait * 2).min(LONGEST_WAIT);
                self.switch(now, None);
            } else if self.since.is_none_or(|since| now - since > RECHECK) {
                self.wait = FIRST_WAIT;
                self.switch(now, None);
            }
            return;
        }
        if self.not_before.is_some_and(|time| now < time) {
            return;
        }
        let rate = work.wire_bytes as f64 / elapsed.as_secs_f64();
        let busy = busy.as_secs_f64() / pages;
        let predictions = self.candidates().iter().filter_map(|&codec| {
            let time = self.samples[codec as usize].predict(rate, busy, self.room)?;
            Some((codec, time))
        });
        let best = predictions.min_by(|(_, one), (_, other)| one.total_cmp(other));
        match best.filter(|&(_, time)| time < CLEARLY * page) {
            Some((codec, _)) => {
                self.promises += 1;
                self.promised.add(elapsed, work.pages);
                if self.promises >= TIMES {
                    self.plain = self.promised.page();
                    self.switch(now, Some(codec));
                }
            }
            None => (self.promises, self.promised) = (0, Tally::default()),
        }
    }

    fn switch(&mut self, now: Instant, to: Option<Codec>) {
        (self.now, self.since, self.mixed) = (to, Some(now), true);
        (self.promises, self.promised, self.trial) = (0, Tally::default(), Tally::default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A lane on a simulated link.
    struct Link {
        /// Bytes per second.
        rate: f64,
        /// Time a page costs the sender besides packing, s.
        busy: f64,
        /// What each codec makes of a page, bytes, and in what time, s.
        lz4: (f64, f64),
        zstd: (f64, f64),
        /// Time the receiver takes for a packed page, s.
        unpack: f64,
    }

    const GUEST: Link =
        Link { rate: 125e6, busy: 1e-6, lz4: (1700.0, 6e-6), zstd: (1300.0, 8e-6), unpack: 3e-6 };

    /// What came of it: pages sent, the share of them packed, time for samples, s, and the codec at the end.
    struct Outcome {
        pages: u64,
        packed: u64,
        sampling: f64,
        codec: Option<Codec>,
    }

    fn run(auto: &mut Auto, link: &Link, seconds: f64, from: Instant) -> Outcome {
        let mut outcome = Outcome { pages: 0, packed: 0, sampling: 0.0, codec: None };
        let what = |codec| if codec == Codec::Lz4 { link.lz4 } else { link.zstd };
        let (mut time, mut cpu_time) = (0.0, 0.0);
        let at = |time: f64| from + Duration::from_secs_f64(time);
        auto.begin(from, Duration::ZERO);
        while time < seconds {
            let codec = auto.codec();
            let (bytes, cpu) = codec.map_or((4112.0, 0.0), what);
            // A frame of 4 pages.
            let pages = 4.0;
            let own = (cpu + link.busy) * pages;
            let wire = (bytes / link.rate).max(codec.map_or(0.0, |_| link.unpack)) * pages;
            let waited = (wire - own).max(0.0);
            time += own + waited;
            cpu_time += own;
            if let Some(sample) = auto.wants_sample() {
                let (bytes, cpu) = what(sample);
                let bytes = (bytes < 4096.0).then_some((bytes * pages) as usize);
                auto.packed(sample, 4, bytes, Duration::from_secs_f64(cpu * pages));
                time += cpu * pages;
                cpu_time += cpu * pages;
                outcome.sampling += cpu * pages;
            }
            if let Some(codec) = codec {
                auto.packed(codec, 4, Some((bytes * pages) as usize), Duration::from_secs_f64(cpu * pages));
                outcome.packed += 4;
            }
            outcome.pages += 4;
            let work = Work { pages: 4, wire_bytes: (bytes * pages) as u64 };
            auto.sent(at(time), work, || Duration::from_secs_f64(cpu_time));
        }
        outcome.codec = auto.codec();
        outcome
    }

    fn auto() -> Auto {
        Auto::new(Packings::WhenFaster(Codec::ALL.to_vec()), 8240)
    }

    #[test]
    fn a_slow_link_gets_packed_pages_and_soon() {
        let outcome = run(&mut auto(), &GUEST, 10.0, Instant::now());
        assert_eq!(outcome.codec, Some(Codec::Zstd), "it packs best, and there is time");
        let plain = 10.0 * 125e6 / 4112.0;
        assert!(outcome.pages as f64 > 2.7 * plain, "{} instead of {plain}", outcome.pages);
        assert!(outcome.packed as f64 > 0.97 * outcome.pages as f64);
    }

    #[test]
    fn between_slow_and_fast_the_cheap_codec_is_better() {
        // 2.5 Gbit/s: Zstandard cannot keep up with it.
        let outcome = run(&mut auto(), &Link { rate: 312e6, ..GUEST }, 3.0, Instant::now());
        assert_eq!(outcome.codec, Some(Codec::Lz4));
    }

    #[test]
    fn a_fast_link_never_gets_packed_pages() {
        for rate in [1.25e9, 3e9, 12e9] {
            let outcome = run(&mut auto(), &Link { rate, ..GUEST }, 5.0, Instant::now());
            assert_eq!((outcome.packed, outcome.codec), (0, None), "{rate}");
            assert!(outcome.sampling < 0.01 * 5.0, "{} s of samples", outcome.sampling);
        }
    }

    #[test]
    fn random_pages_stay_plain_and_samples_cost_little() {
        for rate in [125e6, 1.25e9] {
            let random = Link { rate, lz4: (4096.0, 1e-6), zstd: (4096.0, 4e-6), ..GUEST };
            let outcome = run(&mut auto(), &random, 5.0, Instant::now());
            assert_eq!((outcome.packed, outcome.codec), (0, None));
            assert!(outcome.sampling < 0.01 * 5.0, "{} s of samples", outcome.sampling);
        }
    }

    #[test]
    fn a_link_that_becomes_faster_gets_plain_pages_again() {
        let mut auto = auto();
        let begun = Instant::now();
        assert!(run(&mut auto, &GUEST, 3.0, begun).codec.is_some());
        let fast = Link { rate: 5e9, ..GUEST };
        let outcome = run(&mut auto, &fast, 10.0, begun + Duration::from_secs(3));
        assert_eq!(outcome.codec, None);
        assert!(outcome.packed as f64 <= 4.1 / 7e-6, "packed for one recheck only: {}", outcome.packed);
    }

    #[test]
    fn a_receiver_that_unpacks_slowly_is_found_out() {
        // Nothing predicts it: only the result shows that packing gains nothing.
        let slow = Link { rate: 400e6, unpack: 20e-6, ..GUEST };
        let outcome = run(&mut auto(), &slow, 20.0, Instant::now());
        let plain = 20.0 * 400e6 / 4112.0;
        assert!(outcome.pages as f64 > 0.97 * plain, "{} of {plain}", outcome.pages);
    }

    #[test]
    fn what_was_asked_for_by_name_is_done() {
        let random = Link { lz4: (4096.0, 1e-6), ..GUEST };
        let mut always = Auto::new(Packings::Always(Codec::Lz4), 8240);
        assert_eq!(run(&mut always, &random, 1.0, Instant::now()).codec, Some(Codec::Lz4));
        let mut never = Auto::new(Packings::Never, 8240);
        assert_eq!(run(&mut never, &GUEST, 1.0, Instant::now()).packed, 0);
    }
}
