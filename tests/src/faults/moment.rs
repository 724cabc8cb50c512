//! Waits for the moment at which a run's fault is to happen.

use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use serde_json::Value;

use super::plan::Moment;
use super::site::{ANSWER_LIMIT, Site};
use crate::lab::{Process, Side};

/// How often the agent is asked how far the migration is.
const ASKING: Duration = Duration::from_millis(2);
/// How often a wait for QEMU's word looks whether the migration still goes on.
const LOOKING: Duration = Duration::from_millis(20);
/// How long a migration may take to reach any moment.
const LIMIT: Duration = Duration::from_secs(20);

/// How far the source's agent last said the migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    Preparing,
    FirstRound,
    LaterRounds,
    /// Further than its rounds, or over.
    Beyond,
}

/// A migration that was started, as seen while it is waited for.
pub(super) struct Approach<'a> {
    pub site: &'a Site,
    pub source: Side,
    /// When it was asked for.
    pub begun: SystemTime,
    /// The agent's number for it.
    pub id: Option<String>,
    pub progress: Progress,
}

impl<'a> Approach<'a> {
    pub fn new(site: &'a Site, source: Side, begun: SystemTime) -> Self {
        Self { site, source, begun, id: None, progress: Progress::Preparing }
    }

    /// Returns at the moment, or at once if the migration has ended before.
    pub fn wait(&mut self, moment: Moment, command: &mut Process) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        let mut going_on =
            || Ok::<_, anyhow::Error>(command.try_wait()?.is_none() && Instant::now() < deadline);
        let (reached, after) = match moment {
            Moment::Preparing(after) => {
                let asked = self.begun;
                while sleep_until(asked + after, ASKING) && going_on()? {
                    self.look();
                }
                return Ok(());
            }
            Moment::FirstRound(after) => (Progress::FirstRound, after),
            Moment::LaterRounds(after) => (Progress::LaterRounds, after),
            Moment::Stopped(after) => {
                return self.wait_for_event(self.source, "STOP", after, going_on);
            }
            Moment::Resumed(after) => {
                return self.wait_for_event(self.source.other(), "RESUME", after, going_on);
            }
        };
        while (self.progress as u8) < reached as u8 && going_on()? {
            self.look();
            thread::sleep(ASKING);
        }
        let since = SystemTime::now();
        while sleep_until(since + after, ASKING) && going_on()? {
            self.look();
        }
        Ok(())
    }

    fn wait_for_event(
        &mut self,
        side: Side,
        name: &str,
        after: Duration,
        mut going_on: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        while self.id.is_none() && going_on()? {
            self.look();
            thread::sleep(ASKING);
        }
        loop {
            if let Some(event) = self.site.watch(side).wait_event(name, self.begun, LOOKING) {
                sleep_until(event.at + after, after);
                return Ok(());
            }
            if !going_on()? {
                return Ok(());
            }
        }
    }

    /// Asks the agent. That it does not answer says nothing new.
    fn look(&mut self) {
        let agent = self.site.host(self.source);
        let report = match &self.id {
            Some(id) => agent
                .get(&format!("/v1/migrations/{id}"), ANSWER_LIMIT)
                .map(|progress| progress["report"].clone()),
            None => agent.get("/v1/status", ANSWER_LIMIT).map(|status| status["leaving"][0].clone()),
        };
        let Ok(report) = report else { return };
        if let Some(id) = report["id"].as_str() {
            self.id.get_or_insert_with(|| id.to_owned());
            self.progress = progress(&report);
        }
    }
}

fn progress(report: &Value) -> Progress {
    let rounds = report["rounds"].as_array().map_or(0, Vec::len);
    match (report["phase"].as_str(), rounds) {
        (Some("preflight" | "prepare"), _) => Progress::Preparing,
        (Some("pre-copy"), 0) => Progress::FirstRound,
        (Some("pre-copy"), _) => Progress::LaterRounds,
        _ => Progress::Beyond,
    }
}

/// Sleeps until `then`, but no longer than `most`. Whether `then` is still to come.
fn sleep_until(then: SystemTime, most: Duration) -> bool {
    let left = then.duration_since(SystemTime::now()).unwrap_or_default();
    thread::sleep(left.min(most));
    left > most
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn progress_is_phase_and_rounds() {
        let of = |phase: &str, rounds: &[u32]| progress(&json!({"phase": phase, "rounds": rounds}));
        assert_eq!(of("prepare", &[]), Progress::Preparing);
        assert_eq!(of("pre-copy", &[]), Progress::FirstRound);
        assert_eq!(of("pre-copy", &[1, 2]), Progress::LaterRounds);
        assert_eq!(of("commit", &[1, 2]), Progress::Beyond);
    }

    #[test]
    fn sleeping_does_not_outlast_its_moment() {
        let begun = Instant::now();
        assert!(sleep_until(SystemTime::now() + Duration::from_secs(60), Duration::from_millis(1)));
        assert!(!sleep_until(SystemTime::now() + Duration::from_millis(1), Duration::from_secs(60)));
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
}
