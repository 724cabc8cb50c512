//! Reports of past migrations, one JSON file each.

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use crate::report::Report;

/// The reports' directory.
pub(super) struct History {
    directory: PathBuf,
    next: AtomicU64,
}

impl History {
    pub fn open(state_dir: &Path) -> std::io::Result<Self> {
        let directory = state_dir.join("reports");
        std::fs::create_dir_all(&directory)?;
        let next = numbers(&directory).into_iter().map(|(number, _)| number + 1).max().unwrap_or(1);
        Ok(Self { directory, next: AtomicU64::new(next) })
    }

    /// A new id: host's name and a number that is never used again while its report exists.
    pub fn next_id(&self, host: &str) -> String {
        format!("{host}-{}", self.next.fetch_add(1, Ordering::Relaxed))
    }

    pub fn store(&self, report: &Report) {
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

    pub fn read(&self, id: &str) -> Option<Report> {
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
        found.sort_unstable_by(|a, b| b.cmp(a));
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
            let number = id.rsplit('-').next()?.parse().ok()?;
            Some((number, id.to_owned()))
        })
        .collect()
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
        assert_eq!(again.recent(2).iter().map(|r| r.id.as_str()).collect::<Vec<_>>(), ["host-a-12", "host-a-11"]);
        assert!(again.read("../reports/host-a-1").is_none());
    }
}
