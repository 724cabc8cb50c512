//! The preflight at its destination: looks at what would run here, and keeps it only if it is to run.

use super::{DestinationHost, DestinationMigration, DestinationRecord, Preparation, State, Unprepared};
use crate::{
    control::{Channel, Examined, Message, Prepare},
    migration::MigrationError,
    preflight::{self, Outcome},
};

impl<H: DestinationHost, C: Channel> DestinationMigration<'_, H, C> {
    /// Answers with all findings, whatever they say.
    ///
    /// # Errors
    /// When the looking itself fails. What waits is in the state, for [`close`](Self::close) to end.
    pub(super) async fn examine(&mut self, request: &Prepare) -> Result<(), MigrationError> {
        let verify = request.verify;
        let mut findings = self.host.admit(request);
        preflight::settle(&mut findings, request.force);
        let mut left = None;
        if preflight::outcome(&findings) == Outcome::CanGo {
            self.record(DestinationRecord::Waiting).await?;
            let preparation = match self.host.prepare(request).await {
                Ok(preparation) => preparation,
                Err(Unprepared { error, vm }) => {
                    self.state = vm.map(|vm| State::Receiving { vm, verify });
                    return Err(error);
                }
            };
            findings.extend(preparation.findings);
            match preparation {
                Preparation { prepared: Some(prepared), vm: Some(vm), .. } => {
                    self.state = Some(State::Receiving { vm, verify });
                    let examined = Examined { findings, prepared: Some(prepared) };
                    return self.say(Message::Examined(Box::new(examined))).await;
                }
                Preparation { vm, .. } => left = self.dismiss(vm).await,
            }
        }
        let prepared = self.host.hear_probes(request, &mut findings);
        self.state = Some(State::Examined { vm: left });
        self.say(Message::Examined(Box::new(Examined { findings, prepared }))).await
    }

    /// Ends what waits and is not to run, before the source hears anything: what a check started is gone when it has
    /// its answer. What does not end is returned.
    async fn dismiss(&mut self, mut vm: Option<H::Vm>) -> Option<H::Vm> {
        self.handover.failed();
        if !self.destroy(&mut vm).await {
            return vm;
        }
        self.record_or_warn(DestinationRecord::Refused).await;
        None
    }
}
