//! Something that answers on an agent's control port and is no agent of this version.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use crate::lab::plan::{CONTROL_PORT, Side};
use crate::lab::{Lab, netns};

/// How long either side waits for the other's words.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks for a connection.
const INTERVAL: Duration = Duration::from_millis(10);
/// Type byte of a JSON message.
const JSON: u8 = 1;

/// The greeting of an agent that speaks `protocol`, as it goes over the wire: length, type, JSON.
pub fn hello(protocol: u32) -> Vec<u8> {
    let text =
        json!({"type": "hello", "protocol": protocol, "software": "9.9", "name": "stranger"}).to_string();
    let length = u32::try_from(text.len() + 1).unwrap_or(u32::MAX);
    [&length.to_be_bytes()[..], &[JSON], text.as_bytes()].concat()
}

/// Listens where the agent of `side` should, and gives every caller the same answer.
pub struct FakePeer {
    stop: Arc<AtomicBool>,
    calls: Arc<AtomicU32>,
    thread: Option<JoinHandle<()>>,
}

impl FakePeer {
    /// One that speaks another version of the protocol.
    ///
    /// # Errors
    /// If the port is taken.
    pub fn of_version(lab: &Lab, side: Side, protocol: u32) -> Result<Self> {
        Self::saying(lab, side, hello(protocol))
    }

    /// One that says `words`, once it heard something, and waits until the caller has gone.
    ///
    /// # Errors
    /// If the port is taken.
    pub fn saying(lab: &Lab, side: Side, words: Vec<u8>) -> Result<Self> {
        let address = SocketAddr::from((side.management_ip(), CONTROL_PORT));
        let listener = netns::inside(&lab.host(side).namespace(), || {
            TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))
        })?;
        listener.set_nonblocking(true)?;
        let (stop, calls) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let (stopped, counter) = (Arc::clone(&stop), Arc::clone(&calls));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        counter.fetch_add(1, Ordering::Relaxed);
                        // The caller may hang up at any point, and that is its right.
                        let _ = serve(stream, &words);
                    }
                    Err(_) => thread::sleep(INTERVAL),
                }
            }
        });
        Ok(Self { stop, calls, thread: Some(thread) })
    }

    /// How often somebody connected.
    pub fn calls(&self) -> u32 {
        self.calls.load(Ordering::Relaxed)
    }
}

impl Drop for FakePeer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(mut stream: TcpStream, words: &[u8]) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut heard = [0; 4096];
    if stream.read(&mut heard)? > 0 {
        stream.write_all(words)?;
    }
    while stream.read(&mut heard)? > 0 {}
    Ok(())
}

/// Calls the agent of `side` from the other host, says `words`, and returns all that it says until it hangs up.
///
/// # Errors
/// If it does not answer or does not hang up.
pub fn greet(lab: &Lab, side: Side, words: &[u8]) -> Result<String> {
    let address = SocketAddr::from((side.management_ip(), CONTROL_PORT));
    let mut stream = netns::inside(&lab.host(side.other()).namespace(), || {
        TcpStream::connect_timeout(&address, PATIENCE).with_context(|| format!("cannot connect to {address}"))
    })?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(words)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).context("the agent does not hang up")?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}
