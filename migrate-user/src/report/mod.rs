//! What a migration did: kept while it runs, shown by `status`, stored and exported when it is over.
//!
//! Names are those of QMP `query-migrate` where it has one. Times are milliseconds.

mod render;

pub use render::{closing, convergence, header, queue_line, round_line};

use std::{
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use serde::{Deserialize, Serialize};

use crate::datapath::{LaneLosses, Packed, QueueFigures};
use crate::sync::lock;

/// Where a migration is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The source looks at the VM and at itself.
    #[default]
    Preflight,
    /// The destination makes ready.
    Prepare,
    /// Rounds, while the VM runs.
    PreCopy,
    /// The VM is being stopped.
    Stop,
    /// The last pages.
    Final,
    /// The device state.
    DeviceState,
    /// Ownership changes hands.
    Commit,
    /// The VM runs at the destination; the source cleans up.
    Cleanup,
    /// Over.
    Ended,
}

/// How a migration ended, or that it has not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// Still going on.
    #[default]
    Active,
    /// The VM runs at the destination.
    Completed,
    /// Somebody stopped it; the VM runs at the source.
    Cancelled,
    /// It could not be done; the VM runs at the source.
    Failed,
    /// The VM was handed over, and its VMM at the destination died as it began to run: it runs nowhere.
    Died,
    /// The destination did not confirm that it runs the VM: it is paused at the source until someone decides.
    Unsettled,
}

/// How pages travelled.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Transport {
    /// `af-xdp staged`: pages are copied into the UMEM. `af-xdp direct`: they are sent from where they lie. `udp`: the source sends by UDP sockets.
    pub mode: String,
    /// Why it is `udp` though AF_XDP was wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
    /// How the XDP program is attached at the source: driver or generic; `none` where there is none.
    pub xdp_mode: String,
    /// Whether the source's driver reads the UMEM itself.
    pub zero_copy: bool,
    /// Largest IP packet, bytes.
    pub mtu: usize,
    /// How long a frame and the receiver's word of it take, where they meet no queue, ms.
    #[serde(default)]
    pub round_trip: f64,
    /// Sender threads.
    pub lanes: usize,
    /// By what pages were encrypted: a cipher's name, or `off`.
    #[serde(default)]
    pub encryption: String,
    /// The destination's side in its own words.
    pub receiver: String,
}

/// Totals over all rounds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Ram {
    /// Size of the guest's RAM, bytes.
    pub total: u64,
    /// Bytes on the wire, all headers included.
    pub transferred: u64,
    /// Zero pages that were not sent as pages.
    pub duplicate: u64,
    /// Pages sent with content.
    pub normal: u64,
    /// Their bytes.
    pub normal_bytes: u64,
    /// Unit of all page counts, bytes.
    pub page_size: u64,
    /// Scans for dirty pages.
    pub dirty_sync_count: u64,
}

/// Pages that counted as written and had not changed since they were sent: of guests in huge pages, over all rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Unchanged {
    /// Pages that were hashed to find that out.
    pub looked_at: u64,
    /// Pages that had not changed, and were not sent.
    pub pages: u64,
}

/// How pages were packed, over all rounds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Compression {
    /// What was asked for.
    pub mode: String,
    /// Pages sent packed.
    pub pages: u64,
    /// Bytes that they became.
    pub compressed_size: u64,
    /// Their own bytes by those that they became; 0 where none was packed.
    pub compression_rate: f64,
    /// Time that sender threads spent packing, ms.
    pub busy_ms: f64,
}

impl Compression {
    /// Adds a round.
    pub fn add(&mut self, packed: &Packed) {
        self.pages += packed.pages;
        self.compressed_size += packed.bytes;
        self.busy_ms += packed.took.as_secs_f64() * 1e3;
        if self.compressed_size > 0 {
            let plain = self.pages * migrate_common::PAGE_SIZE as u64;
            self.compression_rate = plain as f64 / self.compressed_size as f64;
        }
    }
}

/// What one sender thread sent, in all rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct LaneFigures {
    /// Number of the lane, and of the source NIC's queue.
    pub lane: u32,
    /// Frames sent.
    pub sent: u64,
    /// Frames that did not arrive, or not in time.
    pub lost: u64,
    /// Times the receiver was silent for too long.
    pub stalls: u64,
}

/// How frames fared, up to the last round that was closed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Stream {
    /// By lane.
    pub lanes: Vec<LaneFigures>,
    /// By queue of the destination's NIC, as the destination counted.
    pub queues: Vec<QueueFigures>,
}

impl Stream {
    /// Adds a round: frames and stalls by lane, and what the destination said of it.
    pub fn add_round(
        &mut self,
        frames: &[u32],
        stalls: &[u32],
        losses: &[LaneLosses],
        queues: Vec<QueueFigures>,
    ) {
        let known = self.lanes.len();
        self.lanes.extend(
            (known..frames.len()).map(|lane| LaneFigures { lane: lane as u32, ..LaneFigures::default() }),
        );
        for (index, lane) in self.lanes.iter_mut().enumerate() {
            lane.sent += frames.get(index).copied().map_or(0, u64::from);
            lane.stalls += stalls.get(index).copied().map_or(0, u64::from);
            let lost = losses.iter().filter(|losses| u32::from(losses.lane) == lane.lane);
            lane.lost += lost.map(LaneLosses::frames).sum::<u64>();
        }
        self.queues = queues;
    }

    /// Sum over all lanes.
    pub fn over_lanes(&self, of: impl Fn(&LaneFigures) -> u64) -> u64 {
        self.lanes.iter().map(of).sum()
    }

    /// Sum over all queues.
    pub fn over_queues(&self, of: impl Fn(&QueueFigures) -> u64) -> u64 {
        self.queues.iter().map(of).sum()
    }
}

/// One pass over memory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Round {
    /// Number; 0 is the whole memory.
    pub round: u32,
    /// Pages to send.
    pub pages: u64,
    /// Bytes of page content sent.
    pub bytes: u64,
    /// Pages that were hashed to see whether they changed since they were sent.
    #[serde(default)]
    pub looked_at: u64,
    /// Pages that had not changed, and were not sent.
    #[serde(default)]
    pub unchanged_pages: u64,
    /// Time it took, ms.
    pub duration_ms: f64,
    /// Pages the guest wrote meanwhile, less those that were sent as it had written them.
    pub dirtied_pages: u64,
    /// Frames that did not arrive; their pages count as dirty.
    pub lost_frames: u64,
    /// True when the VM was stopped.
    pub last: bool,
    /// What was known after it; not with the VM stopped.
    #[serde(default, flatten, skip_serializing_if = "Option::is_none")]
    pub estimate: Option<RoundEstimate>,
}

/// What is known of link and guest after a round, and what was done about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RoundEstimate {
    /// Bytes of page content per second that the link carries.
    pub bandwidth: f64,
    /// How much that is to be trusted, 0 to 1: 1 when rounds took what was predicted.
    pub bandwidth_confidence: f64,
    /// Pages per second that the guest writes.
    pub dirty_pages_rate: f64,
    /// How much that is to be trusted, 0 to 1: 1 when the guest writes steadily.
    pub dirty_rate_confidence: f64,
    /// The blackout if the VM were stopped now, ms.
    pub expected_downtime: f64,
    /// The same with the error of the estimates, ms; compared with the limit.
    pub downtime_at_most: f64,
    /// Share of its time that each vCPU was denied during this round, percent.
    pub cpu_throttle_percentage: u8,
    /// How long the VM was stopped for the scan, ms; 0 where it need not be.
    pub stun: f64,
}

/// Stops of the VM for quiesced scans, while it was to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Stuns {
    /// How many.
    pub count: u64,
    /// Sum, ms.
    pub total: f64,
    /// The longest, ms.
    pub longest: f64,
}

impl Stuns {
    /// Adds one, ms.
    pub fn add(&mut self, ms: f64) {
        self.count += 1;
        self.total += ms;
        self.longest = self.longest.max(ms);
    }
}

/// The blackout, part by part, ms. Their sum is `downtime`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DowntimePhases {
    /// vCPUs stopped until I/O was drained and QEMU waited.
    pub stop: f64,
    /// Last scan, last pages, confirmation of every one.
    pub last_pages: f64,
    /// Reading all RAM on both sides, with `--verify=full` only.
    pub verify: f64,
    /// Device state, from its release until its last byte was sent.
    pub state: f64,
    /// Until the destination had loaded it.
    pub load: f64,
    /// From commit until the destination said that the vCPUs run.
    pub resume: f64,
}

/// Announcements to the network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Announce {
    /// RARP frames that the destination sent, or will have sent when its schedule is through.
    pub rarp_sent: u32,
}

/// Everything about one migration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// Number of the migration on its source host.
    pub id: String,
    /// Number of the page stream and in the journals of both hosts.
    pub session: u64,
    /// The VM.
    pub vm: String,
    /// Host it left.
    pub source: String,
    /// Host it went to.
    pub destination: String,
    /// How it ended.
    pub status: Status,
    /// What it is doing, while it is active.
    pub phase: Phase,
    /// Why it did not complete.
    pub error_desc: Option<String>,
    /// How pages travelled.
    pub transport: Transport,
    /// How dirty pages were found: `live` or `quiesced`, and why.
    pub scan_mode: String,
    /// From the request until the VM was known to run at the destination, ms; to the end where it never did.
    pub total_time: f64,
    /// From then until the old VMM had ended and its memory was given back, ms.
    #[serde(default)]
    pub cleanup_time: f64,
    /// Until the first page was sent, ms.
    pub setup_time: f64,
    /// The part of it in which the guest's RAM was pinned, to send from where it lies, ms.
    #[serde(default)]
    pub pinning: f64,
    /// Blackout, ms: vCPUs stopped at the source until the source knew that they run at the destination.
    pub downtime: f64,
    /// The same, split.
    pub downtime_phases: DowntimePhases,
    /// The blackout as it was predicted when the VM was stopped, ms.
    #[serde(default)]
    pub expected_downtime: Option<f64>,
    /// How much longer the blackout was than that, ms; less than 0 when it was shorter. `--verify=full` is left out.
    #[serde(default)]
    pub prediction_error: Option<f64>,
    /// Share of its time that each vCPU is denied, percent.
    #[serde(default)]
    pub cpu_throttle_percentage: u8,
    /// By what; `null` when the guest was never throttled.
    #[serde(default)]
    pub throttle: Option<String>,
    /// Stops for quiesced scans.
    #[serde(default)]
    pub stuns: Stuns,
    /// Limit on the wire, bytes per second; 0 is none.
    #[serde(default)]
    pub max_bandwidth: u64,
    /// Totals.
    pub ram: Ram,
    /// Pages that were not sent again.
    #[serde(default)]
    pub unchanged: Unchanged,
    /// How pages were packed.
    #[serde(default)]
    pub compression: Compression,
    /// How frames fared.
    #[serde(default)]
    pub stream: Stream,
    /// Every round.
    pub rounds: Vec<Round>,
    /// Whether all RAM was proved equal; `null` when not asked for.
    pub verified: Option<bool>,
    /// Announcements.
    pub announce: Announce,
    /// Remarks for the operator, as fallbacks with their reason.
    pub notes: Vec<String>,
}

/// Where the machinery writes what it does, and others read it.
#[derive(Clone)]
pub struct Recorder {
    report: Arc<Mutex<Report>>,
    /// Pages of the current round that were looked at so far.
    progress: Arc<AtomicU64>,
    begun: Instant,
}

impl Recorder {
    /// Begins a report; the clock runs from here.
    pub fn new(report: Report) -> Self {
        Self { report: Arc::new(Mutex::new(report)), progress: Arc::default(), begun: Instant::now() }
    }

    fn lock(&self) -> MutexGuard<'_, Report> {
        lock(&self.report)
    }

    /// Changes the report.
    pub fn update(&self, change: impl FnOnce(&mut Report)) {
        change(&mut self.lock());
    }

    /// The report as it stands; the total time of an active one is that up to now.
    pub fn snapshot(&self) -> Report {
        let mut report = self.lock().clone();
        if report.status == Status::Active {
            report.total_time = self.elapsed_ms();
        }
        report
    }

    /// Time since the migration was asked for, ms.
    pub fn elapsed_ms(&self) -> f64 {
        self.begun.elapsed().as_secs_f64() * 1e3
    }

    /// Counter of the current round's pages.
    pub fn progress(&self) -> &Arc<AtomicU64> {
        &self.progress
    }

    /// Pages of the current round that were looked at so far.
    pub fn pages_done(&self) -> u64 {
        self.progress.load(Ordering::Relaxed)
    }
}
