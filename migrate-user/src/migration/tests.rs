//! Both state machines against each other in memory, with a fault at every message and in every call.
//!
//! What is checked each time: never two sides that run the VM, not even for an instant; when it runs at the
//! destination, its memory is the source's; when the destination does not have it, nothing of it is left there
//! and it runs at the source. The one exception is a connection that breaks between commit and confirmation:
//! then it may be paused at the source, and the report says so.

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

struct Source(Shared);
struct Destination(Shared);
struct Memory(Shared);
struct Host(Shared);
struct Stream(Shared);

impl SourceVm for Source {
    async fn pause(&mut self) -> Result<(), VmmError> {
        let mut world = self.0.lock().unwrap();
        if world.fails(Call::Pause) {
            return Err(failure("pause"));
        }
        world.source_runs = false;
        Ok(())
    }
    async fn unpause(&mut self) -> Result<(), VmmError> {
        self.resume().await
    }
    async fn throttle(&mut self, percent: u8) -> Result<&'static str, VmmError> {
        let mut world = self.0.lock().unwrap();
        // What failed half-way is half done.
        world.throttles.push(percent);
        if world.fails(Call::Throttle) { Err(failure("throttle")) } else { Ok("memory") }
    }
    async fn unthrottle(&mut self) -> Result<(), VmmError> {
        self.0.lock().unwrap().throttles.push(0);
        Ok(())
    }
    async fn stop(&mut self) -> Result<Instant, VmmError> {
        let mut world = self.0.lock().unwrap();
        assert_eq!(world.throttle(), 0, "vCPUs that rest would be waited for");
        world.guest_writes();
        world.source_runs = false;
        // It may have stopped and yet not have got where it should.
        if world.fails(Call::Stop) { Err(failure("stop")) } else { Ok(Instant::now()) }
    }
    async fn release_state(&mut self) -> Result<(), VmmError> {
        if self.0.lock().unwrap().fails(Call::Release) { Err(failure("release")) } else { Ok(()) }
    }
    async fn state(&mut self) -> Result<Option<Bytes>, VmmError> {
        let mut world = self.0.lock().unwrap();
        if world.fails(Call::State) {
            return Err(failure("state"));
        }
        let parts = world.calls.iter().filter(|&&call| call == Call::State).count();
        Ok((parts <= 3).then(|| Bytes::from_static(b"devices")))
    }
    async fn resume(&mut self) -> Result<(), VmmError> {
        let mut world = self.0.lock().unwrap();
        assert!(!world.source_gone, "a VMM that was ended cannot resume");
        if world.fails(Call::Resume) {
            return Err(failure("resume"));
        }
        world.source_runs = true;
        world.check();
        Ok(())
    }
    async fn quit(&mut self) -> Result<(), VmmError> {
        let mut world = self.0.lock().unwrap();
        let theirs = world.destination_runs || world.fault.died_running;
        assert!(!world.source_runs && theirs, "only a VM that is elsewhere is ended here");
        world.source_gone = true;
        if world.fails(Call::Quit) { Err(failure("quit")) } else { Ok(()) }
    }
}

impl DestinationVm for Destination {
    async fn load(&mut self, _: Bytes) -> Result<(), VmmError> {
        if self.0.lock().unwrap().fails(Call::Load) { Err(failure("load")) } else { Ok(()) }
    }
    async fn finish(&mut self) -> Result<(), VmmError> {
        if self.0.lock().unwrap().fails(Call::Finish) { Err(failure("finish")) } else { Ok(()) }
    }
    async fn run(&mut self) -> Result<(), VmmError> {
        let mut world = self.0.lock().unwrap();
        if world.fails(Call::Run) {
            return Err(failure("run"));
        }
        assert_eq!(world.destination_journal.verdict, Some(Verdict::Accepted), "written down before it runs");
        assert_eq!(world.source_memory, world.destination_memory, "memory is whole before it runs");
        world.destination_runs = true;
        world.check();
        Ok(())
    }
    async fn ended(&mut self) -> VmmError {
        std::future::pending().await
    }
    async fn destroy(&mut self) -> Option<Destroyed> {
        let mut world = self.0.lock().unwrap();
        assert!(!world.destination_runs, "a running VM is never destroyed");
        let before = world.calls.iter().filter(|&&call| call == Call::Destroy).count();
        if world.fails(Call::Destroy) || before < world.fault.destroy_fails {
            return None;
        }
        world.destination_exists = false;
        Some(if world.fault.died_running { Destroyed::MayHaveRun } else { Destroyed::NeverRan })
    }
}

fn digest(memory: &[u32; PAGES]) -> Digest {
    Digest(
        memory.iter().fold(7u128, |sum, &page| sum.wrapping_mul(31).wrapping_add(page.into())).to_le_bytes(),
    )
}

fn no_tracking() -> MemoryError {
    MemoryError::Inject { pid: 1, problem: "made to fail".into() }
}

impl SourceMemory for Memory {
    async fn begin(&mut self) -> Result<PageSet, MemoryError> {
        let mut world = self.0.lock().unwrap();
        if world.fails(Call::Begin) {
            return Err(no_tracking());
        }
        world.tracked = true;
        let mut all = PageSet::new(PAGES as u64);
        all.insert_range(0, PAGES as u64);
        Ok(all)
    }
    async fn take_written(&mut self) -> Result<PageSet, MemoryError> {
        let mut world = self.0.lock().unwrap();
        if world.fails(Call::TakeWritten) {
            return Err(no_tracking());
        }
        world.guest_writes();
        Ok(std::mem::replace(&mut world.dirty, PageSet::new(PAGES as u64)))
    }
    async fn digest(&mut self) -> Result<Digest, MemoryError> {
        Ok(digest(&self.0.lock().unwrap().source_memory))
    }
    fn discard(&mut self) -> Result<(), MemoryError> {
        let world = self.0.lock().unwrap();
        assert!(
            world.source_gone && (world.destination_runs || world.fault.died_running),
            "memory is freed only when nobody here needs it"
        );
        Ok(())
    }
    fn release(&mut self) {
        self.0.lock().unwrap().tracked = false;
    }
}

impl SourceHost for Host {
    type Stream = Stream;
    async fn record(&mut self, record: SourceRecord) -> Result<(), MigrationError> {
        let mut world = self.0.lock().unwrap();
        let (call, change) = match record {
            SourceRecord::Offer => (Some(Call::Offer), Change::Offered),
            SourceRecord::Commit => (Some(Call::Commit), Change::Committed),
            SourceRecord::End(verdict) => (None, Change::Concluded(Some(verdict))),
        };
        if call.is_some_and(|call| world.fails(call)) {
            return Err(MigrationError::Host("the journal is full".into()));
        }
        world.source_journal.apply(change);
        Ok(())
    }
    async fn ask(&mut self) -> Option<Verdict> {
        for _ in 0..10 {
            // The destination may be on its way between accepting and running, or may not have noticed the break yet.
            tokio::task::yield_now().await;
            let mut world = self.0.lock().unwrap();
            if world.fault.cut_off {
                return None;
            }
            match world.destination_journal.asked_by_source() {
                Some(Answer::Stands(verdict)) => return Some(verdict),
                Some(Answer::Decide(verdict)) => {
                    world.destination_journal.apply(Change::Decided(verdict));
                    return Some(verdict);
                }
                None => {}
            }
        }
        None
    }
    async fn open_stream(&mut self, _: &Prepared) -> Result<Stream, MigrationError> {
        if self.0.lock().unwrap().fails(Call::OpenStream) {
            return Err(MigrationError::Host("open_stream was made to fail".into()));
        }
        Ok(Stream(Arc::clone(&self.0)))
    }
}

impl PageStream for Stream {
    async fn probe(&mut self, _: u32) -> Result<(), MigrationError> {
        Ok(())
    }
    /// One page a frame.
    async fn send(&mut self, _: u32, pages: Arc<PageSet>) -> Result<RoundSent, MigrationError> {
        if self.0.lock().unwrap().fault.flat_out {
            // 640 pages a second, so that all of them take 100 ms.
            let time = Duration::from_micros(1562) * pages.count() as u32;
            tokio::time::sleep(time).await;
            self.0.lock().unwrap().guest_writes_for(time);
        }
        let mut world = self.0.lock().unwrap();
        if world.fails(Call::Send) {
            return Err(MigrationError::Send(crate::datapath::SendError::Silent));
        }
        for (number, page) in pages.iter().enumerate() {
            world.frames += 1;
            if world.fault.lose_every.is_some_and(|every| world.frames.is_multiple_of(every)) {
                continue;
            }
            world.destination_memory[page as usize] = world.source_memory[page as usize];
            world.received.insert(number as u32);
        }
        world.guest_writes();
        Ok(RoundSent {
            frames: vec![pages.count() as u32],
            data_pages: pages.count(),
            ..RoundSent::default()
        })
    }
    fn lost(&mut self, pages: &PageSet, losses: &[LaneLosses]) -> PageSet {
        let numbers: Vec<u64> = pages.iter().collect();
        let mut again = PageSet::new(PAGES as u64);
        for (start, end) in losses.iter().flat_map(|lane| lane.missing.clone()) {
            (start..end).for_each(|number| again.insert(numbers[number as usize]));
        }
        again
    }
}

impl DestinationHost for Host {
    type Vm = Destination;
    fn greeted(&mut self, _: &str) -> Result<(), MigrationError> {
        Ok(())
    }
    fn admit(&mut self, _: &Prepare) -> Vec<Finding> {
        self.0.lock().unwrap().unadmitted.clone()
    }
    async fn record(&mut self, record: DestinationRecord) -> Result<Recorded, MigrationError> {
        let mut world = self.0.lock().unwrap();
        let full = || MigrationError::Host("the journal is full".into());
        match record {
            DestinationRecord::Waiting => {
                if world.fails(Call::Wait) {
                    return Err(full());
                }
                world.destination_journal.apply(Change::Waiting);
            }
            DestinationRecord::Accepted => {
                if world.fails(Call::Accept) {
                    return Err(full());
                }
                if let Some(before) = world.destination_journal.decide(Verdict::Accepted) {
                    return Ok(before);
                }
                world.destination_journal.apply(Change::Decided(Verdict::Accepted));
            }
            DestinationRecord::Refused => {
                assert!(!world.destination_exists, "refused only when nothing is left here");
                world.destination_journal.apply(Change::Decided(Verdict::Refused));
            }
            DestinationRecord::End(verdict) => {
                world.destination_journal.apply(Change::Concluded(Some(verdict)));
            }
        }
        Ok(Recorded::Written)
    }
    async fn prepare(
        &mut self,
        request: &Prepare,
    ) -> Result<Preparation<Destination>, Unprepared<Destination>> {
        let mut world = self.0.lock().unwrap();
        if world.fails(Call::Prepare) {
            return Err(MigrationError::Host("there is no room".into()).into());
        }
        let mut findings = world.findings.clone();
        preflight::settle(&mut findings, request.force);
        let goes = !request.check_only && preflight::outcome(&findings) == preflight::Outcome::CanGo;
        world.destination_exists = true;
        let vm = Some(Destination(Arc::clone(&self.0)));
        Ok(Preparation { findings, prepared: goes.then(prepared), vm })
    }
    fn hear_probes(&mut self, _: &Prepare, _: &mut Vec<Finding>) -> Option<Prepared> {
        Some(prepared())
    }
    async fn probes(&mut self, sent: u32) -> u64 {
        if self.0.lock().unwrap().no_path { 0 } else { sent.into() }
    }
    async fn close_round(
        &mut self,
        _: u32,
        frames: &[u32],
        _: bool,
        _: Duration,
    ) -> Result<Vec<LaneLosses>, MigrationError> {
        let mut world = self.0.lock().unwrap();
        if world.fails(Call::CloseRound) {
            return Err(MigrationError::Host("close_round was made to fail".into()));
        }
        Ok(losses(frames, &[std::mem::take(&mut world.received)]))
    }
    fn figures(&self) -> Vec<QueueFigures> {
        vec![QueueFigures { frames: self.0.lock().unwrap().frames as u64, ..QueueFigures::default() }]
    }
    async fn refresh_hashes(&mut self) -> Result<(), MigrationError> {
        Ok(())
    }
    async fn digest(&mut self, _: bool) -> Result<Digest, MigrationError> {
        Ok(digest(&self.0.lock().unwrap().destination_memory))
    }
    fn progress(&self) -> u64 {
        self.0.lock().unwrap().frames as u64
    }
    async fn settle(&mut self, _: u64) -> Result<Verdict, MigrationError> {
        unreachable!("the source asks the journal")
    }
    async fn claim(&mut self, _: u64, _: bool) -> Result<Verdict, MigrationError> {
        unreachable!("nobody dies here")
    }
    fn give_back(&mut self) {
        let world = self.0.lock().unwrap();
        assert!(!world.destination_exists, "memory is given back when nobody uses it");
    }
    async fn close_stream(&mut self) {}
    fn announce(&mut self) -> (u32, u32) {
        assert!(self.0.lock().unwrap().destination_runs, "nothing is announced before the VM runs");
        (1, 5)
    }
    fn keep(&mut self, _: Destination) {}
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

#[tokio::test]
async fn a_clean_migration_moves_everything() {
    for (verify, quiesced) in [(None, false), (Some(VerifyMode::Hash), false), (Some(VerifyMode::Full), true)]
    {
        let (report, world) = migrate(Fault::default(), verify, quiesced).await;
        assert_eq!(report.status, Status::Completed, "{:?}", report.error_desc);
        assert_eq!(report.verified, verify.map(|_| true));
        assert_eq!(report.announce.rarp_sent, 5);
        assert!(report.rounds.len() >= 2);
        assert_sound(&report, &world, Fault::default());
    }
}

/// DMA that was under way when tracking began is seen by no scan, and tracking need not wait for the destination.
#[tokio::test]
async fn tracking_begins_early_and_dma_ends_before_the_first_page_is_read() {
    for quiesced in [false, true] {
        let (_, world) = migrate(Fault::default(), None, quiesced).await;
        let calls = world.lock().unwrap().calls.clone();
        let first = |call| calls.iter().position(|&other| other == call).unwrap();
        assert!(first(Call::Begin) < first(Call::OpenStream), "{calls:?}");
        assert_eq!(calls[..first(Call::Send)].contains(&Call::Pause), quiesced, "{calls:?}");
    }
}

#[tokio::test]
async fn a_connection_that_breaks_at_any_message_loses_nothing() {
    let clean = migrate(Fault::default(), None, false).await.1.lock().unwrap().items;
    for cut_off in [false, true] {
        let mut outcomes = Vec::new();
        for number in 0..clean {
            let fault = Fault { break_at: Some(number), cut_off, ..Fault::default() };
            let (report, world) = migrate(fault, None, false).await;
            assert_sound(&report, &world, fault);
            outcomes.push(report.status);
        }
        let count = |wanted| outcomes.iter().filter(|&&status| status == wanted).count();
        // Commit and its confirmation are the two messages whose loss leaves the source without knowledge.
        assert_eq!(count(Status::Unsettled), if cut_off { 2 } else { 0 }, "{outcomes:?}");
        // The goodbye never matters; a lost confirmation is made up for by asking.
        assert_eq!(count(Status::Completed), if cut_off { 1 } else { 2 }, "{outcomes:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_falls_silent_at_any_message_makes_nobody_hang() {
    let clean = migrate(Fault::default(), None, false).await.1.lock().unwrap().items;
    for number in 0..clean {
        let fault = Fault { silence_at: Some(number), ..Fault::default() };
        let begun = tokio::time::Instant::now();
        let (report, world) = migrate(fault, None, false).await;
        assert_sound(&report, &world, fault);
        assert!(begun.elapsed() < Duration::from_secs(300), "{fault:?} took {:?}", begun.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn any_call_that_fails_leaves_the_vm_where_it_was() {
    for call in CALLS {
        for nth in 0..3 {
            let fault = Fault { call: Some((call, nth)), ..Fault::default() };
            let (report, world) = migrate(fault, None, true).await;
            assert_sound(&report, &world, fault);
            let reached = world.lock().unwrap().calls.iter().filter(|&&other| other == call).count() > nth;
            let expected = match call {
                _ if !reached => Status::Completed,
                // The VM is gone from here already; that the old VMM does not end is only noted.
                Call::Quit => Status::Completed,
                _ => Status::Failed,
            };
            assert_eq!(report.status, expected, "{call:?} {nth}");
        }
    }
}

#[tokio::test]
async fn a_cancel_at_any_message_keeps_the_vm_or_comes_too_late() {
    let clean = migrate(Fault::default(), None, false).await.1.lock().unwrap().items;
    let mut completed = 0;
    for number in 0..clean {
        let fault = Fault { cancel_at: Some(number), ..Fault::default() };
        let (report, world) = migrate(fault, None, false).await;
        assert_sound(&report, &world, fault);
        assert!(
            matches!(report.status, Status::Cancelled | Status::Completed),
            "{number}: {:?}",
            report.status
        );
        completed += u32::from(report.status == Status::Completed);
    }
    assert!(completed <= 4, "only from the commit on a cancel comes too late, not {completed} times");
}

#[tokio::test]
async fn lost_frames_are_sent_again_and_a_later_migration_is_complete() {
    for every in [2, 3, 7] {
        let fault = Fault { lose_every: Some(every), ..Fault::default() };
        let (report, world) = migrate(fault, Some(VerifyMode::Full), false).await;
        assert_eq!(report.status, Status::Completed, "{:?}", report.error_desc);
        assert!(report.rounds.iter().map(|round| round.lost_frames).sum::<u64>() > 0);
        assert_sound(&report, &world, fault);
    }
}

#[tokio::test]
async fn after_a_failure_the_next_migration_is_complete() {
    for call in [(Call::Send, 1), (Call::Stop, 0), (Call::State, 2), (Call::Finish, 0)] {
        let fault = Fault { call: Some(call), ..Fault::default() };
        let (report, world) = migrate(fault, None, false).await;
        assert_eq!(report.status, Status::Failed, "{call:?}");
        {
            let mut world = world.lock().unwrap();
            world.fault = Fault::default();
            world.calls.clear();
            world.destination_memory = [0; PAGES];
            world.source_journal = SessionState::default();
            world.destination_journal = SessionState::default();
            world.received = FrameSet::default();
            world.writes_left = 40;
        }
        let report = again(&world, Some(VerifyMode::Full), false).await;
        assert_eq!(
            (report.status, report.verified),
            (Status::Completed, Some(true)),
            "{call:?}: {:?}",
            report.error_desc
        );
    }
}

/// What it may have written to its disks, the older state at the source does not know.
#[tokio::test]
async fn a_vm_that_died_as_it_began_to_run_does_not_run_on_at_the_source() {
    let fault = Fault { call: Some((Call::Run, 0)), died_running: true, ..Fault::default() };
    let (report, world) = migrate(fault, None, false).await;
    assert_eq!(report.status, Status::Died);
    assert!(report.error_desc.as_ref().unwrap().contains("its disks are as it left them"));
    assert_sound(&report, &world, fault);
}

/// A half-made VM that may still be there is no promise, and stays in the journal.
#[tokio::test]
async fn a_half_made_vm_that_does_not_end_stays_in_the_journal() {
    let run_fails = |world: &Shared| world.lock().unwrap().fault.call = Some((Call::Destroy, 0));
    let world = World::new(Fault { break_at: Some(12), ..Fault::default() });
    run_fails(&world);
    let report = again(&world, None, false).await;
    let world = world.lock().unwrap();
    assert_eq!(report.status, Status::Failed);
    assert!(world.source_runs, "the commit was not sent: the source needs no promise");
    assert!(world.destination_exists && world.destination_journal.is_open());
}

#[tokio::test]
async fn a_vm_that_does_not_run_again_is_said_so_and_stays_in_the_journal() {
    let clean = migrate(Fault::default(), None, false).await.1.lock().unwrap().items;
    let mut stuck = 0;
    for number in 0..clean {
        let fault = Fault { call: Some((Call::Resume, 0)), break_at: Some(number), ..Fault::default() };
        let (report, world) = migrate(fault, None, false).await;
        let world = world.lock().unwrap();
        if report.status == Status::Unsettled {
            stuck += 1;
            assert!(report.error_desc.as_ref().unwrap().contains("DOES NOT RUN"), "{report:?}");
            assert!(world.source_journal.is_open() && !world.source_runs);
        }
    }
    assert!(stuck > 3, "every break with a stopped VM, not {stuck}");
}

#[tokio::test]
async fn other_versions_are_refused_by_both() {
    let world = World::new(Fault::default());
    let (mut a, mut b) = wire(&world);
    let mut host = Host(Arc::clone(&world));
    a.send(Item::Message(Message::Hello {
        protocol: 99,
        software: "x".into(),
        name: "x".into(),
        clock: None,
    }))
    .await
    .unwrap();
    let error =
        DestinationMigration::new(&mut host, &mut b, "b".into(), Limits::default()).run().await.unwrap_err();
    assert!(error.to_string().contains("same version"), "{error}");
    assert!(matches!(
        a.recv("", Duration::from_secs(1)).await.unwrap(),
        Item::Message(Message::Hello { .. })
    ));
    assert!(matches!(
        a.recv("", Duration::from_secs(1)).await.unwrap(),
        Item::Message(Message::Abort { .. })
    ));
}

/// One reason at the source, one that may be overridden at the destination.
fn misfits() -> (Finding, Finding) {
    (
        Finding::bad(Check::Devices, "device ballast", "start the VM without it"),
        Finding::bad(Check::CpuFeatures, "b lacks avx2", "use a named model"),
    )
}

#[tokio::test]
async fn all_reasons_of_both_sides_are_in_one_refusal() {
    let (here, there) = misfits();
    let world = World::new(Fault::default());
    {
        let mut world = world.lock().unwrap();
        world.findings = vec![there];
        world.no_path = true;
    }
    let mut plan = plan(None, false);
    plan.findings = vec![here];
    plan.prepare.check_only = true;
    let report = run(&world, plan).await;
    let reason = report.error_desc.clone().unwrap();
    for words in [
        "devices: device ballast: start the VM without it",
        "cpu-features: b lacks avx2",
        "path-mtu: none of",
    ] {
        assert!(reason.contains(words), "{words} in {reason}");
    }
    assert_eq!(report.status, Status::Failed);
    assert!(!world.lock().unwrap().calls.contains(&Call::Begin), "the VM is not touched");
    assert_sound(&report, &world, Fault::default());
}

#[tokio::test]
async fn force_overrides_what_may_be_and_the_report_names_it() {
    let (here, there) = misfits();
    for (own, force, expected) in
        [(None, false, Status::Failed), (None, true, Status::Completed), (Some(here), true, Status::Failed)]
    {
        let world = World::new(Fault::default());
        world.lock().unwrap().findings = vec![there.clone()];
        let mut plan = plan(None, false);
        plan.prepare.check_only = own.is_some();
        plan.findings.extend(own);
        plan.prepare.force = force;
        let report = run(&world, plan).await;
        assert_eq!(report.status, expected, "{:?}", report.error_desc);
        let named =
            report.notes.iter().any(|note| note == "overridden by --force: cpu-features: b lacks avx2");
        assert_eq!(named, expected == Status::Completed, "{:?}", report.notes);
        assert_sound(&report, &world, Fault::default());
    }
}

#[tokio::test]
async fn a_check_shows_everything_and_leaves_nothing() {
    let (here, there) = misfits();
    let world = World::new(Fault::default());
    world.lock().unwrap().findings = vec![there];
    let mut plan = plan(None, false);
    plan.findings = vec![here];
    plan.prepare.check_only = true;
    let (mut a, destination) = destination(&world);
    let (mut vm, mut memory, mut host) =
        (Source(Arc::clone(&world)), Memory(Arc::clone(&world)), Host(Arc::clone(&world)));
    let record = Recorder::new(Report::default());
    let findings = SourceMigration::new(&mut vm, &mut memory, &mut host, &mut a, plan, record).check().await;
    drop(a);
    assert!(destination.await.unwrap().is_err());
    let checks: Vec<Check> = findings.iter().map(|finding| finding.check).collect();
    let expected = [
        Check::Devices,
        Check::Peer,
        Check::ControlChannel,
        Check::ClockOffset,
        Check::CpuFeatures,
        Check::PathMtu,
    ];
    assert_eq!(checks, expected);
    let world = world.lock().unwrap();
    assert!(world.source_runs && !world.destination_exists);
    assert!(!world.source_journal.is_open() && !world.destination_journal.is_open());
}

#[tokio::test]
async fn what_is_not_admitted_is_neither_written_nor_started() {
    let world = World::new(Fault::default());
    world.lock().unwrap().unadmitted = vec![Finding::bad(Check::Admission, "b is full", "wait")];
    let mut plan = plan(None, false);
    plan.prepare.force = true;
    let report = run(&world, plan).await;
    assert!(report.error_desc.as_ref().unwrap().contains("admission: b is full: wait"), "{report:?}");
    assert_sound(&report, &world, Fault::default());
    let world = world.lock().unwrap();
    assert!(!world.calls.contains(&Call::Wait) && !world.calls.contains(&Call::Prepare));
}

/// A QEMU that was refused and does not end is tried again, and stays in the journal as long as it is there.
#[tokio::test]
async fn what_was_refused_and_does_not_end_is_not_forgotten() {
    for (times, ended) in [(1, true), (2, false)] {
        let world = World::new(Fault { destroy_fails: times, ..Fault::default() });
        world.lock().unwrap().findings = vec![misfits().1];
        let report = run(&world, plan(None, false)).await;
        assert_eq!(report.status, Status::Failed);
        let world = world.lock().unwrap();
        assert!(world.source_runs);
        assert_eq!((!world.destination_exists, !world.destination_journal.is_open()), (ended, ended));
    }
}

#[tokio::test]
async fn a_destination_that_refused_takes_no_page_and_no_commit() {
    let round = Message::RoundEnd { epoch: 1, frames: vec![0], last: true, transit_us: 0 };
    for next in
        [round, Message::StateEnd { bytes: 0 }, Message::Commit(crate::control::Commit { digest: None })]
    {
        let world = World::new(Fault::default());
        world.lock().unwrap().findings = vec![misfits().1];
        let (mut a, destination) = destination(&world);
        for message in [Message::hello("a"), Message::Prepare(Box::new(plan(None, false).prepare)), next] {
            a.send(Item::Message(message)).await.unwrap();
        }
        let error = destination.await.unwrap().unwrap_err();
        assert!(matches!(error, MigrationError::Unexpected { .. }), "{error}");
        assert!(!world.lock().unwrap().destination_exists);
    }
}

/// A guest that writes flat out, and 50 ms in which 32 of its 64 pages can be sent.
fn flat_out(convergence: Convergence) -> (Shared, SourcePlan) {
    let world = World::new(Fault { flat_out: true, ..Fault::default() });
    let convergence = Convergence { downtime_limit: Duration::from_millis(50), ..convergence };
    (world, SourcePlan { convergence, ..plan(None, false) })
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_writes_flat_out_is_throttled_and_freed() {
    let (world, plan) = flat_out(Convergence { auto_converge: true, ..plan(None, false).convergence });
    let fault = world.lock().unwrap().fault;
    let report = run(&world, plan).await;
    assert_eq!(report.status, Status::Completed, "{:?}", report.error_desc);
    assert_sound(&report, &world, fault);
    assert_eq!(world.lock().unwrap().throttles[0], 20, "gently first");
    assert_eq!((report.throttle.as_deref(), report.cpu_throttle_percentage), (Some("memory"), 0));
    let estimates: Vec<_> = report.rounds.iter().filter_map(|round| round.estimate).collect();
    assert!(estimates.last().unwrap().downtime_at_most <= 50.0, "{estimates:?}");
    assert!(estimates.iter().any(|estimate| estimate.cpu_throttle_percentage >= 20));
    assert!(report.expected_downtime.is_some() && report.prediction_error.is_some());
}

#[tokio::test(start_paused = true)]
async fn whatever_fails_while_it_is_throttled_frees_it() {
    for nth in 3..9 {
        for call in [Call::TakeWritten, Call::Send, Call::CloseRound, Call::Throttle] {
            let (world, plan) =
                flat_out(Convergence { auto_converge: true, ..plan(None, false).convergence });
            let fault = Fault {
                call: Some((call, nth - 3 * usize::from(call == Call::Throttle))),
                flat_out: true,
                ..Fault::default()
            };
            world.lock().unwrap().fault = fault;
            let report = run(&world, plan).await;
            assert_sound(&report, &world, fault);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_host_that_cannot_throttle_says_so_and_goes_on_without() {
    let (world, plan) = flat_out(Convergence { auto_converge: true, ..plan(None, false).convergence });
    let fault = Fault { call: Some((Call::Throttle, 0)), flat_out: true, ..Fault::default() };
    world.lock().unwrap().fault = fault;
    let report = run(&world, plan).await;
    assert!(report.error_desc.as_ref().unwrap().contains("does not converge"), "{:?}", report.error_desc);
    assert!(report.notes.iter().any(|note| note.contains("not throttled: ")), "{:?}", report.notes);
    assert_eq!(world.lock().unwrap().throttles, [20, 0], "what was half done is undone, and not tried again");
    assert_sound(&report, &world, fault);
}

#[tokio::test(start_paused = true)]
async fn when_the_time_is_up_the_plan_says_what_happens() {
    for (action, expected) in [
        (TimeoutAction::Cancel, Status::Failed),
        (TimeoutAction::Switchover, Status::Completed),
        (TimeoutAction::Throttle, Status::Completed),
    ] {
        let timeout = Some(Duration::from_secs(2));
        let (world, plan) =
            flat_out(Convergence { timeout, timeout_action: action, ..plan(None, false).convergence });
        let fault = world.lock().unwrap().fault;
        let begun = tokio::time::Instant::now();
        let report = run(&world, plan).await;
        assert_eq!(report.status, expected, "{action:?}: {:?}", report.error_desc);
        assert!(begun.elapsed() >= Duration::from_secs(2), "{action:?}");
        assert_eq!(!world.lock().unwrap().throttles.is_empty(), action == TimeoutAction::Throttle);
        if expected == Status::Failed {
            assert!(report.error_desc.as_ref().unwrap().contains("--timeout"));
        }
        assert_sound(&report, &world, fault);
    }
}

#[tokio::test(start_paused = true)]
async fn scans_that_stop_the_vm_are_counted_and_bounded() {
    let (report, world) = migrate(Fault::default(), None, true).await;
    let pauses = world.lock().unwrap().calls.iter().filter(|&&call| call == Call::Pause).count() as u64;
    assert_eq!(report.stuns.count, pauses);
    assert!(pauses > 0 && report.stuns.longest <= report.stuns.total);
    let live = migrate(Fault::default(), None, false).await.0;
    assert_eq!(live.stuns.count, 0);
}
