//! Both state machines against each other in memory, with a fault at every message and in every call.
//!
//! What is checked each time: never two sides that run the VM, not even for an instant; when it runs at the
//! destination, its memory is the source's; when the destination does not have it, nothing of it is left there
//! and it runs at the source. The one exception is a connection that breaks between commit and confirmation:
//! then it may be paused at the source, and the report says so.

mod convergence;
mod faults;
mod hosts;
mod refusals;

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::*;
use crate::{
    control::{Channel, ControlError, Item, Message, Prepare, Prepared, VerifyMode},
    datapath::{Cipher, Encryption, FrameSet, LaneLosses, Offer, QueueFigures, losses},
    memory::{Digest, MemoryError, PageSet},
    preflight::{self, Check, Finding, SourceFacts},
    report::{Recorder, Report, Status},
    vmm::{DestinationVm, Destroyed, SourceVm, VmmError},
};

use self::hosts::{Host, Memory, Source};

const PAGES: usize = 64;

/// A call that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Begin,
    TakeWritten,
    Pause,
    Stop,
    Release,
    State,
    Quit,
    OpenStream,
    Send,
    Prepare,
    CloseRound,
    RefreshHashes,
    Load,
    Finish,
    Run,
    Offer,
    Commit,
    Wait,
    Accept,
    Destroy,
    Resume,
    Throttle,
}

const CALLS: [Call; 18] = [
    Call::Begin,
    Call::TakeWritten,
    Call::Pause,
    Call::Stop,
    Call::Release,
    Call::State,
    Call::Quit,
    Call::OpenStream,
    Call::Send,
    Call::Prepare,
    Call::CloseRound,
    Call::Load,
    Call::Finish,
    Call::Run,
    Call::Offer,
    Call::Commit,
    Call::Wait,
    Call::Accept,
];

/// What goes wrong, if anything.
#[derive(Clone, Copy, Debug, Default)]
struct Fault {
    /// The connection breaks instead of carrying the item with this number, counted over both directions.
    break_at: Option<usize>,
    /// From the item with this number on nothing arrives any more, and nobody is told.
    silence_at: Option<usize>,
    /// The `n`th call of this kind fails.
    call: Option<(Call, usize)>,
    /// Somebody cancels when the item with this number is sent.
    cancel_at: Option<usize>,
    /// So many times the destination's VM does not end when told to.
    destroy_fails: usize,
    /// The destination's VM dies as it begins to run.
    died_running: bool,
    /// After a broken connection no new one can be made.
    cut_off: bool,
    /// Every so many frames one is lost.
    lose_every: Option<usize>,
    /// The guest writes without end, so much that only a throttle makes it converge.
    flat_out: bool,
}

/// Two hosts and the VM.
struct World {
    source_memory: [u32; PAGES],
    destination_memory: [u32; PAGES],
    received: FrameSet,
    source_runs: bool,
    source_gone: bool,
    source_journal: SessionState,
    destination_journal: SessionState,
    destination_runs: bool,
    destination_exists: bool,
    dirty: PageSet,
    tracked: bool,
    writes_left: u32,
    /// Percent of its time that the guest is denied, each value that it ever had.
    throttles: Vec<u8>,
    items: usize,
    frames: usize,
    calls: Vec<Call>,
    fault: Fault,
    cancel: Option<tokio::sync::watch::Sender<bool>>,
    /// What the destination finds before it starts anything.
    unadmitted: Vec<Finding>,
    /// What it finds then.
    findings: Vec<Finding>,
    /// No probe arrives.
    no_path: bool,
}

type Shared = Arc<Mutex<World>>;

impl World {
    fn new(fault: Fault) -> Shared {
        Arc::new(Mutex::new(Self {
            source_memory: std::array::from_fn(|page| page as u32 + 1),
            destination_memory: [0; PAGES],
            received: FrameSet::default(),
            source_runs: true,
            source_gone: false,
            source_journal: SessionState::default(),
            destination_journal: SessionState::default(),
            destination_runs: false,
            destination_exists: false,
            dirty: PageSet::new(PAGES as u64),
            tracked: false,
            writes_left: 40,
            throttles: Vec::new(),
            items: 0,
            frames: 0,
            calls: Vec::new(),
            fault,
            cancel: None,
            unadmitted: Vec::new(),
            findings: Vec::new(),
            no_path: false,
        }))
    }

    /// Notes a call; whether it is to fail.
    fn fails(&mut self, call: Call) -> bool {
        let before = self.calls.iter().filter(|&&other| other == call).count();
        self.calls.push(call);
        self.fault.call == Some((call, before))
    }

    fn check(&self) {
        assert!(!(self.source_runs && self.destination_runs), "two hosts run the VM");
        assert!(!self.destination_runs || self.destination_exists);
    }

    fn throttle(&self) -> u8 {
        self.throttles.last().copied().unwrap_or(0)
    }

    /// The guest writes as much as it can in `time`: all pages in 100 ms when nothing holds it back.
    fn guest_writes_for(&mut self, time: Duration) {
        if self.source_runs && self.fault.flat_out {
            let share = f64::from(100 - self.throttle()) / 100.0;
            let pages = (PAGES as f64 * share * time.as_secs_f64() / 0.1) as usize;
            for page in 0..pages.min(PAGES) {
                self.source_memory[page] += 1;
                self.dirty.insert(page as u64);
            }
        }
    }

    /// The guest writes, if it runs.
    fn guest_writes(&mut self) {
        if self.source_runs && self.writes_left > 0 {
            for n in 0..4 {
                let page = (self.writes_left as usize * 7 + n * 13) % PAGES;
                self.source_memory[page] += 1000;
                if self.tracked {
                    self.dirty.insert(page as u64);
                }
            }
            self.writes_left = self.writes_left.saturating_sub(8);
        }
    }
}

fn failure(what: &str) -> VmmError {
    VmmError::State(format!("{what} was made to fail"))
}

fn prepared() -> Prepared {
    Prepared {
        ip: [10, 0, 0, 2].into(),
        mac: crate::network::Mac([2; 6]),
        mtu: 9000,
        single_buffer: false,
        port: 4791,
        window: 100,
        cipher: None,
        unpacks: Vec::new(),
        transport: "memory".into(),
    }
}

/// A connection whose faults are the world's.
struct Wire {
    out: Option<mpsc::UnboundedSender<Item>>,
    inbox: mpsc::UnboundedReceiver<Item>,
    world: Shared,
}

fn wire(world: &Shared) -> (Wire, Wire) {
    let (to_b, from_a) = mpsc::unbounded_channel();
    let (to_a, from_b) = mpsc::unbounded_channel();
    let end = |out, inbox| Wire { out: Some(out), inbox, world: Arc::clone(world) };
    (end(to_b, from_b), end(to_a, from_a))
}

impl Channel for Wire {
    async fn send(&mut self, item: Item) -> Result<(), ControlError> {
        {
            let mut world = self.world.lock().unwrap();
            let number = world.items;
            world.items += 1;
            if world.fault.cancel_at == Some(number)
                && let Some(cancel) = &world.cancel
            {
                cancel.send(true).unwrap();
            }
            if world.fault.silence_at.is_some_and(|from| number >= from) {
                return Ok(());
            }
            if world.fault.break_at == Some(number) {
                self.out = None;
                self.inbox.close();
            }
        }
        // Lets the other side, and a cancel, have their turn.
        tokio::task::yield_now().await;
        let out = self.out.as_ref().ok_or(ControlError::Closed)?;
        out.send(item).map_err(|_| ControlError::Closed)
    }
    async fn recv(&mut self, awaited: &'static str, limit: Duration) -> Result<Item, ControlError> {
        let item = tokio::time::timeout(limit, self.inbox.recv()).await;
        item.map_err(|_| ControlError::Timeout { awaited, limit })?.ok_or(ControlError::Closed)
    }
}

/// One migration with a fault. Returns its report and the world after it.
async fn migrate(fault: Fault, verify: Option<VerifyMode>, quiesced: bool) -> (Report, Shared) {
    let world = World::new(fault);
    let report = again(&world, verify, quiesced).await;
    (report, world)
}

async fn again(world: &Shared, verify: Option<VerifyMode>, quiesced: bool) -> Report {
    run(world, plan(verify, quiesced)).await
}

fn plan(verify: Option<VerifyMode>, quiesced: bool) -> SourcePlan {
    let prepare = Prepare {
        session: 1,
        id: "a-1".into(),
        control_port: 4790,
        vm: "vm".into(),
        facts: SourceFacts::default(),
        populated: vec![(0, 1)],
        mtu: 9000,
        single_buffer: false,
        ip: [10, 0, 0, 1].into(),
        mac: crate::network::Mac([2; 6]),
        encryption: Offer { encryption: Encryption::Preferred, ciphers: vec![Cipher::Aes128Gcm] },
        feedback_ports: vec![1],
        verify,
        force: false,
        check_only: false,
    };
    SourcePlan {
        own_name: "a".into(),
        peer_name: "b".into(),
        prepare,
        findings: vec![],
        certified: None,
        secured: Finding::good(Check::ControlChannel, "in memory"),
        can_send: true,
        quiesced,
        convergence: Convergence {
            downtime_limit: Duration::from_millis(300),
            timeout: None,
            timeout_action: TimeoutAction::Cancel,
            auto_converge: false,
        },
        keep_source: false,
        limits: Limits::default(),
    }
}

type Arrival = tokio::task::JoinHandle<Result<bool, MigrationError>>;

/// The destination, at the other end of the wire.
fn destination(world: &Shared) -> (Wire, Arrival) {
    let (a, mut b) = wire(world);
    let shared = Arc::clone(world);
    let arrival = tokio::spawn(async move {
        let mut host = Host(shared);
        DestinationMigration::new(&mut host, &mut b, "b".into(), Limits::default()).run().await
    });
    (a, arrival)
}

async fn run(world: &Shared, plan: SourcePlan) -> Report {
    let (cancel, cancelled) = Cancel::pair();
    world.lock().unwrap().cancel = Some(cancel);
    let (mut a, destination) = destination(world);
    let record = Recorder::new(Report::default());
    let (mut vm, mut memory, mut host) =
        (Source(Arc::clone(world)), Memory(Arc::clone(world)), Host(Arc::clone(world)));
    SourceMigration::new(&mut vm, &mut memory, &mut host, &mut a, plan, record.clone()).run(cancelled).await;
    drop(a);
    let _ = destination.await.unwrap();
    record.snapshot()
}

/// What must hold after any fault.
fn assert_sound(report: &Report, world: &Shared, fault: Fault) {
    let world = world.lock().unwrap();
    world.check();
    assert!(!world.tracked, "{fault:?}: tracking is taken back");
    assert_eq!(world.throttle(), 0, "{fault:?}: the throttle is lifted");
    assert_eq!(
        world.source_journal.is_open(),
        report.status == Status::Unsettled || report.notes.iter().any(|note| note.contains("does not end")),
        "{fault:?}: the journal is open as long as needed"
    );
    match report.status {
        Status::Completed => {
            assert!(world.destination_runs && world.source_gone, "{fault:?}");
        }
        Status::Failed | Status::Cancelled => {
            assert!(
                world.source_runs && !world.destination_runs && !world.source_gone,
                "{fault:?}: the source has it"
            );
            assert!(!world.destination_exists, "{fault:?}: nothing is left at the destination");
            assert!(report.error_desc.is_some(), "{fault:?}: it says why");
        }
        Status::Unsettled => {
            assert!(!world.source_runs, "{fault:?}: what may run elsewhere does not run here");
            assert!(report.error_desc.as_ref().unwrap().contains("paused"), "{fault:?}");
        }
        Status::Died => {
            assert!(!world.source_runs && world.source_gone && !world.destination_exists, "{fault:?}");
        }
        Status::Active => panic!("{fault:?}: it has no end"),
    }
}
