//! Finding out, with the peer, who has a VM, and acting on it: for what an earlier life of this agent left open,
//! and for a migration of this one whose end could not be reached in time. What only a human can decide waits here.

mod ask;
mod destination;
mod source;

pub(super) use ask::ask_until_answered;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::{Agent, AgentError, Peer};
use crate::{
    control::Message,
    migration::{MigrationError, OpenSession, Resolution, Role, Session, Verdict},
    sync::lock,
    vmm::{Qmp, QmpError, VmDefinition, VmmError},
};

/// Pause before something is tried again that a VMM or a disk did not do.
const RETRY: Duration = Duration::from_secs(1);

/// What a human would have to know who decides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Choice {
    /// What must be true before `--keep-here`, and what it does.
    pub keep_here: String,
    /// What must be true before `--give-up`, and what it does.
    pub give_up: String,
}

/// A session without an end, as `xferry status` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Unsettled {
    /// Its id.
    pub id: String,
    /// The VM.
    pub vm: String,
    /// This host's part.
    pub role: Role,
    /// Control address of the other host, if known.
    pub peer: Option<String>,
    /// How it stands and what is waited for.
    pub state: String,
    /// What a human can decide; `null` when the agents can settle it themselves.
    pub choice: Option<Choice>,
}

/// Sessions that are being settled.
#[derive(Default)]
pub(super) struct Settlements(Mutex<HashMap<u64, Arc<Settlement>>>);

/// One of them.
pub(super) struct Settlement {
    open: OpenSession,
    /// How it stands, and what a human may decide.
    standing: Mutex<(String, Option<Choice>)>,
    resolution: watch::Sender<Option<Resolution>>,
}

/// Who told whose the VM is.
enum Said {
    /// The other host.
    Answer(Verdict),
    /// A human.
    Resolution(Resolution),
}

impl Settlement {
    fn standing(&self) -> MutexGuard<'_, (String, Option<Choice>)> {
        lock(&self.standing)
    }

    /// Says how it stands.
    fn stands(&self, state: impl Into<String>) {
        *self.standing() = (state.into(), None);
    }

    /// Waits for a human, who is told `state` and `choice`.
    async fn human(&self, state: String, choice: Choice) -> Resolution {
        *self.standing() = (state, Some(choice));
        let mut said = self.resolution.subscribe();
        // The sender lives as long as this does.
        let resolution = match said.wait_for(Option::is_some).await {
            Ok(resolution) => *resolution,
            Err(_) => None,
        };
        self.resolution.send_replace(None);
        match resolution {
            Some(resolution) => resolution,
            None => std::future::pending().await,
        }
    }

    /// Asks the other host `question` until it answers, and listens to the human beside it, who is told `state` and
    /// `choice`.
    async fn find_out(&self, agent: &Agent, question: Message, state: String, choice: Choice) -> Said {
        let said = match peer_of(agent, &self.open.session) {
            Ok(peer) => {
                let no_answer = |error: &MigrationError| self.standing().0 = format!("{state}: {error}");
                tokio::select! {
                    verdict = ask_until_answered(agent, &peer, question, no_answer) => Said::Answer(verdict),
                    resolution = self.human(state.clone(), choice) => Said::Resolution(resolution),
                }
            }
            Err(why) => Said::Resolution(self.human(format!("{state}; {why}"), choice).await),
        };
        self.stands("being settled");
        said
    }

    /// Says what could not be done, and waits until it is to be tried again.
    async fn again(&self, what: &str, error: &MigrationError) {
        tracing::warn!(vm = self.open.session.vm, %error, "{what}");
        self.stands(format!("{what}: {error}; trying again"));
        tokio::time::sleep(RETRY).await;
    }

    /// The other host as operators know it: `what` it is, and its address where that is known.
    fn other(&self, what: &str, unknown: &str) -> String {
        self.open.session.peer.map_or_else(|| unknown.to_owned(), |peer| format!("{what} at {peer}"))
    }

    fn shown(&self) -> Unsettled {
        let (state, choice) = self.standing().clone();
        let session = &self.open.session;
        Unsettled {
            id: session.id.clone(),
            vm: session.vm.clone(),
            role: self.open.role,
            peer: session.peer.map(|peer| peer.to_string()),
            state,
            choice,
        }
    }
}

impl Settlements {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Settlement>>> {
        lock(&self.0)
    }

    /// All of them.
    pub fn shown(&self) -> Vec<Unsettled> {
        let mut shown: Vec<Unsettled> = self.lock().values().map(|settlement| settlement.shown()).collect();
        shown.sort_by(|a, b| a.id.cmp(&b.id));
        shown
    }

    /// Whether a VM takes part in one: then nothing else may be begun with it.
    ///
    /// # Errors
    /// Which one.
    pub fn free(&self, vm: &str) -> Result<(), MigrationError> {
        match self.lock().values().find(|settlement| settlement.open.session.vm == vm) {
            None => Ok(()),
            Some(settlement) => {
                let Unsettled { id, state, .. } = settlement.shown();
                Err(MigrationError::Host(format!(
                    "an earlier migration of {vm} ({id}) is not settled yet ({state}): see `xferry status`"
                )))
            }
        }
    }

    /// Passes a human's decision on.
    ///
    /// # Errors
    /// When there is nothing to decide.
    pub fn resolve(&self, id: &str, resolution: Resolution) -> Result<Unsettled, AgentError> {
        let settlement = {
            let all = self.lock();
            let found = all.values().find(|settlement| settlement.open.session.id == id);
            found.map(Arc::clone).ok_or_else(|| {
                let known: Vec<&str> =
                    all.values().map(|settlement| settlement.open.session.id.as_str()).collect();
                AgentError::Host(format!(
                    "no migration {id:?} waits to be settled on this host ({})",
                    if known.is_empty() { "none does".into() } else { known.join(", ") }
                ))
            })?
        };
        let shown = settlement.shown();
        if shown.choice.is_none() {
            return Err(AgentError::Host(format!(
                "there is nothing to decide about {id} now: {}",
                shown.state
            )));
        }
        settlement.resolution.send_replace(Some(resolution));
        Ok(shown)
    }
}

/// Settles sessions of the journal that have no end, each on its own, until it is settled: all that an earlier life of
/// this agent left open, or `only` the one.
pub(super) fn recover(agent: &Arc<Agent>, only: Option<u64>) {
    for open in agent.journal.open_sessions() {
        let number = open.session.session;
        if only.is_some_and(|only| only != number) {
            continue;
        }
        let settlement = Arc::new(Settlement {
            open,
            standing: Mutex::new(("just begun".into(), None)),
            resolution: watch::Sender::new(None),
        });
        // From here on the VM is not free for anything else.
        agent.settlements.lock().insert(number, Arc::clone(&settlement));
        let agent = Arc::clone(agent);
        tokio::spawn(async move {
            let open = &settlement.open;
            let (vm, id) = (&open.session.vm, &open.session.id);
            tracing::warn!(vm, id, role = ?open.role, "an earlier migration has no end: settling");
            let (verdict, how) = match open.role {
                Role::Source => source::settle(&agent, &settlement).await,
                Role::Destination => destination::settle(&agent, &settlement).await,
            };
            tracing::warn!(vm, id, "settled: {how}");
            if open.role == Role::Source {
                agent.history.settle(&agent.config.name, &open.session, verdict, &how);
            }
            agent.settlements.lock().remove(&number);
        });
    }
}

/// Whom to ask about a session, or why nobody can be asked.
fn peer_of(agent: &Agent, session: &Session) -> Result<Peer, String> {
    let address = session.peer.ok_or("its address is not in the journal")?;
    match &session.peer_name {
        Some(_) if agent.config.insecure => Ok(Peer { address, name: None }),
        Some(name) => Ok(Peer { address, name: Some(name.clone()) }),
        // Begun without certificates, or by an earlier version.
        None => agent.config.peer_at(address).map_err(|error| error.to_string()),
    }
}

/// Writes the end of a session down. Failing at it only repeats harmless work.
async fn conclude(agent: &Arc<Agent>, session: u64, verdict: Verdict) -> bool {
    let written = agent.write_journal(move |journal| journal.conclude(session, verdict)).await;
    if let Err(error) = &written {
        tracing::warn!(%error, "a settled session stays in the journal");
    }
    written.is_ok()
}

/// The monitor of a VM's QEMU on this host; `None` when there is none.
async fn connect(agent: &Agent, vm: &str) -> Result<Option<Qmp>, MigrationError> {
    let definition = VmDefinition::read(&agent.config.vms_dir, vm)
        .map_err(|error| MigrationError::Host(error.to_string()))?;
    match Qmp::connect(&definition.qmp, agent.config.limits.vmm().answer).await {
        Ok(qmp) => Ok(Some(qmp)),
        Err(QmpError::Connect { .. }) => Ok(None),
        Err(error) => Err(VmmError::from(error).into()),
    }
}

/// QEMU's run state, as `running`.
async fn run_state(qmp: &Qmp) -> Result<String, MigrationError> {
    let status = qmp.execute("query-status", serde_json::json!({})).await.map_err(VmmError::from)?;
    Ok(status["status"].as_str().unwrap_or_default().to_owned())
}
