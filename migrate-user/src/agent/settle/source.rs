//! The VM was to leave this host.

use std::sync::Arc;

use super::{Choice, Said, Settlement, conclude, connect, run_state};
use crate::{
    agent::{Agent, ram::RamFiles},
    control::Message,
    migration::{MigrationError, SourceHandover, SourceStep, Verdict},
    vmm::{QemuSource, SourceVm},
};

/// Carries the handover to its end. Whose the VM is, and a sentence about it.
pub(super) async fn settle(agent: &Arc<Agent>, settlement: &Settlement) -> (Verdict, String) {
    let number = settlement.open.session.session;
    let mut handover = SourceHandover::recovered(settlement.open.state);
    let mut how = String::new();
    loop {
        match handover.step() {
            SourceStep::Ask => ask(agent, settlement, &mut handover).await,
            SourceStep::RecordVerdict(verdict) => {
                let decided = agent.write_journal(move |journal| journal.decide(number, verdict)).await;
                if let Err(error) = &decided {
                    tracing::error!(%error, "what was said is not acted on");
                }
                handover.recorded(matches!(decided, Ok(crate::migration::Recorded::Written)));
            }
            SourceStep::LetRun => match let_run(agent, settlement).await {
                Ok(what) => {
                    how = what;
                    handover.done();
                }
                Err(error) => settlement.again("the VM is this host's and does not run", &error).await,
            },
            SourceStep::EndVm => match end(agent, settlement).await {
                Ok(what) => {
                    how = what;
                    handover.done();
                }
                Err(error) => {
                    settlement.again("the VM has left, and its old QEMU does not end", &error).await
                }
            },
            SourceStep::RecordEnd(verdict) => {
                let written = conclude(agent, number, verdict).await;
                handover.recorded(written);
            }
            SourceStep::Closed(verdict) => return (verdict, how),
            // A recovered handover is past these.
            SourceStep::RecordOffer
            | SourceStep::Move
            | SourceStep::RecordCommit
            | SourceStep::AwaitLoaded
            | SourceStep::SendCommit
            | SourceStep::Hear => handover.failed(),
        }
    }
}

/// Asks the destination, and listens to the human beside it.
async fn ask(agent: &Agent, settlement: &Settlement, handover: &mut SourceHandover) {
    let session = &settlement.open.session;
    let vm = &session.vm;
    let there = settlement.other("the host", "the other host");
    let state = format!("{vm} is paused here until {there} says whether it took it");
    let choice = Choice {
        keep_here: format!(
            "{there} must never have run {vm}, and must not come to run it: its agent is down, and its QEMU for {vm} is ended or the \
             host powered off for good. Then {vm} runs on here. If it did run there, two VMs write to the same disks, and they \
             are lost"
        ),
        give_up: format!(
            "{vm} must run on {there}, or be wanted no more: its paused copy here, perhaps the only one, is ended for good"
        ),
    };
    let question = Message::Settle { session: session.session };
    match settlement.find_out(agent, question, state, choice).await {
        Said::Answer(verdict) => handover.answered(verdict),
        Said::Resolution(resolution) => handover.resolved(resolution),
    }
}

async fn let_run(agent: &Agent, settlement: &Settlement) -> Result<String, MigrationError> {
    let vm = &settlement.open.session.vm;
    settlement.stands(format!("{vm} stays here and is made to run"));
    let Some(qmp) = connect(agent, vm).await? else {
        return Ok("the VM stays here, but its QEMU has ended: start it".into());
    };
    let mut source = QemuSource::new(vm.clone(), qmp, agent.config.limits.vmm());
    source.resume().await?;
    // An agent that was killed together with its guard process can have left a throttle.
    source.unthrottle().await?;
    Ok("the VM runs here".into())
}

async fn end(agent: &Agent, settlement: &Settlement) -> Result<String, MigrationError> {
    let session = &settlement.open.session;
    let there = settlement.other("the host", "the other host");
    settlement.stands(format!("{there} has {}, its old QEMU here is being ended", session.vm));
    let Some(qmp) = connect(agent, &session.vm).await? else {
        RamFiles::abandoned(&session.ram).empty();
        return Ok(format!("{there} has the VM, and its old QEMU here has ended"));
    };
    // It was stopped when it left, and nothing lets it run again: what runs was started since.
    if run_state(&qmp).await? == "running" {
        return Ok(format!("{there} took the VM; the one of this name that runs here was started since"));
    }
    if session.keep_source {
        return Ok(format!("{there} has the VM; its old QEMU is kept here, paused (--keep-source)"));
    }
    let ram = RamFiles::of(&qmp).await;
    QemuSource::new(session.vm.clone(), qmp, agent.config.limits.vmm()).quit().await?;
    ram.empty();
    Ok(format!("{there} has the VM; its old QEMU here was ended"))
}
