//! What must hold after a migration, as seen from outside.

use serde::Serialize;

use crate::lab::{Report, Side};

/// The most pings a user may lose.
const PINGS_LOST_MAX: u64 = 3;
/// The verdict on them, which depends on time.
pub const PINGS_LOST: &str = "pings lost ≤ 3";

/// What the lab saw of one migration. What a guest cannot show (a bare one answers no ping) is `None`.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Checks {
    /// Pages that the guest found changed, since it was started; `None` if it says nothing on the
    /// destination.
    pub guest_errors: Option<u64>,
    /// The guest has verified every page since it runs there.
    pub memory_swept: bool,
    /// The guest's counter goes on, on the destination's serial line.
    pub counter_continues: bool,
    /// The switch's port to the VM before the migration.
    pub fdb_before: Option<String>,
    /// The same afterwards.
    pub fdb_after: Option<String>,
    /// RARP frames with the VM's MAC that reached the client.
    pub rarp_captured: u64,
    /// Those of them that came before the VM ran on the destination; `None` if it was never seen to
    /// begin to.
    pub rarp_too_early: Option<u64>,
    /// Echo requests sent during the migration and a little longer.
    pub pings_sent: Option<u64>,
    /// Those without an answer.
    pub pings_lost: Option<u64>,
    /// The longest time without an answer, in milliseconds.
    pub longest_gap_ms: Option<f64>,
    /// The TCP connection opened before the first migration still works, and lost no byte.
    pub tcp_stream_alive: Option<bool>,
    /// How many QEMU processes run the VM afterwards.
    pub owner_count: u32,
    /// From the source's last STOP to the destination's RESUME by QEMU's own clock, in milliseconds;
    /// negative if both ran at once.
    pub blackout_seen_ms: Option<f64>,
    /// The source's QEMU has ended.
    pub source_gone: bool,
}

/// One thing that must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What.
    pub what: &'static str,
    /// Whether it does.
    pub holds: bool,
    /// What was seen.
    pub seen: String,
}

impl Checks {
    /// What must hold after a migration away from `source`; what does not apply is left out.
    pub fn verdicts(&self, report: &Report, source: Side) -> Vec<Verdict> {
        let verdict = |what, holds, seen: String| Verdict { what, holds, seen };
        let mut list = vec![
            verdict("completed", report.status() == Some("completed"), status(report)),
            verdict(
                "RAM equal on both sides",
                report.verified() == Some(true),
                report.get("/verified").map_or_else(|| "not in the report".to_owned(), ToString::to_string),
            ),
            self.guest_verified(),
            verdict(
                "guest's counter continues",
                self.counter_continues,
                format!("on {}'s serial line", source.other()),
            ),
            self.switch_learned(source),
            self.announced(report),
            verdict(
                "none before the VM ran there",
                self.rarp_too_early == Some(0),
                self.rarp_too_early
                    .map_or_else(|| "no RESUME seen".to_owned(), |count| format!("{count} too early")),
            ),
            verdict("one owner", self.owner_count == 1, format!("{} running", self.owner_count)),
            verdict(
                "never two owners",
                self.blackout_seen_ms.is_some_and(|ms| ms >= 0.0),
                self.blackout_seen_ms.map_or_else(
                    || "no STOP and RESUME seen".to_owned(),
                    |ms| format!("{ms:.1} ms from STOP to RESUME"),
                ),
            ),
            verdict("source's QEMU ended", self.source_gone, source.to_string()),
        ];
        if let Some(lost) = self.pings_lost {
            let gap = self.longest_gap_ms.unwrap_or_default();
            let seen = format!("{lost} of {}, longest gap {gap:.1} ms", self.pings_sent.unwrap_or_default());
            list.push(verdict(PINGS_LOST, lost <= PINGS_LOST_MAX, seen));
        }
        if let Some(alive) = self.tcp_stream_alive {
            let seen = if alive { "the same connection echoes" } else { "dead" };
            list.push(verdict("TCP stream alive", alive, seen.to_owned()));
        }
        list
    }

    fn guest_verified(&self) -> Verdict {
        let errors = self
            .guest_errors
            .map_or_else(|| "it says nothing".to_owned(), |errors| format!("{errors} errors"));
        let swept =
            if self.memory_swept { "every page verified since" } else { "not every page verified since" };
        Verdict {
            what: "guest found no changed page",
            holds: self.guest_errors == Some(0) && self.memory_swept,
            seen: format!("{errors}, {swept}"),
        }
    }

    /// QEMU announces itself as well, so one frame is not enough to show that all of the agent's came.
    fn announced(&self, report: &Report) -> Verdict {
        let sent = report.count("/announce/rarp-sent").unwrap_or_default();
        Verdict {
            what: "RARP reached the client",
            holds: self.rarp_captured >= sent.max(1),
            seen: format!("{} frames, {sent} of them by the agent", self.rarp_captured),
        }
    }

    fn switch_learned(&self, source: Side) -> Verdict {
        let port = |port: &Option<String>| port.clone().unwrap_or_else(|| "unknown".to_owned());
        let is = |port: &Option<String>, side: Side| port.as_deref() == Some(side.switch_port());
        Verdict {
            what: "switch learned the move",
            holds: is(&self.fdb_before, source) && is(&self.fdb_after, source.other()),
            seen: format!("FDB {} → {}", port(&self.fdb_before), port(&self.fdb_after)),
        }
    }
}

fn status(report: &Report) -> String {
    let status = report.status().unwrap_or("no status");
    match report.text("/error-desc") {
        Some(error) if !error.is_empty() => format!("{status}: {error}"),
        _ => status.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Checks {
        Checks {
            guest_errors: Some(0),
            memory_swept: true,
            counter_continues: true,
            fdb_before: Some("port-a".into()),
            fdb_after: Some("port-b".into()),
            rarp_captured: 5,
            rarp_too_early: Some(0),
            pings_sent: Some(400),
            pings_lost: Some(3),
            longest_gap_ms: Some(20.0),
            tcp_stream_alive: Some(true),
            owner_count: 1,
            blackout_seen_ms: Some(12.0),
            source_gone: true,
        }
    }

    fn failures(checks: &Checks, report: &str) -> Vec<&'static str> {
        let verdicts = checks.verdicts(&Report::parse(report).unwrap(), Side::A);
        verdicts.iter().filter(|verdict| !verdict.holds).map(|verdict| verdict.what).collect()
    }

    const COMPLETED: &str = r#"{"status":"completed","verified":true}"#;

    #[test]
    fn good_migration_passes() {
        assert!(failures(&good(), COMPLETED).is_empty());
    }

    #[test]
    fn bare_guest_has_no_network_checks() {
        let bare = Checks { pings_lost: None, tcp_stream_alive: None, ..good() };
        assert!(failures(&bare, COMPLETED).is_empty());
    }

    #[test]
    fn each_fault_fails_its_check() {
        assert_eq!(failures(&good(), "{}"), ["completed", "RAM equal on both sides"]);
        let cases = [
            (Checks { guest_errors: None, ..good() }, "guest found no changed page"),
            (Checks { memory_swept: false, ..good() }, "guest found no changed page"),
            (Checks { fdb_after: Some("port-a".into()), ..good() }, "switch learned the move"),
            (Checks { rarp_captured: 0, ..good() }, "RARP reached the client"),
            (Checks { rarp_too_early: Some(1), ..good() }, "none before the VM ran there"),
            (Checks { pings_lost: Some(4), ..good() }, PINGS_LOST),
            (Checks { tcp_stream_alive: Some(false), ..good() }, "TCP stream alive"),
            (Checks { owner_count: 2, ..good() }, "one owner"),
            (Checks { blackout_seen_ms: Some(-0.1), ..good() }, "never two owners"),
            (Checks { source_gone: false, ..good() }, "source's QEMU ended"),
            (Checks { counter_continues: false, ..good() }, "guest's counter continues"),
        ];
        for (checks, what) in cases {
            assert_eq!(failures(&checks, COMPLETED), [what]);
        }
    }

    #[test]
    fn announcements_that_got_lost_are_noticed() {
        let report = r#"{"status":"completed","verified":true,"announce":{"rarp-sent":6}}"#;
        assert_eq!(failures(&good(), report), ["RARP reached the client"]);
    }

    #[test]
    fn names_are_those_of_the_interface() {
        let json = serde_json::to_value(good()).unwrap();
        for name in ["guest-errors", "fdb-before", "rarp-captured", "longest-gap-ms", "tcp-stream-alive"] {
            assert!(json.get(name).is_some(), "{name}");
        }
    }
}
