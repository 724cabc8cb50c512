//! Holds one TCP connection to the VM's echo service and checks every byte that comes back.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::worker::{Stop, Workers};
use crate::lab::{lock, netns, wait_for};

/// Between two messages.
const INTERVAL: Duration = Duration::from_millis(10);
/// Length of a message: its number, and a pattern made of it.
const MESSAGE_LEN: usize = 64;
/// How long one attempt to connect may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(1);

/// A stream of numbered messages over one connection.
pub struct TcpStreamProbe {
    shared: Arc<Shared>,
    _workers: Workers,
}

#[derive(Default)]
struct Shared {
    /// Messages sent.
    sent: AtomicU64,
    /// Messages that came back as they were sent, in order.
    echoed: AtomicU64,
    /// Why the stream is dead, if it is.
    failure: Mutex<Option<String>>,
}

impl TcpStreamProbe {
    /// Connects from the namespace to `target` and keeps sending.
    ///
    /// # Errors
    /// If nobody accepts the connection within `limit`.
    pub fn start(namespace: &str, target: Ipv4Addr, port: u16, limit: Duration) -> Result<Self> {
        let address = SocketAddr::from((target, port));
        let stream = netns::inside(namespace, || connect(address, limit))?;
        let reader = stream.try_clone().context("duplicating the TCP socket")?;
        let shared = Arc::new(Shared::default());
        let mut workers = Workers::new();
        let (sending, receiving) = (Arc::clone(&shared), Arc::clone(&shared));
        workers.start("tcp-send", move |stop| send(stream, &sending, stop))?;
        workers.start("tcp-receive", move |stop| receive(reader, &receiving, stop))?;
        Ok(Self { shared, _workers: workers })
    }

    /// Whether a message sent from now on still comes back on the same connection within `limit`,
    /// and everything before it came back as it was sent.
    ///
    /// # Errors
    /// What is wrong with the stream.
    pub fn check_alive(&self, limit: Duration) -> Result<()> {
        // The next message has this number, and is back when one more than it has been echoed.
        let next = self.shared.sent.load(Ordering::SeqCst) + 1;
        wait_for("the TCP stream's echo", limit, || {
            if let Some(failure) = lock(&self.shared.failure).as_ref() {
                return Err(anyhow!("the TCP stream is dead: {failure}"));
            }
            Ok((self.shared.echoed.load(Ordering::SeqCst) > next).then_some(()))
        })
    }

    /// Messages that came back so far.
    pub fn echoed(&self) -> u64 {
        self.shared.echoed.load(Ordering::SeqCst)
    }
}

fn connect(address: SocketAddr, limit: Duration) -> Result<TcpStream> {
    let deadline = Instant::now() + limit;
    let stream = loop {
        match TcpStream::connect_timeout(&address, CONNECT_LIMIT) {
            Ok(stream) => break stream,
            Err(error) if Instant::now() > deadline => {
                return Err(error).with_context(|| {
                    format!("no TCP connection to {address}: does the guest run its echo service?")
                });
            }
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    };
    stream.set_nodelay(true).context("setting TCP_NODELAY")?;
    stream.set_read_timeout(Some(Duration::from_millis(100))).context("setting a read time-out")?;
    stream.set_write_timeout(Some(Duration::from_millis(100))).context("setting a write time-out")?;
    Ok(stream)
}

fn send(mut stream: TcpStream, shared: &Shared, stop: &Stop) {
    while !stop.load(Ordering::Relaxed) {
        let message = message(shared.sent.fetch_add(1, Ordering::SeqCst));
        let mut rest = &message[..];
        while !rest.is_empty() && !stop.load(Ordering::Relaxed) {
            match stream.write(rest) {
                Ok(len) => rest = &rest[len..],
                Err(error) if is_patience(error.kind()) => {}
                Err(error) => return fail(shared, format!("cannot send: {error}")),
            }
        }
        thread::sleep(INTERVAL);
    }
}

fn receive(mut stream: TcpStream, shared: &Shared, stop: &Stop) {
    let mut echo = [0; MESSAGE_LEN];
    let mut len = 0;
    while !stop.load(Ordering::Relaxed) {
        match stream.read(&mut echo[len..]) {
            Ok(0) => return fail(shared, "the guest closed the connection".to_owned()),
            Ok(read) => len += read,
            Err(error) if is_patience(error.kind()) => {}
            Err(error) => return fail(shared, format!("cannot receive: {error}")),
        }
        if len == MESSAGE_LEN {
            let number = shared.echoed.load(Ordering::SeqCst);
            if echo != message(number) {
                return fail(shared, format!("message {number} came back changed"));
            }
            shared.echoed.store(number + 1, Ordering::SeqCst);
            len = 0;
        }
    }
}

fn is_patience(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

fn fail(shared: &Shared, reason: String) {
    lock(&shared.failure).get_or_insert(reason);
}

/// Message `number`: the number, then bytes that differ from place to place and message to message.
fn message(number: u64) -> [u8; MESSAGE_LEN] {
    let mut bytes = [0; MESSAGE_LEN];
    for (place, byte) in bytes.iter_mut().enumerate() {
        *byte = (number as u8).wrapping_mul(31).wrapping_add(place as u8);
    }
    bytes[..8].copy_from_slice(&number.to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// Echoes what comes on one connection, changed by `change`.
    fn echo_service(change: fn(&mut [u8])) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut buffer = [0; 1000];
            while let Ok(len @ 1..) = stream.read(&mut buffer) {
                change(&mut buffer[..len]);
                if stream.write_all(&buffer[..len]).is_err() {
                    return;
                }
            }
        });
        address
    }

    fn probe(address: SocketAddr) -> TcpStreamProbe {
        let stream = connect(address, Duration::from_secs(2)).unwrap();
        let reader = stream.try_clone().unwrap();
        let shared = Arc::new(Shared::default());
        let mut workers = Workers::new();
        let (sending, receiving) = (Arc::clone(&shared), Arc::clone(&shared));
        workers.start("send", move |stop| send(stream, &sending, stop)).unwrap();
        workers.start("receive", move |stop| receive(reader, &receiving, stop)).unwrap();
        TcpStreamProbe { shared, _workers: workers }
    }

    #[test]
    fn faithful_echo_is_alive() {
        let probe = probe(echo_service(|_| ()));
        probe.check_alive(Duration::from_secs(5)).unwrap();
        assert!(probe.echoed() > 0);
    }

    #[test]
    fn changed_echo_is_dead() {
        let probe = probe(echo_service(|bytes| bytes[0] ^= 1));
        let error = probe.check_alive(Duration::from_secs(5)).unwrap_err();
        assert!(error.to_string().contains("came back changed"), "{error}");
    }
}
