//! One frame over and over.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::time::{ClockId, clock_gettime};

use crate::lab::plan::INTRUDER_NIC;
use crate::probe::Workers;
use crate::wire::{Frame, PacketNic};

/// Frames given to the kernel at once.
const BATCH: usize = 64;
/// How long to rest when the pace is met.
const REST: Duration = Duration::from_micros(200);
/// A flood that fell behind makes up for so much of it, not more.
const CATCH_UP: Duration = Duration::from_millis(20);

/// A flood that runs until it is dropped.
pub struct Flood {
    sent: Arc<AtomicU64>,
    cpu: Arc<AtomicU64>,
    _workers: Workers,
}

impl Flood {
    pub(super) fn start(namespace: &str, frame: &[u8], pace: Option<u64>) -> Result<Self> {
        let nic = PacketNic::deaf(namespace, INTRUDER_NIC)?;
        let frames = vec![Frame { buffer: frame.to_vec(), len: frame.len() }; BATCH];
        let sent = Arc::new(AtomicU64::new(0));
        let cpu = Arc::new(AtomicU64::new(0));
        let (counter, clock) = (Arc::clone(&sent), Arc::clone(&cpu));
        let mut workers = Workers::new();
        workers.start("flood", move |stop| {
            let mut begun = Instant::now();
            let mut since = 0;
            while !stop.load(Ordering::Relaxed) {
                let due = match pace {
                    None => BATCH as u64,
                    Some(pace) => {
                        if behind(begun, since, pace) > CATCH_UP {
                            (begun, since) = (Instant::now(), 0);
                        }
                        (begun.elapsed().as_secs_f64() * pace as f64) as u64 - since
                    }
                };
                if due == 0 {
                    thread::sleep(REST);
                    continue;
                }
                let now = due.min(BATCH as u64);
                let before = processor_time();
                let refused = nic.send(&frames[..now as usize]);
                clock.fetch_add(processor_time() - before, Ordering::Relaxed);
                since += now;
                counter.fetch_add(now - refused, Ordering::Relaxed);
            }
        })?;
        Ok(Self { sent, cpu, _workers: workers })
    }

    /// Frames sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Processor time that sending took so far, ns. A frame is carried by the thread that sends it, through the switch and
    /// mostly to where it ends, so that this is the way's time too.
    pub fn processor_time(&self) -> u64 {
        self.cpu.load(Ordering::Relaxed)
    }
}

/// Of the calling thread, ns.
fn processor_time() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// How far a flood is behind its pace.
fn behind(begun: Instant, sent: u64, pace: u64) -> Duration {
    begun.elapsed().saturating_sub(Duration::from_secs_f64(sent as f64 / pace as f64))
}
