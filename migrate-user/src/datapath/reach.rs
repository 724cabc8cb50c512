//! What a long path holds besides the queues at its ends.

use std::time::{Duration, Instant};

/// Way there and back for which a window that fills the queues is enough: by one queue 4 GB/s at MTU 9000.
const SHORT: Duration = Duration::from_micros(500);
/// Shortest stretch of time over which a rate is measured.
const STRETCH: Duration = Duration::from_millis(1);
/// Most frames that a path is taken to hold (512 MiB at MTU 9000).
const MOST: f64 = 65_536.0;
/// What is allowed of what came out while the rate grows.
const SEARCHING: f64 = 1.5;
/// By so much the rate must grow to count as growing.
const GROWS: f64 = 1.25;
/// Stretches without growth after which the path is known.
const KNOWN: u32 = 3;

/// Estimates how many frames a path holds by **what comes out of it in the time of a way there and back**: these are on the
/// path, and what is sent beyond them waits in its narrowest queue.
///
/// While the rate grows from stretch to stretch, half as many again are allowed, so that a path's rate is found within some ways
/// there and back and not in steps of a window (as by TCP's slow start, RFC 5681 §3.1; twice as many find it sooner, and lose
/// thousands of frames once they have).
#[derive(Debug, Default)]
pub(super) struct Reach {
    /// There and back, without a queue.
    way: Option<Duration>,
    /// Whether it is sure that no busy processor made it longer than it is.
    sure: bool,
    /// Frames a second that came out: the best of late.
    rate: f64,
    /// The rate when it last grew.
    mark: f64,
    /// Stretches since.
    flat: u32,
    /// Begin of the stretch that is being measured, and frames received by then; `None` until the first of the epoch come.
    stretch: Option<(Instant, u32)>,
    /// When the first frame of the epoch left.
    begun: Option<Instant>,
}

impl Reach {
    /// Begins a new epoch with the first frame's sending.
    pub fn begin(&mut self, now: Instant) {
        (self.begun, self.stretch) = (Some(now), None);
    }

    /// A frame and the word that it came take so long where they meet no queue; whether that is `sure`.
    pub fn on_way(&mut self, way: Duration, sure: bool) {
        (self.way, self.sure) = (Some(way), sure);
    }

    /// The receiver has got `received` frames of this epoch.
    pub fn on_received(&mut self, received: u32, now: Instant) {
        let Some(way) = self.way else { return };
        // Nothing can come before a way there and back: that is no sign of a slow path.
        let (begun, before) = *self.stretch.get_or_insert((now, received));
        let took = now.saturating_duration_since(begun);
        if took < way.max(STRETCH) {
            return;
        }
        self.stretch = Some((now, received));
        let rate = f64::from(received.saturating_sub(before)) / took.as_secs_f64();
        self.rate = rate.max(self.rate * 7.0 / 8.0);
        if rate > self.mark * GROWS {
            (self.mark, self.flat) = (rate, 0);
        } else {
            self.flat = self.flat.saturating_add(1);
        }
    }

    /// Too much is lost: there is no more to be found.
    pub fn on_full(&mut self) {
        self.flat = KNOWN;
    }

    /// Frames that may be on their way besides the `window` of those in queues. As many as came out in the time since the epoch began, at
    /// most: a path that is empty is not filled at once. And half a window, which the receiver keeps free for it
    /// ([`with_reach`]), where the path may be shorter than it seems.
    pub fn frames(&self, window: u32, now: Instant) -> u32 {
        let most = if self.sure { MOST } else { f64::from(window / 2) };
        let beyond = self.way.map_or(Duration::ZERO, |way| way.saturating_sub(SHORT));
        let since = self.begun.map_or(Duration::ZERO, |begun| now.saturating_duration_since(begun));
        let share = if self.flat < KNOWN { SEARCHING } else { 1.0 };
        (self.rate * share * beyond.min(since).as_secs_f64()).min(most) as u32
    }
}

/// The window for a receiver with `room` for frames: with half as many beside it, an eighth of the room stays free for probes and strays.
pub(crate) const fn with_reach(room: usize) -> usize {
    room * 7 / 8 * 2 / 3
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::super::window::Window;
    use super::*;

    /// A path without a clock of its own: a queue of `room` frames in front of a wire that carries one every `frame`, `delay`
    /// long each way.
    struct Path {
        delay: Duration,
        frame: Duration,
        room: usize,
    }

    /// What came of a round.
    #[derive(Debug)]
    struct Came {
        frames: u32,
        lost: u32,
        /// Most that ever waited in the queue.
        queued: usize,
        /// Frames that came in the last quarter of the time, of those that the wire can carry in it.
        late: f64,
    }

    impl Path {
        /// Sends all that the window allows for so long, by a sender that is ten times as fast as the wire.
        fn round(&self, window: &mut Window, start: Instant, time: Duration) -> Came {
            let step = self.frame / 10;
            let mut now = start;
            window.begin(now);
            let (mut queue, mut wire) = (VecDeque::new(), VecDeque::new());
            let mut came = Came { frames: 0, lost: 0, queued: 0, late: 0.0 };
            let (mut sent, mut late) = (0u32, 0u32);
            let mut free = now;
            let mut timed = None;
            while now < start + time {
                if window.open() {
                    sent += 1;
                    window.on_sent();
                    timed = timed.or(Some((sent, now)));
                    if queue.len() < self.room { queue.push_back(sent) } else { came.lost += 1 }
                }
                came.queued = came.queued.max(queue.len());
                if now >= free
                    && let Some(number) = queue.pop_front()
                {
                    free = now + self.frame;
                    wire.push_back((number, now + self.frame + self.delay * 2));
                }
                if wire.front().is_some_and(|&(_, due)| due <= now)
                    && let Some((number, _)) = wire.pop_front()
                {
                    came.frames += 1;
                    late += u32::from(now > start + time * 3 / 4);
                    if let Some((_, begun)) = timed.take_if(|(timed, _)| *timed <= number) {
                        window.on_way((now - begun).min(self.delay * 2 + self.frame), true);
                    }
                    window.on_seen(number, came.frames, now);
                }
                window.on_time(now);
                now += step;
            }
            came.late = f64::from(late) * self.frame.as_secs_f64() / (time / 4).as_secs_f64();
            came
        }
    }

    #[test]
    fn a_long_path_is_filled_and_its_queue_is_not() {
        for (delay_ms, frame_us) in [(1, 10), (5, 10), (20, 10), (75, 20), (75, 100)] {
            let path = Path {
                delay: Duration::from_millis(delay_ms),
                frame: Duration::from_micros(frame_us),
                room: usize::MAX,
            };
            let mut window = Window::new(240);
            let start = Instant::now();
            let time = path.delay * 40;
            let first = path.round(&mut window, start, time);
            assert!(first.late > 0.95, "{delay_ms} ms, {frame_us} µs: {first:?}");
            // It knows the path now, and does not throw all that it holds into its queue.
            let second = path.round(&mut window, start + time * 2, time);
            assert!(second.late > 0.95, "{delay_ms} ms, {frame_us} µs: {second:?}");
            assert!(second.queued <= 600, "{delay_ms} ms, {frame_us} µs: {second:?}");
        }
    }

    #[test]
    fn a_narrow_queue_on_a_long_path_loses_little() {
        let path = Path { delay: Duration::from_millis(10), frame: Duration::from_micros(10), room: 300 };
        let mut window = Window::new(240);
        let start = Instant::now();
        let came = path.round(&mut window, start, Duration::from_secs(1));
        assert!(came.lost < came.frames / 25, "what has overflowed is no path that grows: {came:?}");
        let came = path.round(&mut window, start + Duration::from_secs(2), Duration::from_secs(1));
        assert!(came.late > 0.9 && came.lost < came.frames / 50, "{came:?}");
    }

    /// A path so long, of which `frames` come within a second.
    fn reach(way: Duration, frames: u32) -> (Reach, Instant) {
        let mut reach = Reach::default();
        let start = Instant::now();
        reach.begin(start);
        reach.on_way(way, true);
        reach.on_received(0, start);
        let end = start + way.max(Duration::from_secs(1));
        reach.on_received(frames, end);
        (reach, end)
    }

    #[test]
    fn a_short_path_holds_nothing() {
        let (short, end) = reach(SHORT, 100_000);
        assert_eq!(short.frames(240, end), 0);
        let way = SHORT + Duration::from_millis(1);
        let (mut longer, end) = reach(way, 100_000);
        assert_eq!(
            longer.frames(240, end),
            150,
            "a millisecond of them, and half as many while it may be growing"
        );
        // A receiver that was just being woken looks the same.
        longer.on_way(way, false);
        assert_eq!(longer.frames(240, end), 120);
        let room = with_reach(1000) as u32;
        assert!((800..=875).contains(&(room + room / 2)), "{room}");
    }

    #[test]
    fn a_moment_without_frames_is_not_the_path() {
        let (mut reach, end) = reach(SHORT + Duration::from_millis(8), 100_000);
        assert_eq!(reach.frames(240, end), 1200);
        let later = end + Duration::from_secs(1);
        reach.on_received(100_000, later);
        assert_eq!(reach.frames(240, later), 1050);
    }

    #[test]
    fn nothing_is_unbounded() {
        let (reach, end) = reach(Duration::from_secs(3600), u32::MAX);
        assert_eq!(reach.frames(240, end), MOST as u32);
    }
}
