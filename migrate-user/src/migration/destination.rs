//! The host that the VM comes to.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use super::{Limits, MigrationError, Verdict};
use crate::{
    control::{Channel, ControlError, Item, Message, PROTOCOL, Prepare, Prepared, Running, VerifyMode},
    datapath::LaneLosses,
    memory::Digest,
    vmm::DestinationVm,
};

/// Time for a source to read why it was refused.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// What the destination's host provides.
pub trait DestinationHost: Send {
    /// A VM that waits for its state.
    type Vm: DestinationVm;
    /// Starts the waiting VM, reserves its memory and opens the page stream. On error nothing of it is left.
    fn prepare(
        &mut self,
        request: &Prepare,
    ) -> impl Future<Output = Result<(Prepared, Self::Vm), MigrationError>> + Send;
    /// Waits shortly for `sent` probe frames and returns how many came.
    fn probes(&mut self, sent: u32) -> impl Future<Output = u64> + Send;
    /// Waits until all `frames` (by lane) of `epoch` have come, or no more come, and closes it. `last` says that the
    /// VM is stopped meanwhile.
    fn close_round(
        &mut self,
        epoch: u32,
        frames: &[u32],
        last: bool,
    ) -> impl Future<Output = Result<Vec<LaneLosses>, MigrationError>> + Send;
    /// Brings the page hashes up to date.
    fn refresh_hashes(&mut self) -> impl Future<Output = Result<(), MigrationError>> + Send;
    /// Digest of RAM by the page hashes; with `full` every page is read for it.
    fn digest(&mut self, full: bool) -> impl Future<Output = Result<Digest, MigrationError>> + Send;
    /// A number that grows while frames arrive.
    fn progress(&self) -> u64;
    /// Ends the page stream; no frame is placed after it.
    fn close_stream(&mut self) -> impl Future<Output = ()> + Send;
    /// Writes down that the VM is taken. Called before it runs.
    ///
    /// # Errors
    /// When a source that asked meanwhile was told that it is not, or it cannot be written: then it must not run.
    fn accept(&mut self) -> Result<(), MigrationError>;
    /// Writes down that the VM never ran here and never will.
    fn refuse(&mut self);
    /// Decides about a session that a source asks for over a new connection.
    ///
    /// # Errors
    /// When the decision cannot be written down.
    fn verdict(&mut self, session: u64) -> Result<Verdict, MigrationError>;
    /// Tells the network that the VM is here. Returns announcements sent and planned in all.
    fn announce(&mut self) -> (u32, u32);
    /// The VM runs: lets go of it.
    fn keep(&mut self, vm: Self::Vm);
}

/// What the destination has in its hands.
enum State<V> {
    /// Nothing yet.
    Greeted,
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
}

impl<'a, H: DestinationHost, C: Channel> DestinationMigration<'a, H, C> {
    /// Puts the parts together.
    pub fn new(host: &'a mut H, channel: &'a mut C, own_name: String, limits: Limits) -> Self {
        Self { host, channel, own_name, limits, state: Some(State::Greeted) }
    }

    /// Serves one source to the end. Whether the VM runs here now: a source may also only have asked.
    ///
    /// # Errors
    /// Why it does not. Nothing of the half-made VM is left then.
    pub async fn run(mut self) -> Result<bool, MigrationError> {
        let result = self.serve().await;
        self.host.close_stream().await;
        match result {
            Ok(()) => Ok(matches!(self.state, Some(State::Running))),
            Err(error) => {
                let half_made = match self.state.take() {
                    Some(
                        State::Receiving { vm, .. } | State::Loading { vm, .. } | State::Loaded { vm, .. },
                    ) => Some(vm),
                    // What runs is not touched, whatever happens to the connection.
                    Some(State::Running) => return Ok(true),
                    _ => None,
                };
                if let Some(mut vm) = half_made
                    && !vm.destroy().await
                {
                    // The source takes an abort for the promise that nothing runs here. It cannot be given.
                    return Err(error);
                }
                self.host.refuse();
                let abort = Message::Abort { reason: error.to_string() };
                // The source notices a lost connection by itself.
                if self.channel.send(Item::Message(abort)).await.is_ok() {
                    // Hanging up with unread items would throw the reason away on its way (TCP resets).
                    let drain = async { while self.channel.recv("its end", DRAIN_LIMIT).await.is_ok() {} };
                    let _ = tokio::time::timeout(DRAIN_LIMIT, drain).await;
                }
                Err(error)
            }
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
        let theirs = match self.channel.recv("its hello", Limits::of(self.limits.hello)).await? {
            Item::Message(Message::Hello { protocol, .. }) => protocol,
            Item::Message(other) => return Err(unexpected(&other, "its hello")),
            Item::State(_) => {
                return Err(MigrationError::Unexpected { got: "device state".into(), awaited: "its hello" });
            }
        };
        let hello = Message::Hello {
            protocol: PROTOCOL,
            software: env!("CARGO_PKG_VERSION").into(),
            name: self.own_name.clone(),
        };
        self.channel.send(Item::Message(hello)).await?;
        if theirs != PROTOCOL {
            return Err(ControlError::Version { ours: PROTOCOL, theirs }.into());
        }
        Ok(())
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
                // Nothing is held yet: a failure in here leaves nothing behind.
                self.state = Some(State::Greeted);
                let (prepared, vm) = self.host.prepare(&request).await?;
                self.state = Some(State::Receiving { vm, verify: request.verify });
                self.say(Message::Prepared(prepared)).await
            }
            (State::Greeted, Item::Message(Message::Settle { session })) => {
                self.state = Some(State::Answered);
                let accepted = self.host.verdict(session)? == Verdict::Accepted;
                self.say(Message::Settled { accepted }).await
            }
            (state @ State::Receiving { .. }, Item::Message(Message::Probed { frames })) => {
                self.state = Some(state);
                let frames = self.host.probes(frames).await;
                self.say(Message::ProbeResult { frames }).await
            }
            (State::Receiving { vm, verify }, Item::Message(Message::RoundEnd { epoch, frames, last })) => {
                self.state = Some(State::Receiving { vm, verify });
                let losses = self.host.close_round(epoch, &frames, last).await?;
                let whole = losses.is_empty();
                self.say(Message::RoundClosed { epoch, losses }).await?;
                if verify == Some(VerifyMode::Hash) {
                    self.host.refresh_hashes().await?;
                }
                if last && whole {
                    // Before any of the device state: loading it writes to RAM.
                    self.host.close_stream().await;
                    let digest = match verify {
                        Some(mode) => Some(self.host.digest(mode == VerifyMode::Full).await?),
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
            (State::Loaded { mut vm, verify, digest }, Item::Message(Message::Commit(_))) => {
                let begun = Instant::now();
                let ran = match self.host.accept() {
                    Ok(()) => vm.run().await.map_err(MigrationError::from),
                    Err(error) => Err(error),
                };
                if let Err(error) = ran {
                    self.state = Some(State::Loaded { vm, verify, digest });
                    return Err(error);
                }
                // It runs: nothing below may undo that.
                self.state = Some(State::Running);
                let (announced, announcements) = self.host.announce();
                self.host.keep(vm);
                let running = Running {
                    resume_ms: begun.elapsed().as_secs_f64() * 1e3,
                    announced,
                    announcements,
                    digest: digest.filter(|_| verify == Some(VerifyMode::Hash)),
                };
                self.say(Message::Running(running)).await
            }
            (state, item) => {
                self.state = Some(state);
                let got = match item {
                    Item::Message(message) => message.name().into(),
                    Item::State(_) => "device state".into(),
                };
                Err(MigrationError::Unexpected { got, awaited: "the next step" })
            }
        }
    }

    async fn say(&mut self, message: Message) -> Result<(), MigrationError> {
        Ok(self.channel.send(Item::Message(message)).await?)
    }
}

fn unexpected(got: &Message, awaited: &'static str) -> MigrationError {
    MigrationError::Unexpected { got: got.name().into(), awaited }
}
