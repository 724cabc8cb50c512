//! Reports of past migrations, one JSON file each.

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::report::{Report, Status};

/// Reports that are remembered also when their file could not be written.
const REMEMBERED: usize = 64;

/// The reports' directory.
pub(super) struct History {
    directory: PathBuf,
    next: AtomicU64,
    latest: Mutex<VecDeque<Report>>,
}

impl History {
    pub fn open(state_dir: &Path) -> std::io::Result<Self> {
        let directory = state_dir.join("reports");
        std::fs::create_dir_all(&directory)?;
        let next = numbers(&directory).into_iter().map(|(number, _)| number + 1).max().unwrap_or(1);
        Ok(Self { directory, next: AtomicU64::new(next), latest: Mutex::default() })
    }

    /// A new id: host's name and a number that is never used again while its report exists.
    pub fn next_id(&self, host: &str) -> String {
        format!("{host}-{}", self.next.fetch_add(1, Ordering::Relaxed))
    }

    pub fn store(&self, report: &Report) {
        {
            let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
            latest.push_front(report.clone());
            latest.truncate(REMEMBERED);
        }
        let path = self.directory.join(format!("{}.json", report.id));
        let stored = serde_json::to_vec_pretty(report).map_err(std::io::Error::from).and_then(|text| {
            // Whole or not at all: a full disk must not leave half a report.
            let temporary = path.with_extension("json.new");
            std::fs::write(&temporary, text)?;
            std::fs::rename(temporary, &path)
        });
        if let Err(error) = stored {
            tracing::warn!(path = %path.display(), %error, "the report is not stored");
        }
    }

    /// Adds to the report of a session that was left unsettled how it was settled.
    pub fn settle(&self, session: u64, how: &str) {
        let found = self.recent(REMEMBERED).into_iter().find(|report| report.session == session);
        if let Some(mut report) = found
            && report.status == Status::Unsettled
        {
            report.notes.push(format!("settled later: {how}"));
            self.latest.lock().unwrap_or_else(PoisonError::into_inner).retain(|other| other.id != report.id);
            self.store(&report);
        }
    }

    pub fn read(&self, id: &str) -> Option<Report> {
        let latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(report) = latest.iter().find(|report| report.id == id) {
            return Some(report.clone());
        }
        drop(latest);
        // An id is a file name of ours, not a path of the caller's.
        if id.contains(['/', '\0']) || id.starts_with('.') {
            return None;
        }
        let text = std::fs::read(self.directory.join(format!("{id}.json"))).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// The newest `count` reports, newest first.
    pub fn recent(&self, count: usize) -> Vec<Report> {
        let mut found = numbers(&self.directory);
        let latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
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
        let history = History::open(dir.path()).unwrap();
        for _ in 0..12 {
            let id = history.next_id("host-a");
            history.store(&Report { id, ..Report::default() });
        }
        let again = History::open(dir.path()).unwrap();
        assert_eq!(again.next_id("host-a"), "host-a-13");
        assert_eq!(
            again.recent(2).iter().map(|r| r.id.as_str()).collect::<Vec<_>>(),
            ["host-a-12", "host-a-11"]
        );
        assert!(again.read("../reports/host-a-1").is_none());
    }

    #[test]
    fn a_full_disk_does_not_lose_the_latest_reports() {
        let dir = tempfile::tempdir().unwrap();
        let history = History::open(dir.path()).unwrap();
        std::fs::remove_dir_all(dir.path()).unwrap();
        let id = history.next_id("host-a");
        history.store(&Report { id: id.clone(), ..Report::default() });
        assert!(history.read(&id).is_some());
        assert_eq!(history.recent(5).len(), 1);
    }
}
