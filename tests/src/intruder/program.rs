//! How long an agent's XDP program runs, as the kernel measures it.

use std::fs;

use anyhow::{Context, Result};

/// Has the kernel measure all BPF programs (`kernel.bpf_stats_enabled`, Documentation/admin-guide/sysctl/kernel.rst).
const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// The kernel measures until this is dropped.
pub(super) struct Statistics {
    before: String,
}

impl Statistics {
    /// Begins.
    pub fn enable() -> Result<Self> {
        let before = fs::read_to_string(SWITCH).with_context(|| format!("reading {SWITCH}"))?;
        fs::write(SWITCH, "1").with_context(|| format!("writing {SWITCH}"))?;
        Ok(Self { before })
    }
}

impl Drop for Statistics {
    fn drop(&mut self) {
        if let Err(error) = fs::write(SWITCH, &self.before) {
            eprintln!("{SWITCH} stays switched on: {error}");
        }
    }
}

/// Runs of a program and their time, the measuring included.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProgramTime {
    /// All runs together, ns.
    nanoseconds: u64,
    /// How many.
    pub runs: u64,
}

impl ProgramTime {
    /// Of the program that process `pid` holds.
    pub fn read(pid: u32) -> Result<Self> {
        let dir = format!("/proc/{pid}/fd");
        let entries = fs::read_dir(&dir).with_context(|| format!("reading {dir}"))?;
        let is_program = |entry: &fs::DirEntry| {
            fs::read_link(entry.path()).is_ok_and(|target| target.to_string_lossy().contains("bpf-prog"))
        };
        let program = entries.flatten().find(is_program).with_context(|| format!("no program in {dir}"))?;
        let path = format!("/proc/{pid}/fdinfo/{}", program.file_name().to_string_lossy());
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let field = |name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            value.and_then(|value| value.trim().parse().ok()).with_context(|| format!("no {name} in {path}"))
        };
        Ok(Self { nanoseconds: field("run_time_ns")?, runs: field("run_cnt")? })
    }

    /// What came since.
    pub fn since(self, before: Self) -> Self {
        Self { nanoseconds: self.nanoseconds - before.nanoseconds, runs: self.runs - before.runs }
    }

    /// One run, ns.
    pub fn each(self) -> f64 {
        self.nanoseconds as f64 / self.runs as f64
    }
}
