//! The VM was to come to this host.

use std::sync::Arc;

use super::{Choice, Said, Settlement, conclude, connect, run_state};
use crate::{
    agent::{Agent, announcing, ram::RamFiles},
    control::Message,
    migration::{DestinationHandover, DestinationStep, MigrationError, Recorded, Seen, Verdict},
    vmm::{Destroyed, QemuSource, SourceVm, VmDefinition, inspect},
};

/// Carries the handover to its end. Whose the VM is, and a sentence about it.
pub(super) async fn settle(agent: &Arc<Agent>, settlement: &Settlement) -> (Verdict, String) {
    let session = settlement.open.session.session;
    let vm = settlement.open.session.vm.as_str();
    let mut handover = DestinationHandover::recovered(settlement.open.state);
    let mut how = String::new();
    loop {
        match handover.step() {
            DestinationStep::Look => match look(agent, vm).await {
                Ok(seen) => {
                    if seen == Seen::Running {
                        how = "the VM runs here".into();
                    }
                    handover.seen(seen);
                }
                Err(error) => {
                    settlement.again("the VM had been taken; its QEMU does not answer", &error).await
                }
            },
            DestinationStep::Claim => ask(agent, settlement, &mut handover, true).await,
            DestinationStep::Inquire => {
                ask(agent, settlement, &mut handover, false).await;
                RamFiles::abandoned(&settlement.open.session.ram).empty();
                how = "its QEMU here has ended".into();
            }
            DestinationStep::Run => match run(agent, settlement).await {
                Ok(()) => {
                    how = "the VM had been taken and runs here now".into();
                    handover.ran(true);
                }
                Err(error) => {
                    tracing::error!(vm, %error, "the VM that had been taken does not run");
                    handover.ran(false);
                }
            },
            DestinationStep::Destroy => match destroy(agent, settlement).await {
                Ok(what) => {
                    how = what;
                    handover.destroyed(Destroyed::NeverRan);
                }
                Err(error) => {
                    settlement.again("what is left of a VM that never ran here does not end", &error).await
                }
            },
            DestinationStep::RecordRefused => {
                let written = agent.write_journal(move |journal| journal.revoke(session)).await;
                handover.recorded(if written.is_ok() { Recorded::Written } else { Recorded::Failed });
                if let Err(error) = written {
                    settlement.again("that the VM is not taken cannot be written down", &error).await;
                }
            }
            // The connection is long gone: a source that wants to know asks.
            DestinationStep::Confirm | DestinationStep::Abort => handover.told(),
            DestinationStep::RecordEnd(verdict) => {
                let written = conclude(agent, session, verdict).await;
                handover.recorded(if written { Recorded::Written } else { Recorded::Failed });
            }
            DestinationStep::Closed(verdict) => return (verdict, how),
            // A recovered handover is past these.
            DestinationStep::RecordWaiting | DestinationStep::Receive | DestinationStep::RecordAccepted => {
                handover.failed();
            }
        }
    }
}

/// What became of a VM that was taken.
async fn look(agent: &Agent, vm: &str) -> Result<Seen, MigrationError> {
    let Some(qmp) = connect(agent, vm).await? else { return Ok(Seen::Gone) };
    Ok(if run_state(&qmp).await? == "running" { Seen::Running } else { Seen::Stopped })
}

/// Asks the source, and listens to the human beside it.
async fn ask(agent: &Agent, settlement: &Settlement, handover: &mut DestinationHandover, whole: bool) {
    let session = &settlement.open.session;
    let vm = &session.vm;
    let there = settlement.other("the source", "the source");
    let (state, choice) = if whole {
        (
            format!("{vm} was taken and is paused here until {there} says that it did not keep it"),
            Choice {
                keep_here: format!(
                    "{there} must be gone for good, and nobody may have let {vm} run on there. Then it runs here"
                ),
                give_up: format!("{there} must still have {vm}, paused or running: what is here is ended"),
            },
        )
    } else {
        (
            format!(
                "{vm} was taken, and its QEMU here is gone; whether it ever ran here is not known, and {there} keeps a paused copy"
            ),
            Choice {
                keep_here: format!(
                    "{vm} must have run here (its disks may have been written): then it died here, and {there} ends its paused copy"
                ),
                give_up: format!(
                    "{vm} must never have run here, not for an instant: then {there} lets its paused copy run on"
                ),
            },
        )
    };
    let question = Message::Claim { session: session.session, whole };
    match settlement.find_out(agent, question, state, choice).await {
        Said::Answer(verdict) => handover.claimed(verdict),
        Said::Resolution(resolution) => handover.resolved(resolution),
    }
}

/// Makes a VM run that was taken and never ran, and tells the network.
async fn run(agent: &Agent, settlement: &Settlement) -> Result<(), MigrationError> {
    let vm = &settlement.open.session.vm;
    let Some(qmp) = connect(agent, vm).await? else {
        return Err(MigrationError::Host("its QEMU has ended".into()));
    };
    let definition = VmDefinition::read(&agent.config.vms_dir, vm)
        .map_err(|error| MigrationError::Host(error.to_string()))?;
    // Without it the VM's network learns where it is when it sends.
    let announcer = match inspect(&qmp).await {
        Ok(facts) => {
            let macs: Vec<_> = facts.machine.nics.iter().map(|nic| nic.mac).collect();
            let opened = announcing::open(&announcing::uplinks(&definition, &macs, &facts));
            opened.map(|(announcer, _)| announcer).map_err(MigrationError::from)
        }
        Err(error) => Err(error.into()),
    };
    QemuSource::new(vm.clone(), qmp, agent.config.limits.vmm()).resume().await?;
    match announcer {
        Ok(mut announcer) => {
            announcer.announce();
            if let Err(error) = announcer.repeat(agent.config.announce) {
                tracing::warn!(%error, "announcements are not repeated");
            }
        }
        Err(error) => tracing::warn!(vm, %error, "the VM runs and is not announced"),
    }
    Ok(())
}

/// Ends what waits of a VM that never ran here, and gives its memory back.
async fn destroy(agent: &Agent, settlement: &Settlement) -> Result<String, MigrationError> {
    let vm = &settlement.open.session.vm;
    settlement.stands(format!("what is left of {vm}, which never ran here, is being ended"));
    let Some(qmp) = connect(agent, vm).await? else {
        RamFiles::abandoned(&settlement.open.session.ram).empty();
        return Ok("nothing is left of a VM that never ran here".into());
    };
    // A session that was not accepted never ran: a VM that runs is another, started since.
    if run_state(&qmp).await? == "running" {
        return Ok("a later VM of this name runs here".into());
    }
    let ram = RamFiles::of(&qmp).await;
    QemuSource::new(vm.clone(), qmp, agent.config.limits.vmm()).quit().await?;
    ram.empty();
    Ok("a half-made VM was ended; it had never run".into())
}
