//! The end of a migration at its destination: carries out what the handover says.

use std::time::Instant;

use super::{DRAIN_LIMIT, DestinationHost, DestinationMigration, DestinationRecord, DestinationStep, State};
use crate::{
    control::{Channel, Item, Message, Running, VerifyMode},
    memory::Digest,
    migration::{MigrationError, Recorded, Verdict},
    vmm::{DestinationVm, Destroyed},
};

impl<H: DestinationHost, C: Channel> DestinationMigration<'_, H, C> {
    /// The source has committed: decides, and lets the VM run.
    ///
    /// # Errors
    /// Why it does not run. The VM is in the state, for [`close`](Self::close) to end.
    pub(super) async fn take(
        &mut self,
        mut vm: H::Vm,
        verify: Option<VerifyMode>,
        digest: Option<Digest>,
    ) -> Result<(), MigrationError> {
        let begun = Instant::now();
        let ran = match self.record(DestinationRecord::Accepted).await {
            Ok(()) => vm.run().await.map_err(MigrationError::from),
            Err(error) => Err(error),
        };
        self.handover.ran(ran.is_ok());
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
        let told = self.say(Message::Running(running)).await;
        self.handover.told();
        if let DestinationStep::RecordEnd(verdict) = self.handover.step() {
            self.record_or_warn(DestinationRecord::End(verdict)).await;
        }
        told
    }

    /// Writes something down and tells the handover.
    ///
    /// # Errors
    /// When it is not on disk, or the opposite stands there.
    pub(super) async fn record(&mut self, record: DestinationRecord) -> Result<(), MigrationError> {
        let recorded = self.host.record(record).await;
        self.handover.recorded(*recorded.as_ref().unwrap_or(&Recorded::Failed));
        match recorded? {
            Recorded::Otherwise => {
                Err(MigrationError::Host("the source was told that the VM is not taken here".into()))
            }
            Recorded::Written | Recorded::Failed => Ok(()),
        }
    }

    pub(super) async fn record_or_warn(&mut self, record: DestinationRecord) {
        if let Err(error) = self.record(record).await {
            tracing::error!(%error, "it is settled later");
        }
    }

    /// From what went wrong to the end. Whether the VM runs here nevertheless.
    ///
    /// # Errors
    /// What went wrong, where it does not.
    pub(super) async fn close(&mut self, error: MigrationError) -> Result<bool, MigrationError> {
        self.handover.failed();
        let mut vm = match self.state.take() {
            Some(State::Receiving { vm, .. } | State::Loading { vm, .. } | State::Loaded { vm, .. }) => {
                Some(vm)
            }
            Some(State::Examined { vm }) => vm,
            // What runs is not touched, whatever happens to the connection.
            Some(State::Running) => {
                self.state = Some(State::Running);
                return Ok(true);
            }
            _ => None,
        };
        let mut told = false;
        loop {
            match self.handover.step() {
                DestinationStep::Destroy => {
                    // Nothing is promised that is not certain: it stays in the journal, and is tried again.
                    if !self.destroy(&mut vm).await {
                        return Err(error);
                    }
                }
                DestinationStep::RecordRefused => {
                    self.record_or_warn(DestinationRecord::Refused).await;
                    if self.handover.step() == DestinationStep::RecordRefused {
                        return Err(error);
                    }
                }
                DestinationStep::Abort => {
                    self.abort(&error).await;
                    told = true;
                    self.handover.told();
                }
                DestinationStep::RecordEnd(verdict) => {
                    self.record_or_warn(DestinationRecord::End(verdict)).await;
                }
                // Nothing was begun, so nothing was promised: only the reason is owed.
                DestinationStep::Closed(Verdict::Refused) if !told => {
                    self.abort(&error).await;
                    return Err(error);
                }
                DestinationStep::Closed(Verdict::Accepted) => {
                    let died = Message::Died {
                        reason: format!(
                            "it began to run at the destination and died there ({error}); its disks are as it left them"
                        ),
                    };
                    self.tell(died).await;
                    return Err(error);
                }
                _ => return Err(error),
            }
        }
    }

    /// Ends what waits, if anything does, and gives back what was reserved for it. Whether nothing is left for certain.
    pub(super) async fn destroy(&mut self, vm: &mut Option<H::Vm>) -> bool {
        let destroyed = match vm {
            Some(vm) => vm.destroy().await,
            None => Some(Destroyed::NeverRan),
        };
        let Some(destroyed) = destroyed else { return false };
        self.host.give_back();
        self.handover.destroyed(destroyed);
        true
    }

    /// Tells the source why, which it takes for the promise that nothing runs here.
    async fn abort(&mut self, error: &MigrationError) {
        self.tell(Message::Abort { reason: error.to_string() }).await;
    }

    /// The last thing that is said.
    async fn tell(&mut self, message: Message) {
        // The source notices a lost connection by itself.
        if self.channel.send(Item::Message(message)).await.is_ok() {
            // Hanging up with unread items would throw it away on its way (TCP resets).
            let drain = async { while self.channel.recv("its end", DRAIN_LIMIT).await.is_ok() {} };
            let _ = tokio::time::timeout(DRAIN_LIMIT, drain).await;
        }
    }
}
