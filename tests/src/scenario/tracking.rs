//! Whether somebody tracks a QEMU's memory: what a migration must never leave behind.

use std::fs;
use std::io::ErrorKind;

use anyhow::{Context, Result};

/// Flags of a mapping that a userfaultfd watches for missing pages or writes (`VmFlags` in proc_pid_smaps(5)).
const WATCHED: [&str; 2] = ["um", "uw"];

/// Whether process `pid` holds a userfaultfd, or one of anybody's watches its memory.
///
/// # Errors
/// If the process cannot be looked at.
pub fn tracked(pid: i32) -> Result<bool> {
    Ok(holds_userfaultfd(pid)? || is_watched(pid)?)
}

fn holds_userfaultfd(pid: i32) -> Result<bool> {
    let path = format!("/proc/{pid}/fd");
    let entries = fs::read_dir(&path).with_context(|| format!("reading {path}"))?;
    let mut targets = entries.flatten().filter_map(|entry| match fs::read_link(entry.path()) {
        // Closed since it was listed.
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        other => other.ok(),
    });
    Ok(targets.any(|target| target.to_string_lossy().contains("userfaultfd")))
}

fn is_watched(pid: i32) -> Result<bool> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    Ok(any_watched(&text))
}

fn any_watched(smaps: &str) -> bool {
    let flags = smaps.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
    flags.flat_map(str::split_whitespace).any(|flag| WATCHED.contains(&flag))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_whole_words_of_their_line() {
        assert!(any_watched("Size: 4 kB\nVmFlags: rd wr sh mr uw sd\n"));
        assert!(!any_watched("Size: uw kB\nVmFlags: rd wr sh mr umx sd\n"));
    }

    #[test]
    fn we_are_not_tracked() {
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(!tracked(pid).unwrap());
    }
}
