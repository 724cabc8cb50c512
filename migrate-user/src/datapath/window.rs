//! How many frames may be on their way.

/// Fewest frames the window shrinks to: less would stall on every feedback.
const FLOOR: u32 = 16;

/// Flow control of one lane: never more frames in flight than the receiver has room for; halved by loss,
/// grown again by clean rounds.
#[derive(Debug)]
pub struct Window {
    /// What the receiver said it can hold, frames.
    advertised: u32,
    /// What we use of it.
    limit: u32,
    /// Frames sent in this epoch.
    sent: u32,
    /// Frames the receiver has seen, or that we gave up waiting for.
    seen: u32,
}

impl Window {
    /// A window of `advertised` frames.
    pub fn new(advertised: u32) -> Self {
        let advertised = advertised.max(1);
        Self { advertised, limit: advertised, sent: 0, seen: 0 }
    }

    /// Begins a new epoch: numbers start from 0 again.
    pub fn begin(&mut self) {
        self.sent = 0;
        self.seen = 0;
    }

    /// Whether another frame may go.
    pub fn open(&self) -> bool {
        self.sent - self.seen < self.limit
    }

    /// Frames on their way.
    pub fn in_flight(&self) -> u32 {
        self.sent - self.seen
    }

    /// Notes a frame sent.
    pub fn on_sent(&mut self) {
        self.sent += 1;
    }

    /// Notes that the receiver has seen all numbers below `seen`, or lost them for good.
    pub fn on_seen(&mut self, seen: u32) {
        self.seen = self.seen.max(seen.min(self.sent));
    }

    /// Nothing was heard for too long: what is on its way is taken for lost.
    pub fn on_stall(&mut self) {
        self.seen = self.sent;
        self.shrink();
    }

    /// A round is accounted for.
    pub fn on_round(&mut self, lost: u64) {
        if lost > 0 {
            self.shrink();
        } else {
            self.limit = (self.limit + self.limit / 4 + 1).min(self.advertised);
        }
    }

    fn shrink(&mut self) {
        self.limit = (self.limit / 2).max(FLOOR).min(self.advertised);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closes_and_opens_by_feedback() {
        let mut window = Window::new(4);
        for _ in 0..4 {
            assert!(window.open());
            window.on_sent();
        }
        assert!(!window.open());
        window.on_seen(2);
        assert_eq!(window.in_flight(), 2);
        window.on_seen(1);
        assert_eq!(window.in_flight(), 2, "old feedback changes nothing");
        window.on_seen(1_000_000);
        assert_eq!(window.in_flight(), 0, "feedback from the future is cut");
    }

    #[test]
    fn loss_halves_and_clean_rounds_restore() {
        let mut window = Window::new(256);
        window.on_round(1);
        assert_eq!(window.limit, 128);
        for _ in 0..10 {
            window.on_round(5);
        }
        assert_eq!(window.limit, FLOOR);
        for _ in 0..20 {
            window.on_round(0);
        }
        assert_eq!(window.limit, 256);
    }

    #[test]
    fn a_stall_never_stops_the_lane() {
        let mut window = Window::new(1);
        window.on_sent();
        assert!(!window.open());
        window.on_stall();
        assert!(window.open());
    }
}
