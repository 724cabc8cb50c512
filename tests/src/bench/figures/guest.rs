//! What the guest notices while it is moved: how many pages it gets to write.

use std::time::SystemTime;

use serde::Serialize;

/// The guest's own count of pages written, when it was seen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::bench) struct Progress {
    pub at: SystemTime,
    pub pages: u64,
}

/// How fast the guest wrote before the migration, and while it was copied.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(in crate::bench) struct Pace {
    /// Pages a second before.
    pub before: f64,
    /// Pages a second from the request until the guest was stopped.
    pub during: f64,
}

impl Pace {
    /// From what was seen until `stop`; the migration began at `begin`. `None` when the guest said too little: it
    /// reports ten times a second.
    pub fn of(seen: &[Progress], begin: SystemTime, stop: SystemTime) -> Option<Self> {
        let during = seen.iter().filter(|progress| (begin..=stop).contains(&progress.at));
        let before = seen.iter().filter(|progress| progress.at < begin);
        Some(Self { before: slope(before)?, during: slope(during)? })
    }

    /// Part of its pace that the guest kept.
    pub fn kept(self) -> f64 {
        self.during / self.before
    }
}

/// Pages a second from the first to the last.
fn slope<'a>(seen: impl Iterator<Item = &'a Progress> + Clone) -> Option<f64> {
    let first = seen.clone().next()?;
    let last = seen.last()?;
    let seconds = last.at.duration_since(first.at).ok()?.as_secs_f64();
    (seconds > 0.0).then(|| last.pages.saturating_sub(first.pages) as f64 / seconds)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_guest_at_half_its_pace_kept_half() {
        let at = |ms: u64| SystemTime::UNIX_EPOCH + Duration::from_millis(ms);
        let seen: Vec<Progress> = [(0, 0), (100, 100), (200, 200), (300, 250), (400, 300), (500, 900)]
            .map(|(ms, pages)| Progress { at: at(ms), pages })
            .into();
        let pace = Pace::of(&seen, at(200), at(400)).unwrap();
        assert!((pace.before - 1000.0).abs() < 1e-6 && (pace.kept() - 0.5).abs() < 1e-6, "{pace:?}");
        // One report alone is no pace.
        assert_eq!(Pace::of(&seen, at(200), at(250)), None);
        assert_eq!(Pace::of(&[], at(0), at(9)), None);
    }
}
