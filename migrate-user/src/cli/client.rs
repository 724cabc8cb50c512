//! HTTP over the agent's unix socket.

use std::{io::ErrorKind, os::unix::fs::MetadataExt, path::PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, body::Bytes};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;
use xferry::{accounts, agent::ErrorAnswer, terminal};

/// Longest answer that is taken, bytes. The longest real one is the status of a host with many VMs on their way.
const MAX_ANSWER: usize = 64 << 20;

/// The agent of this host.
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// By its socket.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// `GET path`.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.call(Method::GET, path, Bytes::new()).await
    }

    /// `POST path` with a JSON body.
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        self.call(Method::POST, path, serde_json::to_vec(body)?.into()).await
    }

    /// What to do when nobody can be reached there.
    fn unreachable(&self, error: &std::io::Error) -> String {
        let path = self.socket.display();
        if error.kind() != ErrorKind::PermissionDenied {
            return format!(
                "cannot reach this host's agent at {path} (start it with `xferry agent --config FILE`, or name its socket with \
                 --socket)"
            );
        }
        let user = accounts::user_name(rustix::process::geteuid().as_raw());
        let group = std::fs::metadata(&self.socket).map(|metadata| metadata.gid());
        let remedy = match group {
            // Root's group is no place for anybody else.
            Ok(0) | Err(_) => format!(
                "run this as root; or, once: `groupadd --system xferry`, restart the agent, `usermod -aG xferry {user}`, and log in \
                 anew"
            ),
            Ok(gid) => format!(
                "run this as root, or as a member of its group: `usermod -aG {} {user}`, then log in anew",
                accounts::group_name(gid)
            ),
        };
        format!("{user} may not use this host's agent at {path} ({remedy})")
    }

    async fn call<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<T> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| {
            let said = self.unreachable(&error);
            anyhow::Error::from(error).context(said)
        })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "agent")
            .header("content-type", "application/json")
            .body(Full::new(body))?;
        let response = sender.send_request(request).await.context("the agent did not answer")?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        // No `context`: this error may be of any type.
        let body = body.map_err(|error| anyhow!("the agent's answer broke off: {error}"))?.to_bytes();
        if !status.is_success() {
            let message = serde_json::from_slice::<ErrorAnswer>(&body)
                .map_or_else(|_| String::from_utf8_lossy(&body).into_owned(), |answer| answer.error);
            bail!("{}", terminal::harmless(&message));
        }
        let understood = serde_json::from_slice(&body).and_then(|mut answer| {
            terminal::make_harmless(&mut answer);
            serde_json::from_value(answer)
        });
        understood.context("the agent's answer is not understood: is it of another version?")
    }
}
