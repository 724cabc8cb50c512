//! A QMP session with a QEMU of the lab, on the socket that its agent does not use.

use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::net::sockopt::socket_peercred;
use rustix::process::Pid;
use serde_json::{Value, json};
use socket2::{Domain, SockAddr, Socket, Type};

/// How long a read blocks, and so how long a question may wait.
const READ_LIMIT: Duration = Duration::from_millis(20);
/// How long an answer may take: QEMU's main loop rests while it loads a VM.
pub(crate) const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// A QMP session.
pub(crate) struct Monitor {
    reader: BufReader<UnixStream>,
    /// The line being read; a read time-out may cut it.
    line: Vec<u8>,
}

impl Monitor {
    /// Connects and negotiates; `None` if no QEMU listens.
    ///
    /// # Errors
    /// If one listens but does not answer; most likely it serves somebody else.
    pub(crate) fn open(socket: &Path) -> Result<Option<Self>> {
        let Some(stream) = connect(socket).with_context(|| format!("connecting to {}", socket.display()))?
        else {
            return Ok(None);
        };
        let mut monitor = Self { reader: BufReader::new(stream), line: Vec::new() };
        let deadline = Instant::now() + ANSWER_LIMIT;
        monitor.read_until(deadline, |message| message.get("QMP").is_some())?;
        monitor.execute("qmp_capabilities")?;
        monitor.read_until(deadline, |message| message.get("return").is_some())?;
        Ok(Some(monitor))
    }

    /// The run state, by `query-status`.
    pub(crate) fn query_status(&mut self) -> Result<String> {
        self.execute("query-status")?;
        let answer =
            self.read_until(Instant::now() + ANSWER_LIMIT, |message| message.get("return").is_some())?;
        status_of(&answer).context("an answer without a status")
    }

    /// The process at the other end.
    pub(crate) fn peer(&self) -> Result<Pid> {
        Ok(socket_peercred(self.reader.get_ref()).context("asking who listens on a QMP socket")?.pid)
    }

    /// Sends a command without arguments; its answer is read apart.
    pub(crate) fn execute(&mut self, command: &str) -> Result<()> {
        self.send(&json!({ "execute": command }))
    }

    /// Sends a request; its answer is read apart.
    pub(crate) fn send(&mut self, request: &Value) -> Result<()> {
        self.reader
            .get_mut()
            .write_all(format!("{request}\n").as_bytes())
            .with_context(|| format!("asking {request}"))
    }

    fn read_until(&mut self, deadline: Instant, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        loop {
            if let Some(message) = self.read()?
                && wanted(&message)
            {
                return Ok(message);
            }
            if Instant::now() > deadline {
                bail!("QEMU does not answer");
            }
        }
    }

    /// The next message; `None` if there is none within [`READ_LIMIT`].
    pub(crate) fn read(&mut self) -> Result<Option<Value>> {
        match self.reader.read_until(b'\n', &mut self.line) {
            Ok(0) => bail!("QEMU closed the connection"),
            Ok(_) if self.line.ends_with(b"\n") => {
                let message = serde_json::from_slice(&self.line).context("QMP that is not JSON");
                self.line.clear();
                message.map(Some)
            }
            Ok(_) => Ok(None),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
            Err(error) => Err(error).context("reading QMP"),
        }
    }
}

/// Connects without waiting: QEMU serves one client at a time, and `connect` to a full queue blocks for
/// as long as that one stays.
fn connect(path: &Path) -> io::Result<Option<UnixStream>> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&SockAddr::unix(path)?) {
        Ok(()) => {}
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    }
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(READ_LIMIT))?;
    Ok(Some(UnixStream::from(OwnedFd::from(socket))))
}

/// The run state in an answer to `query-status`.
pub(crate) fn status_of(message: &Value) -> Option<String> {
    message["return"]["status"].as_str().map(ToOwned::to_owned)
}
