//! The host that the VM leaves.

mod closing;
mod pre_copy;

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::watch;

use super::{Convergence, Limits, MigrationError, SourceHandover, TimeoutAction, Verdict};
use crate::{
    control::{Channel, ControlError, Item, Message, PROTOCOL, Prepare, Prepared, VerifyMode},
    datapath::{Cipher, LaneLosses, Packed},
    memory::{Digest, MemoryError, PageSet},
    pki::Certified,
    preflight::{self, Check, Finding},
    report::{Phase, Recorder},
    vmm::SourceVm,
};

use pre_copy::{Sent, Stuns};

/// Probe frames of full size sent before the first page.
const PROBES: u32 = 8;
/// Attempts to get the last pages through before the migration is given up.
const LAST_ATTEMPTS: u32 = 60;
/// Longer than any round: what is awaited beside it has no limit of its own.
const A_LONG_TIME: Duration = Duration::from_secs(365 * 24 * 3600);
/// Time to find what a destination said before it hung up.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// The leaving VM's memory.
pub trait SourceMemory: Send {
    /// Begins tracking and returns the pages that exist. From here on every write counts.
    fn begin(&mut self) -> impl Future<Output = Result<PageSet, MemoryError>> + Send;
    /// Pages written since [`begin`](Self::begin) or the last call.
    fn take_written(&mut self) -> impl Future<Output = Result<PageSet, MemoryError>> + Send;
    /// Digest of all RAM.
    fn digest(&mut self) -> impl Future<Output = Result<Digest, MemoryError>> + Send;
    /// Gives the memory back to this host: the VM lives elsewhere, and its VMM here has ended.
    fn discard(&mut self) -> Result<(), MemoryError>;
    /// Ends tracking. Dirty bits that were taken are lost, which is why a new migration begins with all pages.
    fn release(&mut self);
}

/// What a round sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoundSent {
    /// Frames of each lane.
    pub frames: Vec<u32>,
    /// Pages sent with content.
    pub data_pages: u64,
    /// Zero pages.
    pub zero_pages: u64,
    /// Pages that were found to be written meanwhile, and are not of the round.
    pub written_besides: u64,
    /// Pages that were read and hashed to see whether they changed since they were sent.
    pub looked_at: u64,
    /// Pages that had not, and were not sent.
    pub unchanged_pages: u64,
    /// What of it was packed.
    pub packed: Packed,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// Times each lane heard nothing from the receiver for too long.
    pub stalls: Vec<u32>,
    /// How long frames and the word of them took there and back, at most of late.
    pub transit: Duration,
    /// The same at least, ever: where no frame met a queue.
    pub way: Duration,
    /// Limit of the wire at the round's end, bytes per second, when there is one.
    pub bandwidth_limit: Option<u64>,
}

/// The sending end of the page stream.
pub trait PageStream: Send {
    /// Sends `frames` probe frames of full size.
    fn probe(&mut self, frames: u32) -> impl Future<Output = Result<(), MigrationError>> + Send;
    /// Sends `pages` under `epoch`. `live` says that the VM runs and that what it wrote can be found while it does: then pages that were
    /// written before they are read need not be sent again.
    fn send(
        &mut self,
        epoch: u32,
        pages: Arc<PageSet>,
        live: bool,
    ) -> impl Future<Output = Result<RoundSent, MigrationError>> + Send;
    /// Pages that the last round leaves to be sent: those that were in lost frames, and those that were found to have been written
    /// besides its own.
    fn left(&mut self, pages: &PageSet, losses: &[LaneLosses]) -> PageSet;
}

/// What the source writes down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceRecord {
    /// The VM is offered: it is about to be touched.
    Offer,
    /// The commit may be sent from here on.
    Commit,
    /// Nothing is left to do, and that is whose the VM is.
    End(Verdict),
}

/// What the source's host provides once the destination is ready.
pub trait SourceHost: Send {
    /// Its page stream.
    type Stream: PageStream;
    /// Writes something down; returns when it is on disk.
    ///
    /// # Errors
    /// When it is not: then what it allows must not be done.
    fn record(&mut self, record: SourceRecord) -> impl Future<Output = Result<(), MigrationError>> + Send;
    /// Asks the destination over a new connection who has the VM, for a while. `None` when it cannot be reached.
    fn ask(&mut self) -> impl Future<Output = Option<Verdict>> + Send;
    /// Opens the page stream towards the destination.
    fn open_stream(
        &mut self,
        prepared: &Prepared,
    ) -> impl Future<Output = Result<Self::Stream, MigrationError>> + Send;
}

/// A request to stop, seen by everything that waits.
#[derive(Clone, Debug)]
pub struct Cancel(watch::Receiver<bool>);

impl Cancel {
    /// A switch and the thing that sees it.
    pub fn pair() -> (watch::Sender<bool>, Self) {
        let (sender, receiver) = watch::channel(false);
        (sender, Self(receiver))
    }

    async fn requested(&mut self) {
        // A switch that was thrown away can never be thrown.
        if self.0.wait_for(|&cancelled| cancelled).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// What is to be done.
#[derive(Clone, Debug)]
pub struct SourcePlan {
    /// Name of this host.
    pub own_name: String,
    /// Name of the other host, for messages.
    pub peer_name: String,
    /// The first request.
    pub prepare: Prepare,
    /// What this host found alone.
    pub findings: Vec<Finding>,
    /// What the destination has proved to be, if it has.
    pub certified: Option<Certified>,
    /// How the control channel is secured.
    pub secured: Finding,
    /// Whether this host can send frames. Where not, there is a finding about it.
    pub can_send: bool,
    /// Whether dirty scans need a stopped VM.
    pub quiesced: bool,
    /// When to switch over, and what to do until then.
    pub convergence: Convergence,
    /// Whether the stopped VM is kept here when it runs there, for debugging.
    pub keep_source: bool,
    /// Limits for each wait.
    pub limits: Limits,
}

/// One migration at its source.
pub struct SourceMigration<'a, V, M, H: SourceHost, C> {
    vm: &'a mut V,
    memory: &'a mut M,
    host: &'a mut H,
    channel: &'a mut C,
    plan: SourcePlan,
    record: Recorder,
    handover: SourceHandover,
    stream: Option<H::Stream>,
    findings: Vec<Finding>,
    epoch: u32,
    /// How long a word to the destination and its answer take: the least of what was seen, which is no less.
    words: Duration,
    stopped_at: Option<Instant>,
    /// Pages that existed when tracking began, until they are sent.
    existing: Option<Result<PageSet, MemoryError>>,
    /// When the VM was known to run at the destination, ms after the request.
    running_at: Option<f64>,
    begun: tokio::time::Instant,
    /// Something may have to be given back to the vCPUs.
    throttled: bool,
    stuns: Stuns,
}

impl<'a, V: SourceVm, M: SourceMemory, H: SourceHost, C: Channel> SourceMigration<'a, V, M, H, C> {
    /// Puts the parts together.
    pub fn new(
        vm: &'a mut V,
        memory: &'a mut M,
        host: &'a mut H,
        channel: &'a mut C,
        plan: SourcePlan,
        record: Recorder,
    ) -> Self {
        Self {
            vm,
            memory,
            host,
            channel,
            findings: plan.findings.clone(),
            plan,
            record,
            handover: SourceHandover::default(),
            stream: None,
            epoch: 0,
            words: Duration::ZERO,
            stopped_at: None,
            existing: None,
            running_at: None,
            begun: tokio::time::Instant::now(),
            throttled: false,
            stuns: Stuns::default(),
        }
    }

    /// Runs it to its end. The report says how it ended; the VM runs on exactly one side, or, if the destination
    /// does not confirm, is paused here and [`Status::Unsettled`]. When something is left to do the journal says so.
    pub async fn run(mut self, mut cancel: Cancel) {
        // What else is done when the time is up is for the rounds.
        let Convergence { timeout, timeout_action, .. } = self.plan.convergence;
        let timeout = timeout.filter(|_| timeout_action == TimeoutAction::Cancel);
        let before_commit = tokio::select! {
            done = self.until_commit() => done,
            () = cancel.requested() => Err(MigrationError::Cancelled),
            () = expired(timeout) => Err(self.deadline()),
        };
        let status = self.close(before_commit).await;
        self.unthrottle().await;
        self.memory.release();
        self.record.update(|report| {
            report.status = status;
            report.phase = Phase::Ended;
        });
        let total = self.record.elapsed_ms();
        self.record.update(|report| match self.running_at {
            Some(running) => (report.total_time, report.cleanup_time) = (running, total - running),
            None => report.total_time = total,
        });
    }

    /// The preflight alone: all that was found, here and there. Nothing of it is left afterwards.
    pub async fn check(mut self) -> Vec<Finding> {
        if let Err(error) = self.preflight().await {
            self.findings.push(preflight_broken(&error));
        }
        let _ = self.say(Message::Abort { reason: "this was only a check".into() }).await;
        preflight::settle(&mut self.findings, self.plan.prepare.force);
        self.findings
    }

    /// The order of things. Everything in here can be abandoned at any point. Returns the destination's digest.
    async fn until_commit(&mut self) -> Result<Option<Digest>, MigrationError> {
        let examined = self.preflight().await;
        self.admit(examined)?;
        let carry = self.pre_copy().await?;
        self.stop().await?;
        self.last_pages(carry).await?;
        let digest = self.digest_while_stopped().await?;
        self.device_state(digest).await
    }

    /// Everything up to the first page. What is wrong is a finding; an error ends the looking.
    async fn preflight(&mut self) -> Result<(), MigrationError> {
        self.greet().await?;
        self.prepare().await?;
        self.prove_path().await
    }

    /// Refuses with all reasons there are, or notes what is worth knowing.
    fn admit(&mut self, examined: Result<(), MigrationError>) -> Result<(), MigrationError> {
        preflight::settle(&mut self.findings, self.plan.prepare.force);
        if let Err(error) = examined {
            // What broke the looking says enough by itself.
            if preflight::outcome(&self.findings) == preflight::Outcome::CanGo {
                return Err(error);
            }
            self.findings.push(preflight_broken(&error));
        }
        if let Some(reason) = preflight::refusal(&self.plan.prepare.vm, &self.plan.peer_name, &self.findings)
        {
            return Err(MigrationError::Preflight(reason));
        }
        if self.plan.prepare.check_only || self.stream.is_none() {
            return Err(MigrationError::Host(
                "the destination made nothing ready and did not say why".into(),
            ));
        }
        self.record.update(|report| report.notes.extend(preflight::notes(&self.findings)));
        Ok(())
    }

    fn enter(&self, phase: Phase) {
        tracing::debug!(?phase, vm = self.plan.prepare.vm, "migration");
        self.record.update(|report| report.phase = phase);
    }

    async fn greet(&mut self) -> Result<(), MigrationError> {
        self.enter(Phase::Preflight);
        let (before, begun) = (preflight::wall_clock(), Instant::now());
        self.say(Message::hello(&self.plan.own_name)).await?;
        let answer = self.hear("its hello", self.plan.limits.hello).await?;
        self.words = begun.elapsed();
        match answer {
            Message::Hello { protocol: PROTOCOL, name, clock, .. } => {
                let after = preflight::wall_clock();
                if let Some(certified) = self.plan.certified.as_ref().filter(|it| !it.is(&name)) {
                    return Err(ControlError::Name { said: name, certified: certified.name.clone() }.into());
                }
                self.findings.push(Finding::good(Check::Peer, format!("{name} answers")));
                self.findings.push(self.plan.secured.clone());
                self.findings.push(preflight::clock(&name, before, clock, after));
                self.record.update(|report| report.destination.clone_from(&name));
                self.plan.peer_name = name;
                Ok(())
            }
            Message::Hello { protocol: theirs, .. } => {
                Err(ControlError::Version { ours: PROTOCOL, theirs }.into())
            }
            other => Err(MigrationError::unexpected(other.name(), "its hello")),
        }
    }

    async fn prepare(&mut self) -> Result<(), MigrationError> {
        self.enter(Phase::Prepare);
        self.say(Message::Prepare(Box::new(self.plan.prepare.clone()))).await?;
        if !self.plan.prepare.check_only {
            // While the destination starts its VMM. Should it refuse, the protection goes as it came.
            self.existing = Some(self.memory.begin().await);
        }
        let examined = match self.hear("that it is ready", self.plan.limits.prepare).await? {
            Message::Examined(examined) => *examined,
            other => return Err(MigrationError::unexpected(other.name(), "that it is ready")),
        };
        self.findings.extend(examined.findings);
        let Some(prepared) = examined.prepared.filter(|_| self.plan.can_send) else { return Ok(()) };
        self.record.update(|report| {
            report.transport.receiver.clone_from(&prepared.transport);
            report.transport.encryption = prepared.cipher.map_or("off", Cipher::name).into();
            report.transport.mtu = prepared.mtu.min(self.plan.prepare.mtu);
        });
        match self.host.open_stream(&prepared).await {
            Ok(stream) => self.stream = Some(stream),
            Err(error) => self.findings.push(preflight::path_unproved(&error.to_string(), true)),
        }
        Ok(())
    }

    fn stream(&mut self) -> Result<&mut H::Stream, MigrationError> {
        self.stream.as_mut().ok_or_else(|| MigrationError::Host("the page stream is not open".into()))
    }

    /// Frames of the size that the NICs allow must really arrive: switches in between have MTUs of their own.
    async fn prove_path(&mut self) -> Result<(), MigrationError> {
        let Some(stream) = &mut self.stream else {
            if !self.findings.iter().any(|finding| finding.check == Check::PathMtu) {
                self.findings.push(preflight::path_unproved("a migration NIC cannot be used", false));
            }
            return Ok(());
        };
        if let Err(error) = stream.probe(PROBES).await {
            self.findings.push(preflight::path_unproved(&error.to_string(), true));
            return Ok(());
        }
        self.say(Message::Probed { frames: PROBES }).await?;
        let came = match self.hear("the result of the probes", self.plan.limits.hello).await? {
            Message::ProbeResult { frames } => frames,
            other => return Err(MigrationError::unexpected(other.name(), "the result of the probes")),
        };
        let mtu = self.record.snapshot().transport.mtu;
        self.findings.push(if came == 0 {
            preflight::path_lost(&self.plan.peer_name, mtu, PROBES)
        } else {
            preflight::path_proved(mtu, PROBES, came)
        });
        Ok(())
    }

    /// Sends pages under a new epoch and learns which must be sent again.
    async fn round(
        &mut self,
        pages: &Arc<PageSet>,
        last: bool,
    ) -> Result<(RoundSent, PageSet, u64), MigrationError> {
        self.epoch += 1;
        let epoch = self.epoch;
        self.record.progress().store(0, std::sync::atomic::Ordering::Relaxed);
        let sent = self.send_pages(epoch, pages, !last && !self.plan.quiesced).await?;
        let transit_us = u64::try_from(sent.transit.as_micros()).unwrap_or(u64::MAX);
        let begun = Instant::now();
        self.say(Message::RoundEnd { epoch, frames: sent.frames.clone(), last, transit_us }).await?;
        let answer = self.hear("which frames arrived", self.plan.limits.round).await?;
        self.words = self.words.min(begun.elapsed());
        match answer {
            Message::RoundClosed { epoch: closed, losses, queues } if closed == epoch => {
                let lost = losses.iter().map(LaneLosses::frames).sum();
                self.record
                    .update(|report| report.stream.add_round(&sent.frames, &sent.stalls, &losses, queues));
                let again = self.stream()?.left(pages, &losses);
                Ok((sent, again, lost))
            }
            other => Err(MigrationError::unexpected(other.name(), "which frames arrived")),
        }
    }

    async fn stop(&mut self) -> Result<(), MigrationError> {
        self.enter(Phase::Stop);
        let stopped = self.vm.stop().await?;
        self.stopped_at = Some(stopped);
        self.phase_ended(stopped, |phases, ms| phases.stop = ms);
        Ok(())
    }

    /// Notes how long a part of the blackout took that began at `begun`.
    fn phase_ended(&self, begun: Instant, set: impl FnOnce(&mut crate::report::DowntimePhases, f64)) {
        let ms = begun.elapsed().as_secs_f64() * 1e3;
        self.record.update(|report| set(&mut report.downtime_phases, ms));
    }

    async fn last_pages(&mut self, carry: PageSet) -> Result<(), MigrationError> {
        self.enter(Phase::Final);
        let begun = Instant::now();
        let mut pages = self.memory.take_written().await?;
        pages.union_with(&carry);
        let mut attempts = 0;
        loop {
            let round_begun = Instant::now();
            let pending = Arc::new(pages);
            let (sent, again, lost) = self.round(&pending, true).await?;
            let number = self.record.snapshot().rounds.len() as u32;
            let duration = round_begun.elapsed();
            let round = Sent {
                number,
                pages: &pending,
                sent: &sent,
                duration,
                dirtied: 0,
                lost_frames: lost,
                last: true,
            };
            self.record_round(&round, None);
            if again.is_empty() {
                break;
            }
            attempts += 1;
            if attempts >= LAST_ATTEMPTS {
                return Err(MigrationError::Lossy(attempts));
            }
            pages = again;
        }
        self.phase_ended(begun, |phases, ms| phases.last_pages = ms);
        Ok(())
    }

    async fn digest_while_stopped(&mut self) -> Result<Option<Digest>, MigrationError> {
        if self.plan.prepare.verify != Some(VerifyMode::Full) {
            return Ok(None);
        }
        let begun = Instant::now();
        let digest = self.memory.digest().await?;
        self.phase_ended(begun, |phases, ms| phases.verify = ms);
        Ok(Some(digest))
    }

    /// Relays QEMU's device state. Returns when the destination has loaded it.
    async fn device_state(&mut self, own: Option<Digest>) -> Result<Option<Digest>, MigrationError> {
        self.enter(Phase::DeviceState);
        let begun = Instant::now();
        self.vm.release_state().await?;
        let mut bytes = 0;
        while let Some(part) = self.vm.state().await? {
            bytes += part.len() as u64;
            self.push(Item::State(part)).await?;
        }
        self.say(Message::StateEnd { bytes }).await?;
        self.phase_ended(begun, |phases, ms| phases.state = ms);
        let begun = Instant::now();
        // Written while the destination loads: the disk's time is not the blackout's.
        self.handover.state_sent();
        let committed = self.host.record(SourceRecord::Commit).await;
        self.handover.recorded(committed.is_ok());
        committed?;
        let digest = match self.hear("that the device state is loaded", self.plan.limits.switchover).await? {
            Message::Loaded { digest } => digest,
            other => return Err(MigrationError::unexpected(other.name(), "that the device state is loaded")),
        };
        self.phase_ended(begun, |phases, ms| phases.load = ms);
        if let Some(own) = own {
            if let Some(theirs) = digest.filter(|&theirs| theirs != own) {
                self.record.update(|report| report.verified = Some(false));
                return Err(MigrationError::Differs { source_digest: own, destination_digest: theirs });
            }
            self.record.update(|report| report.verified = digest.map(|theirs| theirs == own));
        }
        self.handover.loaded();
        Ok(digest)
    }

    /// Sends a round's pages, and listens meanwhile: a destination that gives up or dies ends the round at once.
    async fn send_pages(
        &mut self,
        epoch: u32,
        pages: &Arc<PageSet>,
        live: bool,
    ) -> Result<RoundSent, MigrationError> {
        let no_stream = || MigrationError::Host("the page stream is not open".into());
        let stream = self.stream.as_mut().ok_or_else(no_stream)?;
        let interrupted = tokio::select! {
            biased;
            sent = stream.send(epoch, Arc::clone(pages), live) => return sent,
            item = self.channel.recv("nothing", A_LONG_TIME) => item,
        };
        match interrupted? {
            Item::Message(Message::Abort { reason }) => Err(self.refused(reason)),
            other => Err(MigrationError::unexpected(other.name(), "nothing")),
        }
    }

    fn deadline(&self) -> MigrationError {
        MigrationError::Deadline(self.plan.convergence.timeout.unwrap_or_default().as_secs())
    }

    fn refused(&self, reason: String) -> MigrationError {
        MigrationError::Peer { host: self.plan.peer_name.clone(), reason }
    }

    async fn say(&mut self, message: Message) -> Result<(), MigrationError> {
        self.push(Item::Message(message)).await
    }

    /// Sends an item. When the destination has hung up, what it said before is the better reason.
    async fn push(&mut self, item: Item) -> Result<(), MigrationError> {
        let Err(broken) = self.channel.send(item).await else { return Ok(()) };
        match self.channel.recv("its reason", LAST_WORDS).await {
            Ok(Item::Message(Message::Abort { reason })) => Err(self.refused(reason)),
            _ => Err(broken.into()),
        }
    }

    async fn hear(&mut self, awaited: &'static str, seconds: u64) -> Result<Message, MigrationError> {
        match self.channel.recv(awaited, Limits::of(seconds)).await? {
            Item::Message(Message::Abort { reason }) => Err(self.refused(reason)),
            Item::Message(message) => Ok(message),
            other @ Item::State(_) => Err(MigrationError::unexpected(other.name(), awaited)),
        }
    }
}

/// The finding that stands for an error which ended the looking.
fn preflight_broken(error: &MigrationError) -> Finding {
    match error {
        // It was reached, and does not want.
        MigrationError::Peer { .. } | MigrationError::Control(ControlError::Version { .. }) => {
            Finding::bad(Check::Peer, error.to_string(), "")
        }
        MigrationError::Control(control) if control.is_distrust() => {
            Finding::bad(Check::ControlChannel, error.to_string(), "")
        }
        other => Finding::unknown(Check::Peer, other.to_string(), ""),
    }
}

async fn expired(timeout: Option<Duration>) {
    match timeout {
        Some(timeout) => tokio::time::sleep(timeout).await,
        None => std::future::pending().await,
    }
}
