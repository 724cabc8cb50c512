//! How many frames may be on their way.

use std::time::{Duration, Instant};

use super::reach::Reach;

/// Fewest frames the window shrinks to: less would stall on every feedback.
const FLOOR: u32 = 8;
/// A path that loses one frame in so many, or fewer, is taken for a bad one, which a smaller window does not mend; one
/// that loses more, for a full one.
const TOLERATED: u32 = 6;
/// Fewest frames by which a path is judged.
const SAMPLE: u32 = 32;
/// Frames that ask a silent receiver whether it is there.
const PROBES: u32 = 2;

/// Flow control of one lane: never more frames in flight than the receiver has room for, and a [long path](Reach) holds.
///
/// Frames are judged by **trips**: all that were on their way at one moment. A trip that lost more than a bad wire
/// would shrinks the window to what came through; any other lets it grow. So random losses cost only themselves, and
/// a full queue on the path is not kept full.
#[derive(Debug)]
pub struct Window {
    /// What the receiver said it can hold, frames.
    advertised: u32,
    /// What we use of it.
    limit: u32,
    /// Frames sent in this epoch.
    sent: u32,
    /// Frames that the receiver has seen, or one later than them.
    seen: u32,
    /// Frames that the receiver has got.
    received: u32,
    /// Frames beyond the limit, to ask a silent receiver.
    probes: u32,
    trip: Trip,
    reach: Reach,
    /// Frames beyond the limit, because a long path holds them.
    on_path: u32,
}

/// A stretch of frames that is judged as one.
#[derive(Debug, Default)]
struct Trip {
    /// `seen` and `received` when it began.
    seen: u32,
    received: u32,
    /// It is over when this has been seen.
    end: u32,
    /// Whether one was judged in this epoch.
    judged: bool,
}

impl Window {
    /// A window of `advertised` frames.
    pub fn new(advertised: u32) -> Self {
        let advertised = advertised.max(1);
        Self {
            advertised,
            limit: advertised,
            sent: 0,
            seen: 0,
            received: 0,
            probes: 0,
            trip: Trip::default(),
            reach: Reach::default(),
            on_path: 0,
        }
    }

    /// Begins a new epoch: numbers start from 0 again.
    pub fn begin(&mut self, now: Instant) {
        (self.sent, self.seen, self.received, self.probes, self.on_path) = (0, 0, 0, 0, 0);
        self.trip = Trip::default();
        self.reach.begin(now);
    }

    /// Whether another frame may go.
    pub fn open(&self) -> bool {
        self.in_flight() < self.limit + self.on_path + self.probes
    }

    /// A frame and the word that it came take so long where they meet no queue; whether that is `sure`.
    pub fn on_way(&mut self, way: Duration, sure: bool) {
        self.reach.on_way(way, sure);
    }

    /// Time goes by, and with it frames go from queues onto the path.
    pub fn on_time(&mut self, now: Instant) {
        self.on_path = self.reach.frames(self.advertised, now);
    }

    /// Frames on their way.
    pub fn in_flight(&self) -> u32 {
        self.sent - self.seen
    }

    /// Notes a frame sent.
    pub fn on_sent(&mut self) {
        self.sent += 1;
    }

    /// Notes that the receiver has seen numbers up to `seen` and got `received` of them.
    pub fn on_seen(&mut self, seen: u32, received: u32, now: Instant) {
        let seen = seen.min(self.sent);
        if seen > self.seen {
            self.seen = seen;
            self.probes = 0;
        }
        self.received = self.received.max(received.min(self.seen));
        self.reach.on_received(self.received, now);
        self.on_time(now);
        let frames = self.seen - self.trip.seen;
        if self.seen >= self.trip.end && frames >= SAMPLE {
            self.judge(frames, frames.saturating_sub(self.received - self.trip.received));
            self.trip = Trip { seen: self.seen, received: self.received, end: self.sent, judged: true };
        }
    }

    /// Nothing was heard for too long: all that is on its way may be lost, or the receiver sleeps. A few frames more
    /// find out without flooding it.
    pub fn on_stall(&mut self) {
        self.probes = self.in_flight().saturating_sub(self.limit + self.on_path) + PROBES;
    }

    /// A round is accounted for. One that was too short for a trip is judged now.
    pub fn on_round(&mut self, lost: u64) {
        if !self.trip.judged && self.sent >= SAMPLE {
            self.judge(self.sent, u32::try_from(lost).unwrap_or(u32::MAX).min(self.sent));
        }
    }

    fn judge(&mut self, frames: u32, lost: u32) {
        self.limit = if lost > frames / TOLERATED {
            self.reach.on_full();
            let through = u64::from(self.limit) * u64::from(frames - lost) / u64::from(frames);
            // By half at most: one bad moment is not the path.
            (through as u32).max(self.limit / 2).max(FLOOR).min(self.advertised)
        } else {
            (self.limit + self.limit / 8 + 1).min(self.advertised)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends what the window allows, of which the first `capacity` arrive; returns how many were sent.
    fn burst(window: &mut Window, capacity: u32) -> u32 {
        let before = window.sent;
        while window.open() {
            window.on_sent();
        }
        let sent = window.sent - before;
        let received = window.received + sent.min(capacity);
        window.on_seen(window.sent, received, Instant::now());
        sent
    }

    #[test]
    fn closes_and_opens_by_feedback() {
        let mut window = Window::new(4);
        for _ in 0..4 {
            assert!(window.open());
            window.on_sent();
        }
        assert!(!window.open());
        window.on_seen(2, 2, Instant::now());
        assert_eq!(window.in_flight(), 2);
        window.on_seen(1, 1, Instant::now());
        assert_eq!(window.in_flight(), 2, "old feedback changes nothing");
        window.on_seen(1_000_000, 1_000_000, Instant::now());
        assert_eq!(window.in_flight(), 0, "feedback from the future is cut");
    }

    #[test]
    fn random_losses_leave_the_window_alone() {
        let mut window = Window::new(240);
        for percent in [1, 5, 10] {
            let mut received = 0;
            window.begin(Instant::now());
            for number in 0..10_000u32 {
                window.on_sent();
                // Spread evenly, by a stride that shares no factor with the hundred.
                received += u32::from(number * 37 % 100 >= percent);
                window.on_seen(number + 1, received, Instant::now());
            }
            window.on_round(u64::from(10_000 - received));
            assert_eq!(window.limit, 240, "{percent} % lost");
        }
    }

    #[test]
    fn a_full_queue_is_not_kept_full() {
        let mut window = Window::new(240);
        window.begin(Instant::now());
        for _ in 0..20 {
            burst(&mut window, 40);
        }
        let (mut sent, mut trips) = (0, 0);
        while trips < 100 {
            sent += burst(&mut window, 40);
            trips += 1;
        }
        assert!((30 * 100..=50 * 100).contains(&sent), "{sent} frames where 4000 get through");
    }

    #[test]
    fn short_rounds_shrink_it_too_and_good_ones_restore_it() {
        let mut window = Window::new(240);
        for _ in 0..20 {
            window.begin(Instant::now());
            (0..100).for_each(|_| window.on_sent());
            window.on_round(90);
        }
        assert_eq!(window.limit, FLOOR);
        for _ in 0..40 {
            window.begin(Instant::now());
            (0..100).for_each(|_| window.on_sent());
            window.on_round(1);
        }
        assert_eq!(window.limit, 240);
        window.begin(Instant::now());
        (0..3).for_each(|_| window.on_sent());
        window.on_round(3);
        assert_eq!(window.limit, 240, "three frames are no measure");
    }

    #[test]
    fn a_sleeping_receiver_is_asked_and_not_flooded() {
        let mut window = Window::new(100);
        burst(&mut window, 100);
        let mut sent = 0;
        for _ in 0..75 {
            while window.open() {
                window.on_sent();
                sent += 1;
            }
            window.on_stall();
            assert!(window.open(), "a stall never stops the lane");
        }
        assert_eq!(sent, 100 + 74 * PROBES);
        window.on_seen(window.sent, window.sent, Instant::now());
        assert_eq!((window.limit, window.in_flight()), (100, 0), "it was only late");
    }

    #[test]
    fn a_sleeping_receiver_at_the_end_of_a_long_path_is_not_flooded_either() {
        let mut window = Window::new(100);
        let start = Instant::now();
        window.begin(start);
        window.on_way(Duration::from_millis(100), true);
        window.on_seen(0, 0, start);
        (0..100).for_each(|_| window.on_sent());
        window.on_seen(100, 100, start + Duration::from_millis(100));
        let mut sent = 0;
        while window.open() {
            window.on_sent();
            sent += 1;
        }
        assert_eq!(sent, 100 + 149, "1000 frames/s and half as many, for 99.5 ms");
        window.on_stall();
        let probes = std::iter::from_fn(|| window.open().then(|| window.on_sent())).count();
        assert_eq!(probes, PROBES as usize);
    }
}
