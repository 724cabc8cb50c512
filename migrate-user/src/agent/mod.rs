//! The agent of one host: owns the migration NIC, runs migrations, answers the operator and other agents.

mod announcing;
mod api;
mod arrivals;
mod config;
mod history;
mod incoming;
mod link;
mod outgoing;
mod placement;
mod port;
mod ram;
mod running;
mod security;
mod settle;
mod socket;
mod worker;

pub use api::{
    CancelAnswer, CheckAnswer, ErrorAnswer, MigrateRequest, Progress, ResolveRequest, SetAnswer, SetRequest,
    Started, StatusAnswer,
};
pub use config::{AdmissionConfig, AgentConfig, AllowConfig, ConfigError, Peer, TransportChoice};
pub use port::{Port, PortStatus};
pub use running::run;
pub use security::CertificateStatus;
pub use settle::{Choice, Unsettled};
pub use socket::{SocketGroup, SocketStatus};

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
};

use tokio::sync::watch;

use crate::{
    control::{self, ControlError},
    datapath::Bandwidth,
    migration::{Cancel, DestinationMigration, Journal, Limits, MigrationError},
    preflight::{self, Check, Finding},
    privileges,
    report::{Recorder, Report, Status},
    sync::lock,
};
use arrivals::Arrivals;
use history::History;
use incoming::{Caller, IncomingHost};
use security::Security;

/// Everything an agent keeps.
pub struct Agent {
    config: AgentConfig,
    port: Arc<Port>,
    history: History,
    journal: Arc<Journal>,
    settlements: settle::Settlements,
    active: Mutex<HashMap<String, Active>>,
    arrivals: Arrivals,
    security: Security,
    socket: SocketStatus,
}

/// A migration that leaves this host.
#[derive(Clone)]
struct Active {
    record: Recorder,
    bandwidth: Bandwidth,
    cancel: Arc<watch::Sender<bool>>,
}

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The migration.
    #[error(transparent)]
    Migration(#[from] MigrationError),
    /// The VM's definition.
    #[error(transparent)]
    Definition(#[from] crate::vmm::DefinitionError),
    /// What the agent may not do.
    #[error(transparent)]
    Privileges(#[from] privileges::PrivilegeError),
    /// Something about this host.
    #[error("{0}")]
    Host(String),
    /// There is no such migration.
    #[error("there is no migration {0:?} on this host; `xferry status` lists them")]
    UnknownMigration(String),
    /// There was, and it is over.
    #[error("migration {id} is over ({status:?}): nothing of it can be changed any more")]
    Ended {
        /// The migration.
        id: String,
        /// How it ended.
        status: Status,
    },
    /// The VM is already on its way.
    #[error("VM {vm} is already being migrated ({id}); `xferry cancel {id}` stops that")]
    AlreadyMigrating {
        /// The VM.
        vm: String,
        /// Its migration.
        id: String,
    },
}

impl Agent {
    /// Takes the NIC and serves until asked to stop (SIGTERM, SIGINT).
    ///
    /// # Errors
    /// When the NIC, the control address or the API socket cannot be had.
    pub async fn serve(config: AgentConfig) -> Result<(), AgentError> {
        let host = |error: std::io::Error| AgentError::Host(format!("the agent cannot run: {error}"));
        if !crate::memory::supports_scan() {
            return Err(AgentError::Host(
                "this kernel has no PAGEMAP_SCAN, without which dirty pages cannot be tracked from outside: Linux 6.7 or later is needed".into(),
            ));
        }
        let security = Security::load(&config)?;
        let journal_path = config.state_dir.join("handover.journal");
        let journal = Arc::new(Journal::open(&journal_path).map_err(|error| {
            AgentError::Host(format!(
                "cannot use the journal {}: {error}; if it is damaged, see on both hosts which VMs run (`query-status`), then \
                 move the file away",
                journal_path.display()
            ))
        })?);
        let history = History::open(&config.state_dir, &journal.ids()).map_err(|error| {
            AgentError::Host(format!("cannot use state-dir {}: {error}", config.state_dir.display()))
        })?;
        let listener = patiently(|| Ok(control::listen(config.control.listen)?)).await?;
        let port = Arc::new(link::open_port(&config.migration).await?);
        let api = socket::bind(&config.socket, config.socket_group.as_ref())?;
        let agent = Arc::new(Self {
            port,
            history,
            journal,
            settlements: settle::Settlements::default(),
            active: Mutex::default(),
            arrivals: Arrivals::default(),
            security,
            socket: api.status,
            config,
        });
        agent.port.log();
        tracing::info!(
            name = agent.config.name,
            control = %agent.config.control.listen,
            receiver = agent.port.describe(),
            "agent ready; {}",
            agent.security
        );
        agent.security.warn();
        if let Some(hint) = &agent.socket.hint {
            tracing::info!(socket = %agent.socket.path.display(), "API: {hint}");
        }
        settle::recover(&agent, None);
        security::keep_current(Arc::clone(&agent)).await.map_err(host)?;
        let mut terminate =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).map_err(host)?;
        let stopped = tokio::select! {
            result = api::serve(api.listener, Arc::clone(&agent)) => result.map_err(host),
            () = accept(listener, Arc::clone(&agent)) => Ok(()),
            _ = terminate.recv() => Ok(()),
            _ = tokio::signal::ctrl_c() => Ok(()),
        };
        agent.wind_down().await;
        let _ = std::fs::remove_file(&agent.config.socket);
        stopped
    }

    /// Cancels what can be cancelled, so that every VM runs when the agent ends.
    async fn wind_down(&self) {
        for active in self.active().values() {
            let _ = active.cancel.send(true);
        }
        for _ in 0..500 {
            if self.active().is_empty() {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        tracing::warn!("a migration did not end within 10 s; its VM is where `xferry status` last said");
    }

    /// Writes to the journal, off the runtime's threads and within its time limit.
    ///
    /// # Errors
    /// When it is not on disk.
    async fn write_journal<T: Send + 'static>(
        &self,
        write: impl FnOnce(&Journal) -> std::io::Result<T> + Send + 'static,
    ) -> Result<T, MigrationError> {
        let journal = Arc::clone(&self.journal);
        let limit = self.config.limits.journal;
        let task = tokio::task::spawn_blocking(move || write(&journal));
        let written = match tokio::time::timeout(Limits::of(limit), task).await {
            Ok(Ok(written)) => written.map_err(|error| error.to_string()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("its disk did not answer within {limit} s")),
        };
        written.map_err(|problem| {
            MigrationError::Host(format!(
                "the journal {} takes no record: {problem}; without it a handover is not safe: free space there",
                self.journal.path().display()
            ))
        })
    }

    fn active(&self) -> MutexGuard<'_, HashMap<String, Active>> {
        lock(&self.active)
    }

    /// Begins a migration; it goes on whoever asked for it dies. Returns its id.
    fn start(self: &Arc<Self>, request: MigrateRequest) -> Result<String, AgentError> {
        let definition = crate::vmm::VmDefinition::read(&self.config.vms_dir, &request.vm)?;
        let peer = self.config.peer(&request.to)?;
        self.may_give(&peer)?;
        self.settlements.free(&request.vm)?;
        let id = self.history.next_id(&self.config.name);
        let (cancel, cancelled) = Cancel::pair();
        let bandwidth = Bandwidth::new(request.bandwidth_mib.map(mib_per_second));
        let record = Recorder::new(Report {
            id: id.clone(),
            vm: request.vm.clone(),
            source: self.config.name.clone(),
            destination: request.to.clone(),
            max_bandwidth: bandwidth.limit().unwrap_or(0),
            ..Report::default()
        });
        {
            let mut active = self.active();
            if let Some(error) = under_way(&active, &request.vm) {
                return Err(error);
            }
            let active_now =
                Active { record: record.clone(), bandwidth: bandwidth.clone(), cancel: Arc::new(cancel) };
            active.insert(id.clone(), active_now);
        }
        let agent = Arc::clone(self);
        let key = id.clone();
        tokio::spawn(async move {
            outgoing::migrate(&agent, &definition, peer, request, record.clone(), bandwidth, cancelled).await;
            let report = record.snapshot();
            agent.history.store(&report);
            // What is still open goes on being settled, and keeps the VM from anything else.
            settle::recover(&agent, Some(report.session));
            agent.active().remove(&key);
        });
        Ok(id)
    }

    /// Everything up to the first page, taken back.
    async fn check(self: &Arc<Self>, request: &MigrateRequest) -> Result<CheckAnswer, AgentError> {
        let definition = crate::vmm::VmDefinition::read(&self.config.vms_dir, &request.vm)?;
        let peer = self.config.peer(&request.to)?;
        let record = Recorder::new(Report {
            id: format!("{}-check", self.config.name),
            vm: request.vm.clone(),
            source: self.config.name.clone(),
            destination: request.to.clone(),
            ..Report::default()
        });
        let under_way = under_way(&self.active(), &request.vm);
        let unsettled = self.settlements.free(&request.vm).err().map(AgentError::from);
        let forbidden = self.may_give(&peer).err();
        let findings = match under_way.or(unsettled) {
            Some(reason) => vec![Finding::bad(Check::VmState, reason.to_string(), "")],
            None if let Some(reason) = forbidden => {
                vec![Finding::bad(Check::Admission, reason.to_string(), "")]
            }
            None => outgoing::check(self, &definition, peer, request, &record).await,
        };
        record.update(|report| report.notes = preflight::notes(&findings));
        let outcome = preflight::outcome(&findings);
        Ok(CheckAnswer {
            ok: outcome == preflight::Outcome::CanGo,
            outcome,
            reason: preflight::refusal(&request.vm, &record.snapshot().destination, &findings),
            findings,
            report: record.snapshot(),
        })
    }

    /// Whether a VM may go there.
    fn may_give(&self, peer: &Peer) -> Result<(), AgentError> {
        Ok(peer.name.as_deref().map_or(Ok(()), |name| self.config.may_receive(name))?)
    }

    fn cancel(&self, id: Option<&str>) -> Result<String, AgentError> {
        let active = self.active();
        let (id, migration) = match id {
            Some(id) => {
                active.get_key_value(id).ok_or_else(|| AgentError::UnknownMigration(id.to_owned()))?
            }
            None if active.len() > 1 => {
                return Err(AgentError::Host(
                    "several migrations are going on: name one (`xferry status` lists them)".into(),
                ));
            }
            None => active
                .iter()
                .next()
                .ok_or_else(|| AgentError::Host("no migration is going on on this host".into()))?,
        };
        // Nobody listens only when it has just ended.
        let _ = migration.cancel.send(true);
        Ok(id.clone())
    }

    /// Limits a migration that is under way to `mib` MiB/s on the wire, or not at all with 0.
    ///
    /// # Errors
    /// When there is none of this id from here, or not any more.
    fn set_bandwidth(&self, id: &str, mib: u64) -> Result<(), AgentError> {
        if let Some(active) = self.active().get(id) {
            let limit = mib_per_second(mib);
            active.bandwidth.set(Some(limit));
            tracing::info!(id, mib, "limit on the wire changed");
            active.record.update(|report| {
                report.max_bandwidth = limit;
                let phase = report.phase;
                report.notes.push(match mib {
                    0 => format!("limit on the wire taken away in round {} ({phase:?})", report.rounds.len()),
                    _ => format!(
                        "limit on the wire set to {mib} MiB/s in round {} ({phase:?})",
                        report.rounds.len()
                    ),
                });
            });
            return Ok(());
        }
        if let Some(report) = self.history.read(id) {
            return Err(AgentError::Ended { id: report.id, status: report.status });
        }
        // Ids begin with the host that a VM leaves.
        match id.rsplit_once('-') {
            Some((host, number)) if host != self.config.name && number.parse::<u64>().is_ok() => {
                Err(AgentError::Host(format!(
                    "migration {id} does not leave {}: its pace is set where it leaves, by the agent of {host}",
                    self.config.name
                )))
            }
            _ => Err(AgentError::UnknownMigration(id.to_owned())),
        }
    }

    fn progress(&self, id: &str) -> Result<Progress, AgentError> {
        if let Some(active) = self.active().get(id) {
            let mut report = active.record.snapshot();
            // It ends for others when its report is stored: whoever sees the end can ask for the report.
            report.status = Status::Active;
            return Ok(Progress { report, pages_done: active.record.pages_done() });
        }
        let report = self.history.read(id).ok_or_else(|| AgentError::UnknownMigration(id.to_owned()))?;
        Ok(Progress { report, pages_done: 0 })
    }

    fn status(&self) -> StatusAnswer {
        let certificate = self.security.certificate();
        StatusAnswer {
            name: self.config.name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            encrypted: certificate.is_some(),
            authenticated: certificate.is_some(),
            page_encryption: self.config.pages().encryption,
            certificate,
            socket: self.socket.clone(),
            port: self.port.status(),
            leaving: self.active().values().map(|active| active.record.snapshot()).collect(),
            arriving: self.arrivals.names(),
            unsettled: self.settlements.shown(),
            recent: self.history.recent(10),
        }
    }
}

/// MiB/s in bytes per second. What nobody has a link for is no limit that overflows.
const fn mib_per_second(mib: u64) -> u64 {
    mib.saturating_mul(1 << 20)
}

/// That a VM is on its way from here already, if it is.
fn under_way(active: &HashMap<String, Active>, vm: &str) -> Option<AgentError> {
    let (id, _) = active.iter().find(|(_, other)| other.record.snapshot().vm == vm)?;
    Some(AgentError::AlreadyMigrating { vm: vm.to_owned(), id: id.clone() })
}

/// How long an agent that was just killed may still hold its port and its NIC.
const TAKEOVER_LIMIT: std::time::Duration = std::time::Duration::from_secs(2);

/// Tries again while what is wanted is in use: a supervisor restarts an agent before the kernel has cleaned up
/// after the old one.
async fn patiently<T>(mut open: impl FnMut() -> Result<T, AgentError>) -> Result<T, AgentError> {
    let begun = std::time::Instant::now();
    loop {
        match open() {
            Err(error) if error.in_use() && begun.elapsed() < TAKEOVER_LIMIT => {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
            other => return other,
        }
    }
}

/// Serves other agents.
async fn accept(listener: tokio::net::TcpListener, agent: Arc<Agent>) {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let agent = Arc::clone(&agent);
                let Some(place) = agent.security.place(&agent.config, peer.ip()) else {
                    tracing::debug!(%peer, "too many connections that have proved nothing yet: hung up");
                    continue;
                };
                tokio::spawn(async move {
                    let dead_peer = Limits::of(agent.config.limits.dead_peer);
                    if let Err(error) = control::tune(&stream, dead_peer) {
                        tracing::warn!(%peer, %error, "connection not usable");
                        return;
                    }
                    let limit = Limits::of(agent.config.limits.hello);
                    let mut channel = match agent.security.accept(stream, limit).await {
                        Ok(channel) => channel,
                        Err(error) => {
                            tracing::info!(%peer, %error, "connection refused");
                            return;
                        }
                    };
                    let secret = match channel.page_secret() {
                        Ok(secret) => secret,
                        Err(error) => {
                            tracing::warn!(%peer, %error, "connection not usable");
                            return;
                        }
                    };
                    let caller = Caller { certified: channel.peer().cloned(), secret };
                    let mut host = IncomingHost::new(Arc::clone(&agent), peer.ip(), caller, place);
                    let migration = DestinationMigration::new(
                        &mut host,
                        &mut channel,
                        agent.config.name.clone(),
                        agent.config.limits,
                    );
                    match migration.run().await {
                        Ok(true) => tracing::info!(%peer, "a VM has arrived"),
                        Ok(false) => tracing::info!(%peer, "an earlier migration is settled"),
                        Err(error) => tracing::info!(%peer, %error, "no VM has arrived"),
                    }
                    // What could not be brought to its end in time goes on being settled.
                    if let Some(session) = host.session() {
                        settle::recover(&agent, Some(session));
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

impl AgentError {
    fn in_use(&self) -> bool {
        use crate::{datapath::UdpError, network::NetworkError, xsk::XskError};
        match self {
            Self::Migration(MigrationError::Control(ControlError::Listen { source, .. })) => {
                source.kind() == std::io::ErrorKind::AddrInUse
            }
            Self::Migration(MigrationError::Network(NetworkError::Occupied(_))) => true,
            Self::Migration(MigrationError::Udp(UdpError::InUse { .. })) => true,
            Self::Migration(MigrationError::Xsk(XskError::System { source, .. })) => {
                *source == rustix::io::Errno::BUSY
            }
            _ => false,
        }
    }
}

impl From<ControlError> for AgentError {
    fn from(error: ControlError) -> Self {
        Self::Migration(error.into())
    }
}

/// Ends a report that never got as far as a migration.
fn refuse(record: &Recorder, error: &dyn std::fmt::Display) {
    let total = record.elapsed_ms();
    record.update(|report| {
        report.status = Status::Failed;
        report.phase = crate::report::Phase::Ended;
        report.error_desc = Some(error.to_string());
        report.total_time = total;
    });
}
