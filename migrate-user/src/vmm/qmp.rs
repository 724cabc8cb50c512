//! A client of QEMU's monitor protocol: JSON objects, one a line (docs/interop/qmp-spec.rst of QEMU).

use std::{
    collections::HashMap,
    io::{IoSlice, Write},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::sync::lock;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};
use tokio::{
    io::Interest,
    net::UnixStream,
    sync::{broadcast, oneshot, watch},
    task::JoinHandle,
    time::error::Elapsed,
};

/// Longest line taken from a VMM, bytes. The longest real answers (device trees) stay far below.
const MAX_LINE: usize = 16 << 20;
/// Longest event taken, bytes: many may wait for a subscriber. Real ones have a few hundred.
const MAX_EVENT: usize = 16 << 10;
/// See [`within`].
const LAST_CHANCE: Duration = Duration::from_millis(500);
/// Events kept for a subscriber that does not keep up.
const EVENTS: usize = 256;

/// What went wrong on a monitor.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nobody listens.
    #[error("cannot connect to the QMP socket {}: {source}{}", path.display(), connect_hint(.source))]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// No greeting.
    #[error(
        "{} accepts connections but does not answer: a monitor serves one client at a time, so another one \
         (libvirt?) holds it; give QEMU a second -qmp socket for xferry", path.display()
    )]
    Busy {
        /// The socket.
        path: PathBuf,
    },
    /// The connection ended.
    #[error("QEMU closed its monitor {}{}", path.display(), .during.as_ref().map(|d| format!(" during {d}")).unwrap_or_default())]
    Closed {
        /// The socket.
        path: PathBuf,
        /// The command that had no answer.
        during: Option<String>,
    },
    /// No answer in time.
    #[error("QEMU did not answer {command} within {} s", limit.as_secs())]
    Timeout {
        /// The command.
        command: String,
        /// The limit.
        limit: Duration,
    },
    /// QEMU said no.
    #[error("QEMU refused {command}: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class.
        class: String,
        /// QEMU's words.
        description: String,
    },
    /// An answer that cannot be understood.
    #[error("QEMU's answer to {command} is not understood: {problem}")]
    Answer {
        /// The command.
        command: String,
        /// What is wrong.
        problem: String,
    },
}

fn connect_hint(source: &std::io::Error) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::NotFound => " (is the VM running, with -qmp unix:PATH,server=on,wait=off?)",
        std::io::ErrorKind::ConnectionRefused => " (the socket is left over from a QEMU that is gone)",
        std::io::ErrorKind::PermissionDenied => " (the agent must be root or of the socket's group)",
        _ => "",
    }
}

/// Something that happened in the VMM.
#[derive(Clone, Debug)]
pub struct Event {
    /// Name, as STOP.
    pub name: String,
    /// Its data.
    pub data: Value,
    /// Wall-clock time at which QEMU saw it, µs since 1970.
    pub micros: u64,
}

type Pending = Arc<Mutex<HashMap<u64, oneshot::Sender<Result<Value, Value>>>>>;

/// A connection to one monitor; clones share it.
#[derive(Clone)]
pub struct Qmp(Arc<Connection>);

struct Connection {
    path: PathBuf,
    stream: Arc<UnixStream>,
    pending: Pending,
    next_id: AtomicU64,
    /// One command is written at a time.
    write: tokio::sync::Mutex<()>,
    events: broadcast::Sender<Event>,
    reader: JoinHandle<()>,
    /// True once the reader has ended.
    closed: watch::Receiver<bool>,
    version: String,
    pid: u32,
    /// For an answer.
    limit: Duration,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// One line from the monitor, sorted.
enum Line {
    Greeting(String),
    Answer(u64, Result<Value, Value>),
    Event(Event),
    Other,
}

fn sort(line: &[u8]) -> Line {
    let Ok(mut value) = serde_json::from_slice::<Value>(line) else { return Line::Other };
    if let Some(qmp) = value.get("QMP") {
        let part = |name: &str| qmp["version"]["qemu"][name].as_u64().unwrap_or(0);
        return Line::Greeting(format!("{}.{}.{}", part("major"), part("minor"), part("micro")));
    }
    if let Some(name) = value.get("event").and_then(Value::as_str) {
        if line.len() > MAX_EVENT {
            return Line::Other;
        }
        let time = |unit: &str| value["timestamp"][unit].as_u64().unwrap_or(0);
        return Line::Event(Event {
            name: name.to_owned(),
            micros: time("seconds").saturating_mul(1_000_000).saturating_add(time("microseconds")),
            data: value["data"].clone(),
        });
    }
    let Some(id) = value.get("id").and_then(Value::as_u64) else { return Line::Other };
    if let Some(error) = value.get("error") {
        return Line::Answer(id, Err(error.clone()));
    }
    Line::Answer(id, Ok(value["return"].take()))
}

/// One input of the fuzz target `qmp`: lines as a monitor sends them.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(data: &[u8]) {
    for line in data.split_inclusive(|&byte| byte == b'\n') {
        match sort(line) {
            Line::Greeting(version) => assert_eq!(version.split('.').count(), 3),
            Line::Answer(_, Err(error)) => drop(error["desc"].as_str().map(str::to_owned)),
            Line::Answer(_, Ok(_)) | Line::Event(_) | Line::Other => {}
        }
    }
}

impl Qmp {
    /// Connects, waits for the greeting and negotiates. `limit` is for the greeting and for every answer; a monitor that
    /// serves another client accepts and says nothing.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn connect(path: &Path, limit: Duration) -> Result<Self, QmpError> {
        let stream = UnixStream::connect(path)
            .await
            .map_err(|source| QmpError::Connect { path: path.to_owned(), source })?;
        let pid = stream.peer_cred().ok().and_then(|cred| cred.pid()).unwrap_or(0);
        let stream = Arc::new(stream);
        let pending = Pending::default();
        let (events, _) = broadcast::channel(EVENTS);
        let (greeted, greeting) = oneshot::channel();
        let (ended, closed) = watch::channel(false);
        let reading = read_lines(Arc::clone(&stream), Arc::clone(&pending), events.clone(), greeted);
        let reader = tokio::spawn(async move {
            reading.await;
            // Nobody may be interested.
            let _ = ended.send(true);
        });
        let busy = || QmpError::Busy { path: path.to_owned() };
        let version = match tokio::time::timeout(limit, greeting).await {
            Ok(Ok(version)) => version,
            Ok(Err(_)) => return Err(QmpError::Closed { path: path.to_owned(), during: None }),
            Err(_) => {
                reader.abort();
                return Err(busy());
            }
        };
        let this = Self(Arc::new(Connection {
            path: path.to_owned(),
            stream,
            pending,
            next_id: AtomicU64::new(1),
            write: tokio::sync::Mutex::new(()),
            events,
            reader,
            closed,
            version,
            pid: pid as u32,
            limit,
        }));
        this.execute("qmp_capabilities", json!({})).await?;
        Ok(this)
    }

    /// QEMU's version, as 10.0.2.
    pub fn version(&self) -> &str {
        &self.0.version
    }

    /// The process behind the socket.
    pub fn pid(&self) -> u32 {
        self.0.pid
    }

    /// Events from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.0.events.subscribe()
    }

    /// Whether the monitor's connection has ended.
    pub fn is_closed(&self) -> bool {
        *self.0.closed.borrow()
    }

    /// Waits until the monitor's connection has ended. All its events are with their subscribers then.
    pub async fn closed(&self) {
        // The sender goes only with the reader.
        let _ = self.0.closed.clone().wait_for(|&closed| closed).await;
    }

    /// Runs a command and returns its answer.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.run(command, arguments, None).await
    }

    /// Hands a descriptor over under `name` (`getfd`), for a later `fd:name`.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn send_fd(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), QmpError> {
        self.run("getfd", json!({ "fdname": name }), Some(fd)).await.map(drop)
    }

    async fn run(
        &self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, QmpError> {
        let limit = self.0.limit;
        let id = self.0.next_id.fetch_add(1, Ordering::Relaxed);
        let (answered, answer) = oneshot::channel();
        lock(&self.0.pending).insert(id, answered);
        let closed = || QmpError::Closed { path: self.0.path.clone(), during: Some(command.to_owned()) };
        if self.is_closed() {
            return Err(closed());
        }
        // QEMU reads its monitor byte by byte, a few µs each: during a cutover every byte counts.
        let mut line = if arguments.as_object().is_some_and(serde_json::Map::is_empty) {
            json!({ "execute": command, "id": id }).to_string()
        } else {
            json!({ "execute": command, "arguments": arguments, "id": id }).to_string()
        };
        line.push('\n');
        let written = tokio::time::timeout(limit, self.write_line(line.as_bytes(), fd)).await;
        let timeout = || QmpError::Timeout { command: command.to_owned(), limit };
        match written {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(closed()),
            Err(_) => return Err(timeout()),
        }
        match within(limit, answer).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(error))) => Err(QmpError::Refused {
                command: command.to_owned(),
                class: error["class"].as_str().unwrap_or_default().to_owned(),
                description: error["desc"].as_str().unwrap_or("without a reason").to_owned(),
            }),
            Ok(Err(_)) => Err(closed()),
            Err(_) => {
                lock(&self.0.pending).remove(&id);
                Err(timeout())
            }
        }
    }

    async fn write_line(&self, mut line: &[u8], mut fd: Option<BorrowedFd<'_>>) -> std::io::Result<()> {
        let _one = self.0.write.lock().await;
        while !line.is_empty() {
            self.0.stream.writable().await?;
            let sent = self.0.stream.try_io(Interest::WRITABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
                if !fds.is_empty() {
                    control.push(SendAncillaryMessage::ScmRights(&fds));
                }
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                Ok(rustix::net::sendmsg(self.0.stream.as_fd(), &[IoSlice::new(line)], &mut control, flags)?)
            });
            match sent {
                Ok(count) => {
                    line = &line[count..];
                    // The descriptor went with the first byte.
                    fd = None;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Waits for `future`, which another task brings about, at most `limit`. A process that was stopped and goes on finds
/// its time over before that task had its turn, so the end of the time is not yet the end of the wait.
pub(super) async fn within<F: Future>(limit: Duration, future: F) -> Result<F::Output, Elapsed> {
    tokio::pin!(future);
    match tokio::time::timeout(limit, &mut future).await {
        Ok(output) => Ok(output),
        Err(_) => tokio::time::timeout(LAST_CHANCE, future).await,
    }
}

/// Reads until the monitor closes, or sends a line that is too long.
async fn read_lines(
    stream: Arc<UnixStream>,
    pending: Pending,
    events: broadcast::Sender<Event>,
    greeted: oneshot::Sender<String>,
) {
    let mut greeted = Some(greeted);
    let mut buffer = Vec::new();
    let mut scanned = 0;
    while stream.readable().await.is_ok() {
        match stream.try_read_buf(&mut buffer) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(_) => break,
        }
        while let Some(end) = buffer[scanned..].iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = buffer.drain(..=scanned + end).collect();
            scanned = 0;
            match sort(&line) {
                Line::Greeting(version) => {
                    if let Some(greeted) = greeted.take() {
                        let _ = greeted.send(version);
                    }
                }
                Line::Answer(id, result) => {
                    if let Some(answered) = lock(&pending).remove(&id) {
                        let _ = answered.send(result);
                    }
                }
                Line::Event(event) => {
                    let _ = events.send(event);
                }
                Line::Other => {}
            }
        }
        scanned = buffer.len();
        if buffer.len() > MAX_LINE {
            let _ = writeln!(
                std::io::stderr(),
                "a monitor sent a line of more than {MAX_LINE} bytes; it is closed"
            );
            break;
        }
    }
    // Whoever still waits learns that no answer will come.
    lock(&pending).clear();
}

#[cfg(test)]
mod properties;

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);
    use tokio::{
        io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
        net::UnixListener,
    };

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": ["oob"]}}"#;

    #[test]
    fn times_beyond_any_clock_are_taken() {
        let line =
            format!(r#"{{"timestamp": {{"seconds": {0}, "microseconds": {0}}}, "event": "X"}}"#, u64::MAX);
        assert!(matches!(sort(line.as_bytes()), Line::Event(Event { micros: u64::MAX, .. })));
    }

    #[test]
    fn an_event_that_cannot_be_meant_is_not_kept() {
        let event = |length: usize| format!(r#"{{"event": "X", "data": "{}"}}"#, "x".repeat(length));
        assert!(matches!(sort(event(8 << 10).as_bytes()), Line::Event(_)));
        assert!(matches!(sort(event(16 << 10).as_bytes()), Line::Other));
    }

    /// A monitor that greets and then answers each command by `answer(command line)`.
    async fn monitor(answer: impl Fn(Value) -> String + Send + 'static) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let (read, mut write) = stream.into_split();
            write.write_all(format!("{GREETING}\r\n").as_bytes()).await.unwrap();
            let mut lines = BufReader::new(read).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let text = answer(serde_json::from_str(&line).unwrap());
                if text == "hang up" {
                    return;
                }
                write.write_all(text.as_bytes()).await.unwrap();
            }
        });
        (dir, path)
    }

    #[tokio::test]
    async fn answers_are_matched_by_id_and_events_delivered() {
        let (_dir, path) = monitor(|command| {
            let id = &command["id"];
            format!(
                "{{\"event\":\"STOP\",\"timestamp\":{{\"seconds\":1,\"microseconds\":5}}}}\nnot json\n{{\"id\":999,\"return\":1}}\n{}\n",
                json!({ "id": id, "return": command["execute"] })
            )
        })
        .await;
        let qmp = Qmp::connect(&path, LIMIT).await.unwrap();
        assert_eq!(qmp.version(), "10.0.2");
        assert_eq!(qmp.pid(), std::process::id());
        let mut events = qmp.subscribe();
        assert_eq!(qmp.execute("stop", json!({})).await.unwrap(), "stop");
        let event = events.recv().await.unwrap();
        assert_eq!((event.name.as_str(), event.micros), ("STOP", 1_000_005));
    }

    #[tokio::test]
    async fn refusals_carry_qemus_words() {
        let (_dir, path) = monitor(|command| {
            let id = &command["id"];
            if command["execute"] == "qmp_capabilities" {
                format!("{}\n", json!({ "id": id, "return": {} }))
            } else {
                format!("{}\n", json!({ "id": id, "error": { "class": "GenericError", "desc": "no way" } }))
            }
        })
        .await;
        let qmp = Qmp::connect(&path, LIMIT).await.unwrap();
        let error = qmp.execute("migrate", json!({})).await.unwrap_err();
        assert_eq!(error.to_string(), "QEMU refused migrate: no way");
    }

    #[tokio::test]
    async fn a_dying_vmm_ends_every_wait() {
        let (_dir, path) = monitor(|command| {
            if command["execute"] == "qmp_capabilities" {
                format!("{}\n", json!({ "id": command["id"], "return": {} }))
            } else {
                "hang up".into()
            }
        })
        .await;
        let qmp = Qmp::connect(&path, LIMIT).await.unwrap();
        let error = qmp.execute("query-status", json!({})).await.unwrap_err();
        assert!(matches!(error, QmpError::Closed { .. }), "{error}");
        let error = qmp.execute("query-status", json!({})).await.unwrap_err();
        assert!(matches!(error, QmpError::Closed { .. }), "{error}");
    }

    #[tokio::test]
    async fn sockets_without_a_vm_are_named_with_a_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("none");
        let error = Qmp::connect(&path, LIMIT).await.err().unwrap().to_string();
        assert!(error.contains("none") && error.contains("-qmp unix:"), "{error}");
        drop(UnixListener::bind(&path).unwrap());
        let error = Qmp::connect(&path, LIMIT).await.err().unwrap().to_string();
        assert!(error.contains("left over"), "{error}");
    }
}
