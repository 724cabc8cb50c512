//! Looks on while a VM is moved: the VMMs' events, the processes, the machine, the wire, the guest's console.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};

use super::guest::{Pace, Progress};
use super::memory;
use super::processor::{self, Machine};
use crate::guest::SerialLog;
use crate::lab::plan::MIGRATION_NIC;
use crate::lab::{Lab, Side, lock, wait_for};
use crate::probe::{VmWatch, Workers};
use crate::scenario::link;

/// How often processes are looked at. The VMM at the source lives longer than this after it was stopped, so that all of its time is
/// seen; and it costs everybody half a per cent of a processor.
const INTERVAL: Duration = Duration::from_millis(20);
/// How long the VMM at the source may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// How long after a migration's end events may take to be heard.
const HEARD: Duration = Duration::from_secs(5);

/// What was seen of one migration.
#[derive(Clone, Debug)]
pub(in crate::bench) struct Observed {
    pub blackout_ms: f64,
    pub wire_bytes: u64,
    pub cpu_s: f64,
    pub softirq_s: f64,
    pub side_cpu_s: [f64; 2],
    pub agent_bytes: [u64; 2],
    pub guest: Option<Pace>,
}

/// Looks on until it is asked what it saw.
pub(in crate::bench) struct Observer<'a> {
    lab: &'a Lab,
    source: Side,
    sampler: Arc<Mutex<Sampler>>,
    _workers: Workers,
}

/// An [`Observer`] of a migration that has begun.
pub(in crate::bench) struct Begun<'a> {
    observer: Observer<'a>,
    at: SystemTime,
    wire: u64,
    machine: Machine,
    before: Processes,
}

/// Processor time of processes by number, s, as last seen; whoever ended keeps what it had.
type Times = HashMap<i32, f64>;

/// What the processes of both hosts have used, source and destination.
#[derive(Clone, Debug, Default)]
struct Processes {
    all: [Times; 2],
    guest: [Times; 2],
}

/// What is looked at again and again.
struct Sampler {
    ends: [End; 2],
    serial: SerialLog,
    processes: Processes,
    agent_bytes: [u64; 2],
    progress: Vec<Progress>,
}

/// One end of the migration.
struct End {
    agent: Option<i32>,
    qemu: VmWatch,
    /// The QEMU's virtual processors, and whose they are.
    threads: (i32, Vec<i32>),
}

impl<'a> Observer<'a> {
    /// Begins to look at the VM on `source`, which runs, at its other host, and at the agents of both if there are any.
    ///
    /// # Errors
    /// If the VM's monitor does not answer.
    pub fn start(lab: &'a Lab, source: Side) -> Result<Self> {
        let end = |side: Side| -> Result<End> {
            let host = lab.host(side);
            let agent = host.agent_pid().map(|pid| pid as i32);
            Ok(End { agent, qemu: VmWatch::start(host.vm_paths().lab_qmp)?, threads: (0, Vec::new()) })
        };
        let ends = [end(source)?, end(source.other())?];
        wait_for("QEMU's monitor", ANSWER, || Ok(ends[0].qemu.pid()))?;
        let serial = SerialLog::new(lab.host(source).vm_paths().serial);
        let sampler = Sampler {
            ends,
            serial,
            processes: Processes::default(),
            agent_bytes: [0; 2],
            progress: Vec::new(),
        };
        let sampler = Arc::new(Mutex::new(sampler));
        let mut workers = Workers::new();
        let shared = Arc::clone(&sampler);
        workers.start("observer", move |stop| {
            while !stop.load(Ordering::Relaxed) {
                lock(&shared).look();
                thread::sleep(INTERVAL);
            }
        })?;
        Ok(Self { lab, source, sampler, _workers: workers })
    }

    /// The migration begins now.
    ///
    /// # Errors
    /// If counters cannot be read.
    pub fn begin(self) -> Result<Begun<'a>> {
        let wire = self.wire_bytes()?;
        let before = {
            let mut sampler = lock(&self.sampler);
            sampler.look();
            sampler.processes.clone()
        };
        Ok(Begun { wire, machine: Machine::now()?, before, at: SystemTime::now(), observer: self })
    }

    /// Bytes that have crossed the migration network, both directions.
    fn wire_bytes(&self) -> Result<u64> {
        let link = link(&self.lab.host(self.source).namespace(), MIGRATION_NIC)?;
        let bytes = |direction: &str| link["stats64"][direction]["bytes"].as_u64();
        bytes("rx").zip(bytes("tx")).map(|(rx, tx)| rx + tx).context("a link without counters")
    }
}

impl Begun<'_> {
    /// The migration is over, and succeeded: what was seen of it.
    ///
    /// # Errors
    /// If no VMM said that it stopped or that it runs.
    pub fn finish(self) -> Result<Observed> {
        let Self { observer, at, .. } = self;
        let over = Instant::now();
        let event = |end: usize, name: &str| loop {
            // Not while the sampler is locked: it has to go on.
            let seen = lock(&observer.sampler).ends[end].qemu.wait_event(name, at, Duration::ZERO);
            match seen {
                Some(event) => return Ok(event.at),
                None if over.elapsed() > HEARD => bail!("no VMM said {name}"),
                None => thread::sleep(Duration::from_millis(1)),
            }
        };
        let (stopped, resumed) = (event(0, "STOP")?, event(1, "RESUME")?);
        let machine = Machine::now()?;
        let wire_bytes = observer.wire_bytes()?.saturating_sub(self.wire);
        let mut sampler = lock(&observer.sampler);
        sampler.look();
        let all = [0, 1].map(|end| spent(&sampler.processes.all[end], &self.before.all[end]));
        let guest = [0, 1].map(|end| spent(&sampler.processes.guest[end], &self.before.guest[end]));
        let blackout = resumed.duration_since(stopped).context("the VM ran before it had stopped")?;
        Ok(Observed {
            blackout_ms: blackout.as_secs_f64() * 1e3,
            wire_bytes,
            cpu_s: machine.busy - self.machine.busy - guest[0] - guest[1],
            softirq_s: machine.softirq - self.machine.softirq,
            side_cpu_s: [all[0] - guest[0], all[1] - guest[1]],
            agent_bytes: sampler.agent_bytes,
            guest: Pace::of(&sampler.progress, at, stopped),
        })
    }
}

impl Sampler {
    fn look(&mut self) {
        for index in 0..self.ends.len() {
            self.look_at(index);
        }
        let report = self.serial.latest();
        if let Some(report) = report
            && self.progress.last().is_none_or(|last| last.pages != report.count)
        {
            self.progress.push(Progress { at: SystemTime::now(), pages: report.count });
        }
    }

    fn look_at(&mut self, index: usize) {
        let end = &mut self.ends[index];
        let qemu = end.qemu.pid();
        for pid in end.agent.into_iter().chain(qemu) {
            if let Some(time) = processor::of_process(pid) {
                self.processes.all[index].insert(pid, time);
            }
        }
        if let Some(bytes) = end.agent.and_then(memory::anonymous) {
            self.agent_bytes[index] = self.agent_bytes[index].max(bytes);
        }
        let Some(qemu) = qemu else { return };
        if end.threads.0 != qemu || end.threads.1.is_empty() {
            end.threads = (qemu, processor::virtual_processors(qemu));
        }
        for &thread in &end.threads.1 {
            if let Some(time) = processor::of_thread(qemu, thread) {
                self.processes.guest[index].insert(thread, time);
            }
        }
    }
}

/// Processor time since `before`, s; who was not there then began at 0.
fn spent(now: &Times, before: &Times) -> f64 {
    now.iter().map(|(pid, time)| time - before.get(pid).unwrap_or(&0.0)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_came_later_began_at_nothing() {
        let before = Times::from([(1, 2.0)]);
        let now = Times::from([(1, 2.5), (2, 0.25)]);
        assert!((spent(&now, &before) - 0.75).abs() < 1e-9);
    }
}
