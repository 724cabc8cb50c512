//! Reports of past migrations, one JSON file each.

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    files,
    migration::{Session, Verdict},
    report::{Phase, Report, Status},
    sync::lock,
};

/// Longest report that is read, bytes.
const MAX_REPORT: u64 = 64 << 20;
/// Reports that are remembered also when their file could not be written.
const REMEMBERED: usize = 64;

/// The reports' directory.
pub(super) struct History {
    directory: PathBuf,
    next: AtomicU64,
    latest: Mutex<VecDeque<Report>>,
}

impl History {
    /// Opens the directory. `known` are ids that are taken although no report is stored under them.
    pub fn open(state_dir: &Path, known: &[String]) -> std::io::Result<Self> {
        let directory = state_dir.join("reports");
        std::fs::create_dir_all(&directory)?;
        let stored = numbers(&directory).into_iter().map(|(number, _)| number);
        let known = known.iter().filter_map(|id| number(id));
        let next = stored.chain(known).max().map_or(1, |last| last + 1);
        Ok(Self { directory, next: AtomicU64::new(next), latest: Mutex::default() })
    }

    /// A new id: host's name and a number that is never used again while its report exists.
    pub fn next_id(&self, host: &str) -> String {
        format!("{host}-{}", self.next.fetch_add(1, Ordering::Relaxed))
    }

    pub fn store(&self, report: &Report) {
        {
            let mut latest = lock(&self.latest);
            latest.push_front(report.clone());
            latest.truncate(REMEMBERED);
        }
        let path = self.directory.join(format!("{}.json", report.id));
        let stored = serde_json::to_vec_pretty(report).map_err(std::io::Error::from).and_then(|text| {
            // Whole or not at all: a full disk must not leave half a report.
            let temporary = path.with_extension("json.new");
            let written = std::fs::write(&temporary, text).and_then(|()| std::fs::rename(&temporary, &path));
            if written.is_err() {
                // It may not even be there.
                let _ = std::fs::remove_file(temporary);
            }
            written
        });
        if let Err(error) = stored {
            tracing::warn!(path = %path.display(), %error, "the report is not stored");
        }
    }

    /// Adds to the report of a session how it was settled in the end. One that died with an earlier life of the agent
    /// gets a report now.
    pub fn settle(&self, host: &str, session: &Session, verdict: Verdict, how: &str) {
        let mut report = self.read(&session.id).unwrap_or_else(|| Report {
            id: session.id.clone(),
            session: session.session,
            vm: session.vm.clone(),
            source: host.into(),
            destination: session.peer.map(|peer| peer.to_string()).unwrap_or_default(),
            status: Status::Unsettled,
            phase: Phase::Ended,
            error_desc: Some("the agent ended while the migration was under way".into()),
            ..Report::default()
        });
        if report.status == Status::Unsettled {
            report.status = match verdict {
                Verdict::Accepted => Status::Completed,
                Verdict::Refused => Status::Failed,
            };
        }
        report.notes.push(format!("settled later: {how}"));
        lock(&self.latest).retain(|other| other.id != report.id);
        self.store(&report);
    }

    pub fn read(&self, id: &str) -> Option<Report> {
        let latest = lock(&self.latest);
        if let Some(report) = latest.iter().find(|report| report.id == id) {
            return Some(report.clone());
        }
        drop(latest);
        // An id is a file name of ours, not a path of the caller's.
        if id.contains(['/', '\0']) || id.starts_with('.') {
            return None;
        }
        let text = files::read(self.directory.join(format!("{id}.json")), MAX_REPORT).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// The newest `count` reports, newest first.
    pub fn recent(&self, count: usize) -> Vec<Report> {
        let mut found = numbers(&self.directory);
        let latest = lock(&self.latest);
        found.extend(latest.iter().filter_map(|report| Some((number(&report.id)?, report.id.clone()))));
        drop(latest);
        found.sort_unstable_by(|a, b| b.cmp(a));
        found.dedup();
        found.into_iter().filter_map(|(_, id)| self.read(&id)).take(count).collect()
    }
}

/// `(number, id)` of every stored report.
fn numbers(directory: &Path) -> Vec<(u64, String)> {
    std::fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let id = name.to_str()?.strip_suffix(".json")?;
            Some((number(id)?, id.to_owned()))
        })
        .collect()
}

fn number(id: &str) -> Option<u64> {
    id.rsplit('-').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_go_on_after_a_restart_and_reports_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let history = History::open(dir.path(), &[]).unwrap();
        for _ in 0..12 {
            let id = history.next_id("host-a");
            history.store(&Report { id, ..Report::default() });
        }
        let again = History::open(dir.path(), &[]).unwrap();
        assert_eq!(again.next_id("host-a"), "host-a-13");
        assert_eq!(
            again.recent(2).iter().map(|r| r.id.as_str()).collect::<Vec<_>>(),
            ["host-a-12", "host-a-11"]
        );
        assert!(again.read("../reports/host-a-1").is_none());
        // One whose report died with its agent.
        let again = History::open(dir.path(), &["host-a-20".into()]).unwrap();
        assert_eq!(again.next_id("host-a"), "host-a-21");
    }

    #[test]
    fn a_full_disk_does_not_lose_the_latest_reports() {
        let dir = tempfile::tempdir().unwrap();
        let history = History::open(dir.path(), &[]).unwrap();
        std::fs::remove_dir_all(dir.path()).unwrap();
        let id = history.next_id("host-a");
        history.store(&Report { id: id.clone(), ..Report::default() });
        assert!(history.read(&id).is_some());
        assert_eq!(history.recent(5).len(), 1);
    }
}
