//! Finding out, with the peer, who has a VM.
//!
//! Used by a source whose confirmation did not come, and by an agent that finds open sessions in its journal when
//! it starts.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use serde_json::json;

use super::Agent;
use crate::{
    control::{self, Channel, ControlError, Item, Message, PROTOCOL, split},
    migration::{Limits, MigrationError, OpenSession, Role, Verdict},
    vmm::{QemuSource, Qmp, QmpError, SourceVm, VmDefinition},
};

/// Pause between two attempts to reach a peer.
const RETRY: Duration = Duration::from_secs(1);

/// Asks the destination of `session` whether it took the VM. If it did not, it never will.
pub(super) async fn ask(
    peer: SocketAddr,
    own_name: &str,
    session: u64,
    limits: Limits,
) -> Result<Verdict, MigrationError> {
    let mut channel = split(control::connect(peer, None).await?);
    let limit = Limits::of(limits.hello);
    let hello = Message::Hello {
        protocol: PROTOCOL,
        software: env!("CARGO_PKG_VERSION").into(),
        name: own_name.into(),
    };
    channel.send(Item::Message(hello)).await?;
    match channel.recv("its hello", limit).await? {
        Item::Message(Message::Hello { protocol: PROTOCOL, .. }) => {}
        Item::Message(Message::Hello { protocol, .. }) => {
            return Err(ControlError::Version { ours: PROTOCOL, theirs: protocol }.into());
        }
        _ => return Err(MigrationError::Unexpected { got: "something else".into(), awaited: "its hello" }),
    }
    channel.send(Item::Message(Message::Settle { session })).await?;
    match channel.recv("who has the VM", limit).await? {
        Item::Message(Message::Settled { accepted: true }) => Ok(Verdict::Accepted),
        Item::Message(Message::Settled { accepted: false }) => Ok(Verdict::Refused),
        _ => Err(MigrationError::Unexpected { got: "something else".into(), awaited: "who has the VM" }),
    }
}

/// [`ask`] until there is an answer, or `patience` is over.
pub(super) async fn ask_until(
    peer: SocketAddr,
    own_name: &str,
    session: u64,
    limits: Limits,
    patience: Duration,
) -> Option<Verdict> {
    let asking = async {
        loop {
            match ask(peer, own_name, session, limits).await {
                Ok(verdict) => return verdict,
                Err(error) => tracing::info!(%peer, %error, "cannot settle yet"),
            }
            tokio::time::sleep(RETRY).await;
        }
    };
    tokio::time::timeout(patience, asking).await.ok()
}

/// Settles every session of the journal that has no end, each on its own, until it is settled: what an earlier
/// life of this agent left open, or a migration of this one whose destination fell silent.
pub(super) fn recover(agent: &Arc<Agent>, only: Option<u64>) {
    for open in agent.journal.open_sessions() {
        if only.is_some_and(|only| only != open.session) {
            continue;
        }
        tracing::warn!(vm = open.vm, session = open.session, role = ?open.role, "an earlier migration has no end: settling");
        let agent = Arc::clone(agent);
        tokio::spawn(async move {
            let settled = match open.role {
                Role::Source(peer) => source(&agent, &open, peer).await,
                Role::Destination => destination(&agent, &open).await,
            };
            match settled {
                Ok(what) => {
                    tracing::warn!(vm = open.vm, session = open.session, "settled: {what}");
                    conclude(&agent, open.session);
                    agent.history.settle(open.session, &what);
                }
                Err(error) => {
                    tracing::error!(vm = open.vm, session = open.session, %error, "not settled: somebody must look");
                }
            }
        });
    }
}

/// Notes that nothing is left to do. Failing at it only repeats harmless work.
pub(super) fn conclude(agent: &Agent, session: u64) {
    if let Err(error) = agent.journal.conclude(session) {
        tracing::warn!(path = %agent.journal.path().display(), %error, "the journal takes no record");
    }
}

/// The VM was to leave: it is ours unless the destination took it.
async fn source(agent: &Agent, open: &OpenSession, peer: SocketAddr) -> Result<String, MigrationError> {
    let verdict = loop {
        // Not bounded: until the peer answers nobody knows who has the VM, and a paused VM is safe.
        if let Some(verdict) =
            ask_until(peer, &agent.config.name, open.session, agent.config.limits, Duration::from_secs(3600))
                .await
        {
            break verdict;
        }
    };
    let Some(qmp) = connect(agent, &open.vm).await? else {
        return Ok(match verdict {
            Verdict::Accepted => format!("{} has the VM, and its old QEMU here has ended", agent_name(peer)),
            Verdict::Refused => "the VM's QEMU has ended, here and there: start the VM".into(),
        });
    };
    let mut vm = QemuSource::new(open.vm.clone(), qmp);
    match verdict {
        Verdict::Refused => {
            vm.resume().await?;
            Ok("the VM runs here".into())
        }
        Verdict::Accepted => {
            vm.quit().await?;
            Ok(format!("{} has the VM; its old QEMU here was ended", agent_name(peer)))
        }
    }
}

fn agent_name(peer: SocketAddr) -> String {
    format!("the host at {peer}")
}

/// The VM was to come: it is ours if we had taken it, else what waits here is ended.
async fn destination(agent: &Agent, open: &OpenSession) -> Result<String, MigrationError> {
    let verdict = agent
        .journal
        .decide(open.session, Verdict::Refused)
        .map_err(|error| MigrationError::Host(format!("the journal takes no record: {error}")))?;
    let Some(qmp) = connect(agent, &open.vm).await? else {
        return Ok("its QEMU here has ended".into());
    };
    let status = qmp.execute("query-status", json!({})).await.map_err(crate::vmm::VmmError::from)?;
    let status = status["status"].as_str().unwrap_or_default().to_owned();
    match (verdict, status.as_str()) {
        (Verdict::Accepted, "running") => Ok("the VM runs here".into()),
        (Verdict::Accepted, _) => {
            QemuSource::new(open.vm.clone(), qmp).resume().await?;
            Ok("the VM had been taken and now runs here; its network learns that when it sends".into())
        }
        // Refused sessions never ran: a VM that runs is a later one.
        (Verdict::Refused, "running") => Ok("a later VM of this name runs here".into()),
        (Verdict::Refused, _) => {
            QemuSource::new(open.vm.clone(), qmp).quit().await?;
            Ok("a half-made VM was ended; it had never run".into())
        }
    }
}

/// The monitor of a VM's QEMU on this host; `None` when there is none.
async fn connect(agent: &Agent, vm: &str) -> Result<Option<Qmp>, MigrationError> {
    let definition = VmDefinition::read(&agent.config.vms_dir, vm)
        .map_err(|error| MigrationError::Host(error.to_string()))?;
    match Qmp::connect(&definition.qmp).await {
        Ok(qmp) => Ok(Some(qmp)),
        Err(QmpError::Connect { .. }) => Ok(None),
        Err(error) => Err(crate::vmm::VmmError::from(error).into()),
    }
}
