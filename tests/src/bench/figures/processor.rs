//! Processor time: of processes, of a guest's virtual processors, and of the whole machine.
//!
//! Both hosts are namespaces of one machine. What the kernel does for a migration outside of any process (softirqs, kernel
//! threads) belongs to neither, so the figure that counts is the machine's: all that its processors worked during the migration, less what the
//! guest's own virtual processors did. It is the same sum for whoever migrates. The parts by process are for finding
//! out where it goes.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// Clock ticks of `/proc/stat` and `/proc/PID/stat` in a second (`USER_HZ`, 100 on every Linux that this runs on).
const TICKS: f64 = 100.0;

/// What the machine's processors have done since it started, s.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(in crate::bench) struct Machine {
    /// Everything but waiting, and but what a hypervisor below took away.
    pub busy: f64,
    /// Softirqs alone, as far as they did not run in a process' time.
    pub softirq: f64,
}

impl Machine {
    /// Reads it now.
    pub fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
        Self::parse(&text).context("/proc/stat has no line for all processors")
    }

    fn parse(text: &str) -> Option<Self> {
        // cpu user nice system idle iowait irq softirq steal guest guest_nice (proc_stat(5)); guest is part of user.
        let line = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
        let ticks: Vec<f64> =
            line.split_whitespace().map(|field| field.parse()).collect::<Result<_, _>>().ok()?;
        let [user, nice, system, _idle, _iowait, irq, softirq, ..] = ticks[..] else { return None };
        Some(Self { busy: (user + nice + system + irq + softirq) / TICKS, softirq: softirq / TICKS })
    }
}

/// Processor time that all threads of a process have used, ended ones included, s; `None` when it is gone.
pub(in crate::bench) fn of_process(pid: i32) -> Option<f64> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Fields 14 and 15, counted from behind the name, which may hold anything (proc_pid_stat(5)).
fn parse_stat(stat: &str) -> Option<f64> {
    let (_, behind) = stat.rsplit_once(')')?;
    let mut fields = behind.split_whitespace().skip(11).map(|field| field.parse::<f64>().ok());
    Some((fields.next()?? + fields.next()??) / TICKS)
}

/// A QEMU's threads that run the guest's virtual processors. They have names where QEMU was started with
/// `-name debug-threads=on`.
pub(in crate::bench) fn virtual_processors(pid: i32) -> Vec<i32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let runs_guest = |task: &Path| {
        let name = fs::read_to_string(task.join("comm")).unwrap_or_default();
        is_virtual_processor(name.trim())
    };
    let tasks = tasks.flatten().filter(|task| runs_guest(&task.path()));
    tasks.filter_map(|task| task.file_name().to_str()?.parse().ok()).collect()
}

/// `CPU 0/KVM`, `CPU 0/TCG`, or `ALL CPUs/TCG` of a QEMU that has one thread for all.
fn is_virtual_processor(name: &str) -> bool {
    name.ends_with("/KVM") || name.ends_with("/TCG")
}

/// Time that a thread has been on a processor, s; `None` when it is gone.
pub(in crate::bench) fn of_thread(pid: i32, thread: i32) -> Option<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{thread}/schedstat")).ok()?;
    // Nanoseconds on a processor, nanoseconds waiting, times on one (Documentation/scheduler/sched-stats.rst).
    Some(text.split_whitespace().next()?.parse::<f64>().ok()? / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_and_stolen_time_are_not_work() {
        let text = "cpu  100 20 30 4000 500 6 70 800 90 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n";
        let machine = Machine::parse(text).unwrap();
        assert_eq!(machine, Machine { busy: 2.26, softirq: 0.7 });
        assert_eq!(Machine::parse("cpu0 1 2 3 4 5 6 7\n"), None);
        assert_eq!(Machine::parse("cpu 1 2 three 4 5 6 7\n"), None);
    }

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "7 (a ) (b) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0 20 0 1";
        assert_eq!(parse_stat(stat), Some(3.0));
        assert_eq!(parse_stat("7 (a) S 1"), None);
    }

    #[test]
    fn guests_processors_by_name() {
        assert!(is_virtual_processor("CPU 0/KVM") && is_virtual_processor("ALL CPUs/TCG"));
        assert!(!is_virtual_processor("qemu-system-x86") && !is_virtual_processor("mig/src/main"));
    }

    #[test]
    fn we_have_worked() {
        let pid = std::process::id() as i32;
        assert!(of_process(pid).is_some() && of_thread(pid, pid).is_some());
        assert!(Machine::now().unwrap().busy > 0.0);
    }
}
