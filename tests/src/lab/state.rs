//! Who owns a lab. A file per lab names the process, so that the next one can tell a lab in use
//! from what a killed process left behind.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::layout::{Layout, ROOT};

/// Contents of a lab's state file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct State {
    pub prefix: String,
    /// The process that made the lab.
    pub pid: u32,
    /// When that process started, in clock ticks since boot: its number may be somebody else's later.
    pub start_time: u64,
    /// The lab was left up on purpose.
    pub kept: bool,
    pub disk: PathBuf,
}

impl State {
    /// This process' claim on `layout`.
    pub fn own(layout: &Layout, kept: bool) -> Result<Self> {
        let pid = std::process::id();
        let start_time = start_time(pid).context("cannot read our own start time from /proc")?;
        let disk = layout.disk().to_owned();
        Ok(Self { prefix: layout.prefix().to_owned(), pid, start_time, kept, disk })
    }

    pub fn layout(&self) -> Layout {
        Layout::of_state(&self.prefix, &self.disk)
    }

    /// Whether the process that made the lab still runs.
    pub fn owner_lives(&self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }

    /// Left behind by a process that was killed.
    pub fn is_stale(&self) -> bool {
        !self.kept && !self.owner_lives()
    }

    /// Reads a state file; `None` if there is none or it was cut short by a crash.
    pub fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    /// Writes the state file so that a reader never sees half of it.
    pub fn write(&self) -> Result<()> {
        let path = self.layout().state_file();
        let draft = path.with_extension("json.new");
        let text = serde_json::to_vec_pretty(self).context("encoding the lab's state")?;
        fs::write(&draft, text).with_context(|| format!("writing {}", draft.display()))?;
        fs::rename(&draft, &path).with_context(|| format!("writing {}", path.display()))
    }

    /// The state files of all labs on this machine.
    pub fn all() -> Vec<Self> {
        let Ok(entries) = fs::read_dir(ROOT) else { return Vec::new() };
        let paths = entries.flatten().map(|entry| entry.path());
        paths
            .filter(|path| path.to_string_lossy().ends_with("lab.json"))
            .filter_map(|path| Self::read(&path))
            .collect()
    }
}

/// Holds the lock under which labs are claimed and stale ones removed; released on drop. The lock is on
/// a directory that exists anyway, so that no lock file stays behind.
pub(super) struct Registry {
    _lock: File,
}

impl Registry {
    /// Waits for the lock.
    pub fn open() -> Result<Self> {
        let parent = Path::new(ROOT).parent().unwrap_or(Path::new("/"));
        let file = File::open(parent).with_context(|| format!("cannot open {}", parent.display()))?;
        flock(&file, FlockOperation::LockExclusive)
            .with_context(|| format!("cannot lock {}", parent.display()))?;
        fs::create_dir_all(ROOT).with_context(|| format!("cannot make {ROOT} (root is needed)"))?;
        Ok(Self { _lock: file })
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // Fails while there is a lab, as it should.
        let _ = fs::remove_dir(ROOT);
    }
}

/// Field 22 of `/proc/PID/stat`. The command's name before it may contain spaces and parentheses.
/// `None` also for a zombie, which owns nothing any more.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_process_lives_and_another_with_its_number_does_not() {
        let layout = Layout::new("x-", Path::new("/cache"));
        let mut state = State::own(&layout, false).unwrap();
        assert!(state.owner_lives() && !state.is_stale());
        state.start_time += 1;
        assert!(state.is_stale());
        state.kept = true;
        assert!(!state.is_stale());
    }

    #[test]
    fn start_time_is_that_of_the_process() {
        assert!(start_time(1).is_some());
        assert_eq!(start_time(u32::MAX), None);
    }
}
