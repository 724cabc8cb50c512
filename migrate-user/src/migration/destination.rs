//! The host that the VM comes to.

mod closing;
mod examining;

use std::{future::Future, time::Duration};

use super::{DestinationHandover, DestinationStep, Limits, MigrationError, Recorded, Verdict};
use crate::{
    control::{Channel, ControlError, Item, Message, PROTOCOL, Prepare, Prepared, VerifyMode},
    datapath::{LaneLosses, QueueFigures},
    memory::Digest,
    preflight::Finding,
    vmm::DestinationVm,
};

/// Time for a source to read why it was refused.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);
/// Longest way of frames that a source is believed: a round must not wait for ever.
const LONGEST_TRANSIT: Duration = Duration::from_millis(500);

/// How far a destination got with making ready.
pub struct Preparation<V> {
    /// What it found with the waiting VM, or why there is none.
    pub findings: Vec<Finding>,
    /// Where pages can be sent; `None` when something refuses the VM, or it was only a check.
    pub prepared: Option<Prepared>,
    /// What waits, if anything does; to be ended where it is not `prepared`.
    pub vm: Option<V>,
}

/// What the destination's host provides.
pub trait DestinationHost: Send {
    /// A VM that waits for its state.
    type Vm: DestinationVm;
    /// The source has said that it is host `name`.
    ///
    /// # Errors
    /// When it is known to be another.
    fn greeted(&mut self, name: &str) -> Result<(), MigrationError>;
    /// Whether this VM may come at all, before anything is written or started: what can be told so far. If that
    /// refuses it, nothing is written or started.
    fn admit(&mut self, request: &Prepare) -> Vec<Finding>;
    /// Writes something down, unless the opposite was decided before; returns when it is on disk.
    ///
    /// # Errors
    /// When it cannot be written: then what it allows must not be done.
    fn record(
        &mut self,
        record: DestinationRecord,
    ) -> impl Future<Output = Result<Recorded, MigrationError>> + Send;
    /// Starts the waiting VM and compares it with the source's. If it fits, and it is not only a check, reserves its
    /// memory and opens the page stream. On error also what of the VM is left to be ended.
    fn prepare(
        &mut self,
        request: &Prepare,
    ) -> impl Future<Output = Result<Preparation<Self::Vm>, Unprepared<Self::Vm>>> + Send;
    /// Opens the page stream for probes alone: no VM comes. `None` when no frame can be received, which is one more
    /// finding then.
    fn hear_probes(&mut self, request: &Prepare, findings: &mut Vec<Finding>) -> Option<Prepared>;
    /// Waits shortly for `sent` probe frames and returns how many came.
    fn probes(&mut self, sent: u32) -> impl Future<Output = u64> + Send;
    /// Waits until all `frames` (by lane) of `epoch` have come, or no more come, and closes it. `last` says that the
    /// VM is stopped meanwhile; `transit` is how long frames may be on their way.
    fn close_round(
        &mut self,
        epoch: u32,
        frames: &[u32],
        last: bool,
        transit: Duration,
    ) -> impl Future<Output = Result<Vec<LaneLosses>, MigrationError>> + Send;
    /// What came to each queue so far.
    fn figures(&self) -> Vec<QueueFigures>;
    /// Brings the page hashes up to date.
    fn refresh_hashes(&mut self) -> impl Future<Output = Result<(), MigrationError>> + Send;
    /// Digest of RAM: by the page hashes where they are kept; every page is read for it otherwise.
    fn digest(&mut self) -> impl Future<Output = Result<Digest, MigrationError>> + Send;
    /// A number that grows while frames arrive.
    fn progress(&self) -> u64;
    /// Ends the page stream; no frame is placed after it.
    fn close_stream(&mut self) -> impl Future<Output = ()> + Send;
    /// Answers a source that asks about a session over a new connection.
    ///
    /// # Errors
    /// When there is no answer yet, or it cannot be written down.
    fn settle(&mut self, session: u64) -> impl Future<Output = Result<Verdict, MigrationError>> + Send;
    /// Answers a destination that took a VM which left this host, and died; see
    /// [`super::SessionState::claimed_by_destination`].
    ///
    /// # Errors
    /// When there is no answer yet, or it cannot be written down.
    fn claim(
        &mut self,
        session: u64,
        whole: bool,
    ) -> impl Future<Output = Result<Verdict, MigrationError>> + Send;
    /// Tells the network that the VM is here. Returns announcements sent and planned in all.
    fn announce(&mut self) -> (u32, u32);
    /// The VM is gone and never ran: gives back what was reserved for it.
    fn give_back(&mut self);
    /// The VM runs: lets go of it.
    fn keep(&mut self, vm: Self::Vm);
}

/// What the destination writes down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestinationRecord {
    /// A VMM is about to wait here.
    Waiting,
    /// The VM is taken, unless it was refused before.
    Accepted,
    /// The VM never ran here and never will.
    Refused,
    /// Nothing is left to do, and that is whose the VM is.
    End(Verdict),
}

/// Why a VM cannot be received, and what of it is left to be ended.
pub struct Unprepared<V> {
    /// Why.
    pub error: MigrationError,
    /// What waits, if anything does.
    pub vm: Option<V>,
}

impl<V, E: Into<MigrationError>> From<E> for Unprepared<V> {
    fn from(error: E) -> Self {
        Self { error: error.into(), vm: None }
    }
}

/// What the destination has in its hands.
enum State<V> {
    /// Nothing yet.
    Greeted,
    /// The VM was refused, or it was only a check: the path can be probed, and nothing else. `vm` is what did not end.
    Examined { vm: Option<V> },
    /// A VM that waits; pages arrive.
    Receiving { vm: V, verify: Option<VerifyMode> },
    /// Part of the device state is loaded.
    Loading { vm: V, verify: Option<VerifyMode>, digest: Option<Digest>, bytes: u64 },
    /// A whole VM, stopped; still the source's.
    Loaded { vm: V, verify: Option<VerifyMode>, digest: Option<Digest> },
    /// It runs here.
    Running,
    /// A source asked how an earlier session stands, and was told.
    Answered,
}

/// One migration at its destination.
pub struct DestinationMigration<'a, H: DestinationHost, C> {
    host: &'a mut H,
    channel: &'a mut C,
    own_name: String,
    limits: Limits,
    state: Option<State<H::Vm>>,
    handover: DestinationHandover,
}

impl<'a, H: DestinationHost, C: Channel> DestinationMigration<'a, H, C> {
    /// Puts the parts together.
    pub fn new(host: &'a mut H, channel: &'a mut C, own_name: String, limits: Limits) -> Self {
        Self {
            host,
            channel,
            own_name,
            limits,
            state: Some(State::Greeted),
            handover: DestinationHandover::default(),
        }
    }

    /// Serves one source to the end. Whether the VM runs here now: a source may also only have asked.
    ///
    /// # Errors
    /// Why it does not. Nothing of the half-made VM is left then, or the journal says that something may be.
    pub async fn run(mut self) -> Result<bool, MigrationError> {
        let served = self.serve().await;
        self.host.close_stream().await;
        match served {
            Ok(()) => Ok(matches!(self.state, Some(State::Running))),
            Err(error) => self.close(error).await,
        }
    }

    async fn serve(&mut self) -> Result<(), MigrationError> {
        self.greet().await?;
        loop {
            let item = self.next().await?;
            // On error the state stays, for run() to clean up.
            self.step(item).await?;
            if matches!(self.state, Some(State::Answered)) {
                return Ok(());
            }
            if matches!(self.state, Some(State::Running)) {
                // The source's goodbye, or the end of the connection: it makes no difference any more.
                let _ = self.channel.recv("its goodbye", Limits::of(self.limits.hello)).await;
                return Ok(());
            }
        }
    }

    async fn greet(&mut self) -> Result<(), MigrationError> {
        let (theirs, name) = match self.channel.recv("its hello", Limits::of(self.limits.hello)).await? {
            Item::Message(Message::Hello { protocol, name, .. }) => (protocol, name),
            other => return Err(MigrationError::unexpected(other.name(), "its hello")),
        };
        self.channel.send(Item::Message(Message::hello(&self.own_name))).await?;
        if theirs != PROTOCOL {
            return Err(ControlError::Version { ours: PROTOCOL, theirs }.into());
        }
        self.host.greeted(&name)
    }

    /// The next item. A round may take long, so silence counts only while no frames come either.
    async fn next(&mut self) -> Result<Item, MigrationError> {
        let limit = Limits::of(match self.state {
            Some(State::Receiving { .. }) => self.limits.silence,
            _ => self.limits.switchover.max(self.limits.hello),
        });
        loop {
            let before = self.host.progress();
            let item = match &mut self.state {
                Some(State::Receiving { vm, .. } | State::Loading { vm, .. } | State::Loaded { vm, .. }) => {
                    tokio::select! {
                        biased;
                        item = self.channel.recv("its next message", limit) => item,
                        ended = vm.ended() => return Err(ended.into()),
                    }
                }
                _ => self.channel.recv("its next message", limit).await,
            };
            match item {
                Err(ControlError::Timeout { .. }) if self.host.progress() != before => {}
                other => return Ok(other?),
            }
        }
    }

    /// One item moves the state by one step, or is an error that leaves it.
    async fn step(&mut self, item: Item) -> Result<(), MigrationError> {
        if let Item::Message(Message::Abort { reason }) = item {
            return Err(MigrationError::Peer { host: "the source".into(), reason });
        }
        let Some(state) = self.state.take() else {
            return Err(MigrationError::Host("a migration without a state".into()));
        };
        match (state, item) {
            (State::Greeted, Item::Message(Message::Prepare(request))) => {
                self.state = Some(State::Greeted);
                self.examine(&request).await
            }
            (State::Greeted, Item::Message(Message::Settle { session })) => {
                self.state = Some(State::Answered);
                let accepted = self.host.settle(session).await? == Verdict::Accepted;
                self.say(Message::Settled { accepted }).await
            }
            (State::Greeted, Item::Message(Message::Claim { session, whole })) => {
                self.state = Some(State::Answered);
                let accepted = self.host.claim(session, whole).await? == Verdict::Accepted;
                self.say(Message::Settled { accepted }).await
            }
            (
                state @ (State::Receiving { .. } | State::Examined { .. }),
                Item::Message(Message::Probed { frames }),
            ) => {
                self.state = Some(state);
                let frames = self.host.probes(frames).await;
                self.say(Message::ProbeResult { frames }).await
            }
            (
                State::Receiving { vm, verify },
                Item::Message(Message::RoundEnd { epoch, frames, last, transit_us }),
            ) => {
                self.state = Some(State::Receiving { vm, verify });
                let transit = Duration::from_micros(transit_us).min(LONGEST_TRANSIT);
                let losses = self.host.close_round(epoch, &frames, last, transit).await?;
                let whole = losses.is_empty();
                let queues = self.host.figures();
                let hashed = verify == Some(VerifyMode::Hash);
                // Before the answer, because the VM may be stopped upon it: this is a round's time, not the blackout's.
                if hashed && !last {
                    self.host.refresh_hashes().await?;
                }
                self.say(Message::RoundClosed { epoch, losses, queues }).await?;
                if last && whole {
                    // Beside the device state, and when no frame can come any more.
                    if hashed {
                        self.host.refresh_hashes().await?;
                    }
                    // Before any of the device state: loading it writes to RAM.
                    self.host.close_stream().await;
                    let digest = match verify {
                        Some(_) => Some(self.host.digest().await?),
                        None => None,
                    };
                    if let Some(State::Receiving { vm, verify }) = self.state.take() {
                        self.state = Some(State::Loading { vm, verify, digest, bytes: 0 });
                    }
                }
                Ok(())
            }
            (State::Loading { mut vm, verify, digest, bytes }, Item::State(part)) => {
                let bytes = bytes + part.len() as u64;
                let loaded = vm.load(part).await;
                self.state = Some(State::Loading { vm, verify, digest, bytes });
                Ok(loaded?)
            }
            (
                State::Loading { mut vm, verify, digest, bytes },
                Item::Message(Message::StateEnd { bytes: sent }),
            ) => {
                let finished = if sent == bytes {
                    vm.finish().await.map_err(MigrationError::from)
                } else {
                    Err(MigrationError::Mismatch(format!(
                        "{bytes} bytes of device state came, {sent} were sent"
                    )))
                };
                self.state = Some(State::Loaded { vm, verify, digest });
                finished?;
                let shown = digest.filter(|_| verify == Some(VerifyMode::Full));
                self.say(Message::Loaded { digest: shown }).await
            }
            (State::Loaded { vm, verify, digest }, Item::Message(Message::Commit(_))) => {
                self.handover.committed();
                self.take(vm, verify, digest).await
            }
            (state, item) => {
                self.state = Some(state);
                Err(MigrationError::unexpected(item.name(), "the next step"))
            }
        }
    }

    async fn say(&mut self, message: Message) -> Result<(), MigrationError> {
        Ok(self.channel.send(Item::Message(message)).await?)
    }
}
