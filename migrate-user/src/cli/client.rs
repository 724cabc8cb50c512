//! HTTP over the agent's unix socket.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, body::Bytes};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;
use xferry::agent::ErrorAnswer;

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

    async fn call<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<T> {
        let stream = UnixStream::connect(&self.socket).await.with_context(|| {
            format!(
                "cannot reach this host's agent at {} (start it with `xferry agent --config FILE`, or name its socket with --socket)",
                self.socket.display()
            )
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
            bail!("{message}");
        }
        serde_json::from_slice(&body)
            .context("the agent's answer is not understood: is it of another version?")
    }
}
