//! The agent's API: HTTP and JSON on a unix socket, for the command line and for orchestrators.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, Path as UrlPath, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;

use super::{Agent, AgentError, CertificateStatus, SocketStatus, Unsettled, port::PortStatus};
use crate::{
    control::VerifyMode,
    datapath::{Compression, Encryption},
    migration::{Resolution, TimeoutAction},
    preflight::{Finding, Outcome},
    report::Report,
};

/// Longest request body that is read, bytes. Real ones have a few hundred.
const MAX_REQUEST: usize = 64 << 10;

/// `POST /v1/migrations` and `/v1/check`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct MigrateRequest {
    /// Name of the VM on this host.
    pub vm: String,
    /// Name or control address of the host to go to.
    pub to: String,
    /// Limit on the wire, MiB/s.
    pub bandwidth_mib: Option<u64>,
    /// Longest blackout that the last round may be predicted to cause, ms.
    pub downtime_limit_ms: Option<u64>,
    /// Limit for everything before the handover, s.
    pub timeout_s: Option<u64>,
    /// What to do when it is over.
    #[serde(default)]
    pub timeout_action: TimeoutAction,
    /// Whether to throttle the guest when it does not converge.
    #[serde(default)]
    pub auto_converge: bool,
    /// Whether and how to prove that RAM is equal.
    pub verify: Option<VerifyMode>,
    /// Whether and how pages are packed.
    #[serde(default)]
    pub compression: Compression,
    /// Keep the stopped VM at the source when it runs at the destination, for debugging.
    #[serde(default)]
    pub keep_source: bool,
    /// Whether to go on in spite of findings that may be overridden.
    #[serde(default)]
    pub force: bool,
}

/// `POST /v1/migrations/ID/set`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SetRequest {
    /// Limit on the wire from now on, MiB/s; 0 is none.
    pub bandwidth_mib: u64,
}

/// Answer to `POST /v1/migrations/ID/set`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SetAnswer {
    /// The migration.
    pub id: String,
    /// Its limit on the wire, MiB/s; 0 is none.
    pub bandwidth_mib: u64,
}

/// `POST /v1/migrations/ID/resolve`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ResolveRequest {
    /// What was decided.
    pub resolution: Resolution,
}

/// Answer to `POST /v1/migrations`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Started {
    /// Id of the migration.
    pub id: String,
}

/// Answer to `GET /v1/migrations/ID`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Progress {
    /// The report as it stands.
    pub report: Report,
    /// Pages of the current round that were looked at so far.
    pub pages_done: u64,
}

/// Answer to `POST /v1/migrations/ID/cancel`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CancelAnswer {
    /// The migration that is being cancelled.
    pub id: String,
}

/// Answer to `POST /v1/check`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CheckAnswer {
    /// Whether a migration would begin.
    pub ok: bool,
    /// The same, with "could not tell" apart from "refused".
    pub outcome: Outcome,
    /// Why not: all reasons.
    pub reason: Option<String>,
    /// Every check.
    pub findings: Vec<Finding>,
    /// What is known of the way: transport, scan mode, notes.
    pub report: Report,
}

/// Answer to `GET /v1/status`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct StatusAnswer {
    /// Name of the host.
    pub name: String,
    /// Version of the agent.
    pub version: String,
    /// Whether the control channel is encrypted. The device state is part of it; for RAM see `page-encryption`.
    pub encrypted: bool,
    /// Whether both ends of the control channel are proved by certificates.
    pub authenticated: bool,
    /// Whether RAM is encrypted on its way.
    pub page_encryption: Encryption,
    /// This host's certificate; `null` with `insecure = true`.
    pub certificate: Option<CertificateStatus>,
    /// The API's socket.
    pub socket: SocketStatus,
    /// The migration NIC.
    pub port: PortStatus,
    /// Migrations from here.
    pub leaving: Vec<Report>,
    /// VMs on their way to here.
    pub arriving: Vec<String>,
    /// Earlier migrations, in either direction, without an end.
    pub unsettled: Vec<Unsettled>,
    /// The last migrations from here, newest first.
    pub recent: Vec<Report>,
}

/// Body of every answer that is not a success.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ErrorAnswer {
    /// What is wrong and what to do.
    pub error: String,
}

impl IntoResponse for AgentError {
    fn into_response(self) -> Response {
        let status = match self {
            Self::UnknownMigration(_) | Self::Definition(crate::vmm::DefinitionError::Unknown { .. }) => {
                StatusCode::NOT_FOUND
            }
            Self::AlreadyMigrating { .. } | Self::Ended { .. } => StatusCode::CONFLICT,
            _ => StatusCode::UNPROCESSABLE_ENTITY,
        };
        (status, Json(ErrorAnswer { error: self.to_string() })).into_response()
    }
}

/// Answers until the listener fails.
pub(super) async fn serve(listener: UnixListener, agent: Arc<Agent>) -> std::io::Result<()> {
    let router = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/check", post(check))
        .route("/v1/migrations", post(start))
        .route("/v1/migrations/{id}", get(progress))
        .route("/v1/migrations/{id}/cancel", post(cancel))
        .route("/v1/migrations/{id}/set", post(set))
        .route("/v1/migrations/{id}/resolve", post(resolve))
        .route("/v1/cancel", post(cancel_only))
        .route("/v1/reports/latest", get(latest))
        .layer(DefaultBodyLimit::max(MAX_REQUEST))
        .with_state(agent);
    axum::serve(listener, router).await
}

async fn status(State(agent): State<Arc<Agent>>) -> Response {
    Json(agent.status()).into_response()
}

async fn start(
    State(agent): State<Arc<Agent>>,
    Json(request): Json<MigrateRequest>,
) -> Result<Json<Started>, AgentError> {
    Ok(Json(Started { id: agent.start(request)? }))
}

async fn progress(
    State(agent): State<Arc<Agent>>,
    UrlPath(id): UrlPath<String>,
) -> Result<Json<Progress>, AgentError> {
    Ok(Json(agent.progress(&id)?))
}

async fn cancel(
    State(agent): State<Arc<Agent>>,
    UrlPath(id): UrlPath<String>,
) -> Result<Json<CancelAnswer>, AgentError> {
    Ok(Json(CancelAnswer { id: agent.cancel(Some(&id))? }))
}

async fn set(
    State(agent): State<Arc<Agent>>,
    UrlPath(id): UrlPath<String>,
    Json(request): Json<SetRequest>,
) -> Result<Json<SetAnswer>, AgentError> {
    agent.set_bandwidth(&id, request.bandwidth_mib)?;
    Ok(Json(SetAnswer { id, bandwidth_mib: request.bandwidth_mib }))
}

async fn resolve(
    State(agent): State<Arc<Agent>>,
    UrlPath(id): UrlPath<String>,
    Json(request): Json<ResolveRequest>,
) -> Result<Json<Unsettled>, AgentError> {
    Ok(Json(agent.settlements.resolve(&id, request.resolution)?))
}

async fn cancel_only(State(agent): State<Arc<Agent>>) -> Result<Json<CancelAnswer>, AgentError> {
    Ok(Json(CancelAnswer { id: agent.cancel(None)? }))
}

async fn latest(State(agent): State<Arc<Agent>>) -> Result<Json<Report>, AgentError> {
    let report = agent.history.recent(1).into_iter().next();
    Ok(Json(report.ok_or_else(|| AgentError::Host("no migration has left this host yet".into()))?))
}

async fn check(
    State(agent): State<Arc<Agent>>,
    Json(request): Json<MigrateRequest>,
) -> Result<Json<CheckAnswer>, AgentError> {
    Ok(Json(agent.check(&request).await?))
}
