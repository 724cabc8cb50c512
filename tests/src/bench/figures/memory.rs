//! Memory that a process has to itself.

use std::fs;

/// Memory of its own that a process has in RAM, bytes; `None` when it is gone.
///
/// Anonymous memory alone: heap, stacks, frame buffers (UMEM). The guest's RAM is a mapped file and not in it, nor are pages of the
/// program. What the kernel keeps in socket buffers is nowhere counted by process.
pub(in crate::bench) fn anonymous(pid: i32) -> Option<u64> {
    parse(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
}

/// `RssAnon` in kB (proc_pid_status(5)).
fn parse(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    let (kib, "kB") = line.trim().split_once(' ')? else { return None };
    Some(kib.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_anonymous_memory_counts() {
        let status =
            "Name:\tx\nVmHWM:\t  900 kB\nVmRSS:\t  800 kB\nRssAnon:\t   12 kB\nRssShmem:\t  700 kB\n";
        assert_eq!(parse(status), Some(12 * 1024));
        assert_eq!(parse("Name:\tx\n"), None);
        assert!(anonymous(std::process::id() as i32).unwrap() > 0);
    }
}
