//! The agent's API, asked directly: where a process that asks would take longer than what it asks about.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Sends a request without a body and returns the answer.
pub(super) fn request(socket: &Path, method: &str, path: &str, limit: Duration) -> Result<Value> {
    let answer = exchange(socket, method, path, limit);
    let answer = answer.with_context(|| format!("{method} {path} on {}", socket.display()))?;
    parse(&answer).with_context(|| format!("the answer to {method} {path}"))
}

fn exchange(socket: &Path, method: &str, path: &str, limit: Duration) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let request = format!("{method} {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// The body; an error if the status says that it is one.
fn parse(answer: &str) -> Result<Value> {
    let (head, body) = answer.split_once("\r\n\r\n").context("it was cut short")?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    if !status.starts_with('2') {
        bail!("{status}: {body}");
    }
    serde_json::from_str(body).with_context(|| format!("not JSON: {body:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_its_body_or_an_error() {
        let answer = parse("HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n{\"a\": 1}").unwrap();
        assert_eq!(answer["a"], 1);
        let refused = parse("HTTP/1.1 404 Not Found\r\n\r\n{\"error\":\"no\"}").unwrap_err().to_string();
        assert!(refused.contains("404") && refused.contains("no"), "{refused}");
        assert!(parse("").is_err());
    }
}
