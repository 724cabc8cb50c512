//! The end of a migration at its source, whichever it is: carries out what the handover says.

use std::time::{Duration, Instant};

use super::{SourceHost, SourceMemory, SourceMigration, SourceRecord};
use crate::{
    control::{Channel, Commit, Message, Running},
    memory::Digest,
    migration::{MigrationError, SourceStep, Verdict, Word},
    report::{Phase, Status},
    vmm::SourceVm,
};

/// Time to tell a destination that it is over. One that is gone finds out by itself.
const GOODBYE: Duration = Duration::from_secs(2);

impl<V: SourceVm, M: SourceMemory, H: SourceHost, C: Channel> SourceMigration<'_, V, M, H, C> {
    /// From where the destination holds the whole VM, or from what went wrong before, to the end. Not cancellable.
    pub(super) async fn close(&mut self, before: Result<Option<Digest>, MigrationError>) -> Status {
        let (digest, mut reason) = match before {
            Ok(digest) => (digest, None),
            Err(error) => {
                self.handover.failed();
                (None, Some(error))
            }
        };
        let begun = Instant::now();
        let mut running = None;
        let mut died = None;
        loop {
            match self.handover.step() {
                SourceStep::SendCommit => {
                    self.enter(Phase::Commit);
                    match self.say(Message::Commit(Commit { digest })).await {
                        Ok(()) => self.handover.sent(true),
                        // Its last words, found when it had hung up already.
                        Err(error @ MigrationError::Peer { .. }) => {
                            self.handover.sent(true);
                            self.handover.heard(Word::Abort);
                            reason = Some(error);
                        }
                        Err(error) => {
                            self.handover.sent(false);
                            reason = Some(error);
                        }
                    }
                }
                SourceStep::Hear => {
                    let word = match self.hear("that the VM runs", self.plan.limits.switchover).await {
                        Ok(Message::Running(word)) => {
                            self.phase_ended(begun, |phases, ms| phases.resume = ms);
                            self.note_downtime();
                            running = Some(word);
                            Word::Running
                        }
                        Ok(Message::Died { reason: why }) => {
                            died = Some(why);
                            Word::Running
                        }
                        Ok(other) => {
                            reason = Some(MigrationError::unexpected(other.name(), "that the VM runs"));
                            Word::Nothing
                        }
                        // The destination has ended its half before it says so: the VM is ours again.
                        Err(error @ MigrationError::Peer { .. }) => {
                            reason = Some(error);
                            Word::Abort
                        }
                        Err(error) => {
                            reason = Some(error);
                            Word::Nothing
                        }
                    };
                    self.handover.heard(word);
                }
                SourceStep::Ask => {
                    let why = reason.as_ref().map(ToString::to_string).unwrap_or_default();
                    tracing::warn!(vm = self.plan.prepare.vm, why, "handover not confirmed, asking again");
                    let Some(verdict) = self.host.ask().await else { return self.unsettled(&why) };
                    if verdict == Verdict::Accepted {
                        self.note(format!(
                            "the confirmation was lost ({why}); asked again, the destination has the VM"
                        ));
                    }
                    self.handover.answered(verdict);
                }
                SourceStep::LetRun => match self.let_run(reason.as_ref()).await {
                    Ok(()) => self.handover.done(),
                    Err(stuck) => return self.stuck(reason.as_ref(), &stuck),
                },
                SourceStep::EndVm => {
                    self.clean_up(running.take().unwrap_or_default()).await;
                    if let Err(note) = self.end_vm().await {
                        // The VM is safe; that its old VMM does not end is for the agent to go on with.
                        self.note(note);
                        return Status::Completed;
                    }
                    self.handover.done();
                }
                SourceStep::RecordEnd(verdict) => {
                    let written = self.host.record(SourceRecord::End(verdict)).await;
                    self.handover.recorded(written.is_ok());
                }
                SourceStep::Closed(Verdict::Accepted) => {
                    let Some(why) = died else { return Status::Completed };
                    self.record.update(|report| report.error_desc = Some(why));
                    return Status::Died;
                }
                SourceStep::Closed(Verdict::Refused) => {
                    let error = reason.unwrap_or(MigrationError::Cancelled);
                    self.say_goodbye(&error).await;
                    self.record.update(|report| report.error_desc = Some(error.to_string()));
                    return if matches!(error, MigrationError::Cancelled) {
                        Status::Cancelled
                    } else {
                        Status::Failed
                    };
                }
                // Humans are heard when the migration has given up (agent/settle).
                SourceStep::RecordVerdict(_) => return self.unsettled("a human is to decide"),
                // What comes before the commit is over, and `failed` has said so.
                SourceStep::RecordOffer
                | SourceStep::Move
                | SourceStep::RecordCommit
                | SourceStep::AwaitLoaded => self.handover.failed(),
            }
        }
    }

    pub(super) fn note(&self, note: String) {
        self.record.update(|report| report.notes.push(note));
    }

    fn note_downtime(&mut self) {
        self.running_at = Some(self.record.elapsed_ms());
        if let Some(stopped) = self.stopped_at {
            let downtime = stopped.elapsed().as_secs_f64() * 1e3;
            self.record.update(|report| {
                report.downtime = downtime;
                // What was asked for on top of it is in no prediction.
                let usual = downtime - report.downtime_phases.verify;
                report.prediction_error = report.expected_downtime.map(|expected| usual - expected);
            });
        }
    }

    /// The destination did not confirm and does not answer. Only it knows whether it took the VM.
    fn unsettled(&self, why: &str) -> Status {
        let (peer, id) = (&self.plan.peer_name, &self.plan.prepare.id);
        self.record.update(|report| {
            report.error_desc = Some(format!(
                "the VM was handed over but {peer} did not confirm that it runs there: {why}. It stays paused here; this agent goes on \
                 asking {peer}, also after a restart, and lets the VM run or ends it here as the answer is. If {peer} is gone \
                 for good: `xferry resolve {id}` says what must be true before you decide"
            ));
        });
        Status::Unsettled
    }

    /// The VM is ours and does not run.
    fn stuck(&self, reason: Option<&MigrationError>, stuck: &MigrationError) -> Status {
        let because = reason.map(|reason| format!("{reason}; ")).unwrap_or_default();
        self.record.update(|report| {
            report.error_desc = Some(format!(
                "{because}AND THE VM DOES NOT RUN HERE, though it is this host's: {stuck}; this agent goes on trying"
            ));
        });
        Status::Unsettled
    }

    /// Makes the VM run here and gives back what the migration took of it.
    async fn let_run(&mut self, reason: Option<&MigrationError>) -> Result<(), MigrationError> {
        let why = reason.map(ToString::to_string).unwrap_or_default();
        tracing::info!(vm = self.plan.prepare.vm, why, "migration abandoned");
        // The VM first: nothing is more urgent than that it runs. One that was never stopped is not touched.
        let touched =
            self.stopped_at.is_some() || self.record.snapshot().phase == Phase::Stop || self.stuns.now;
        let resumed = if touched { self.vm.resume().await } else { Ok(()) };
        self.unthrottle().await;
        self.memory.release();
        // Ends senders that nobody waits for any more.
        self.stream = None;
        Ok(resumed?)
    }

    async fn say_goodbye(&mut self, error: &MigrationError) {
        let abort = Message::Abort { reason: error.to_string() };
        let _ = tokio::time::timeout(GOODBYE, self.say(abort)).await;
    }

    /// The VM runs there: what is left to find out about it.
    async fn clean_up(&mut self, running: Running) {
        self.enter(Phase::Cleanup);
        self.record.update(|report| report.announce.rarp_sent = running.announcements);
        // The destination goes on by itself: that we are done is a courtesy.
        if let Err(error) = self.say(Message::Done).await {
            tracing::debug!(%error, "the destination did not take our goodbye");
        }
        let Some(theirs) = running.digest else { return };
        match self.memory.digest().await {
            Ok(own) => {
                self.record.update(|report| report.verified = Some(own == theirs));
                if own != theirs {
                    self.note(format!("RAM differs: {own} here, {theirs} at the destination"));
                }
            }
            Err(error) => self.note(format!("not verified: {error}")),
        }
    }

    /// Ends the VM's old VMM and frees its memory, unless it is to be kept.
    async fn end_vm(&mut self) -> Result<(), String> {
        if self.plan.keep_source {
            self.note(
                "the stopped VM is kept here (--keep-source): look at it, never `cont` it, and end it with QMP `quit`"
                    .into(),
            );
            return Ok(());
        }
        self.vm.quit().await.map_err(|error| {
            format!(
                "the old VMM does not end: {error}; it is stopped for good, and this agent goes on trying"
            )
        })?;
        if let Err(error) = self.memory.discard() {
            self.note(format!("the old RAM is not freed: {error}"));
        }
        Ok(())
    }
}
