//! QEMU as the VM that arrives.

use std::{
    os::{fd::AsFd, unix::net::UnixStream as StdUnixStream, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use bytes::Bytes;
use serde_json::json;
use tokio::{io::AsyncWriteExt, net::UnixStream, sync::broadcast};

use super::{
    DestinationVm, Destroyed, Event, Qmp, QmpError, VmDefinition, VmmError, VmmLimits, qmp::within, source,
};
use crate::{
    files::{self, MAX_PROC},
    terminal,
};

const PIPE: &str = "xferry-state";
/// Most bytes of a log that are looked at.
const LAST_WORDS: u64 = 4096;
/// How often a QEMU that does not answer is asked whether it runs.
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// How often a QEMU that was started is tried: it makes its monitor's socket some 20 ms after its start.
const CONNECT_EVERY: Duration = Duration::from_millis(1);

/// A QEMU that waits for its state, started here or found waiting.
pub struct QemuDestination {
    vm: String,
    qmp: Qmp,
    limits: VmmLimits,
    events: broadcast::Receiver<Event>,
    state: Option<UnixStream>,
    /// Set once its vCPUs are known to have been started.
    resumed: bool,
    /// Set when we started it: then it is also ours to end.
    child: Option<Started>,
    /// Whether it was told of this migration.
    told: bool,
}

struct Started {
    child: Child,
    log: PathBuf,
}

impl QemuDestination {
    /// Starts the VM from its definition, or attaches to a QEMU that already waits at its QMP socket. `log_dir`
    /// takes what a started QEMU prints. It does not know of this migration before
    /// [`expect_state`](Self::expect_state).
    ///
    /// # Errors
    /// [`VmmError::Launch`] with QEMU's own words.
    pub async fn launch(
        definition: &VmDefinition,
        log_dir: &Path,
        limits: VmmLimits,
    ) -> Result<Self, VmmError> {
        let vm = definition.name.clone();
        let launch = |reason: String| VmmError::Launch { vm: vm.clone(), reason };
        match Qmp::connect(&definition.qmp, limits.answer).await {
            Ok(qmp) => return Self::attach(vm, qmp, limits).await,
            Err(QmpError::Connect { .. }) => {}
            Err(other) => return Err(other.into()),
        }
        let Some(command) = definition.incoming_command() else {
            return Err(launch(format!(
                "nothing waits at {} and its definition has no command: start QEMU with -incoming defer -S, or add command = [\"qemu-system-x86_64\", …]",
                definition.qmp.display()
            )));
        };
        let mut started = start(&command, &log_dir.join(format!("{vm}.log")))
            .map_err(|error| launch(format!("cannot start {}: {error}", command[0])))?;
        let deadline = Instant::now() + limits.start;
        let qmp = loop {
            match Qmp::connect(&definition.qmp, limits.answer).await {
                Ok(qmp) => break qmp,
                Err(error) => {
                    if let Ok(Some(status)) = started.child.try_wait() {
                        return Err(launch(format!("QEMU ended ({status}): {}", last_words(&started.log))));
                    }
                    if Instant::now() > deadline {
                        end(&mut started);
                        return Err(launch(format!(
                            "{error}; waited {} s: {}",
                            limits.start.as_secs(),
                            last_words(&started.log)
                        )));
                    }
                    tokio::time::sleep(CONNECT_EVERY).await;
                }
            }
        };
        let events = qmp.subscribe();
        Ok(Self { vm, qmp, limits, events, state: None, resumed: false, child: Some(started), told: false })
    }

    async fn attach(vm: String, qmp: Qmp, limits: VmmLimits) -> Result<Self, VmmError> {
        let status = qmp.execute("query-status", json!({})).await?;
        let status = status["status"].as_str().unwrap_or_default().to_owned();
        let launch = |reason: String| VmmError::Launch { vm: vm.clone(), reason };
        if status != "inmigrate" {
            return Err(launch(format!(
                "a QEMU is already there (pid {}, {status}) and does not wait for a migration: {}",
                qmp.pid(),
                match status.as_str() {
                    "postmigrate" =>
                        "it was left when the VM went away (--keep-source?); end it with QMP `quit`",
                    _ => "is the VM running on this host too?",
                }
            )));
        }
        let command = files::read(format!("/proc/{}/cmdline", qmp.pid()), MAX_PROC).unwrap_or_default();
        if !command.split(|&byte| byte == 0).any(|argument| argument == b"-S" || argument == b"--S") {
            return Err(launch(format!(
                "the waiting QEMU (pid {}) would run as soon as its state is loaded, before the handover is settled: start it with -S",
                qmp.pid()
            )));
        }
        let events = qmp.subscribe();
        Ok(Self { vm, qmp, limits, events, state: None, resumed: false, child: None, told: false })
    }

    /// The monitor.
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// Whether this agent started it.
    pub fn is_ours(&self) -> bool {
        self.child.is_some()
    }

    /// The VM runs and is nobody's but the operator's: lets go of its monitor, so that others can connect.
    pub fn hand_over(self) {
        if let Some(started) = self.child {
            let reaper = std::thread::Builder::new().name("reap".into()).spawn(move || reap(started.child));
            if let Err(error) = reaper {
                tracing::warn!(%error, "no thread to reap the VM's process; it may stay as a zombie when it ends");
            }
        }
    }

    /// Gives it the pipe that its state will come through. From here on it cannot wait for another migration.
    ///
    /// # Errors
    /// What QEMU says.
    pub async fn expect_state(&mut self) -> Result<(), VmmError> {
        self.told = true;
        source::prepare_migration(&self.qmp).await?;
        let (ours, theirs) = StdUnixStream::pair()?;
        ours.set_nonblocking(true)?;
        self.qmp.send_fd(PIPE, theirs.as_fd()).await?;
        self.qmp.execute("migrate-incoming", json!({ "uri": format!("fd:{PIPE}") })).await?;
        self.state = Some(UnixStream::from_std(ours)?);
        Ok(())
    }

    async fn wait_for(
        &mut self,
        waited_for: &'static str,
        reached: impl Fn(&Event) -> Option<Result<(), String>> + Send,
    ) -> Result<(), VmmError> {
        let limit = self.limits.step;
        let waiting = async {
            loop {
                let event = match source::next(&mut self.events, &self.qmp).await {
                    Ok(event) => event,
                    Err(error) => return Err(self.explain(error)),
                };
                match reached(&event) {
                    Some(Ok(())) => return Ok(()),
                    Some(Err(reason)) => return Err(self.explain(VmmError::State(reason))),
                    None => {}
                }
            }
        };
        let seconds = limit.as_secs();
        within(limit, waiting).await.map_err(|_| VmmError::Timeout { waited_for, seconds })?
    }

    /// Adds what a QEMU that we started printed: that is where it says why it refused its state.
    fn explain(&self, error: VmmError) -> VmmError {
        match &self.child {
            Some(started) => VmmError::State(format!("{error}: {}", last_words(&started.log))),
            None => error,
        }
    }
}

impl DestinationVm for QemuDestination {
    async fn load(&mut self, state: Bytes) -> Result<(), VmmError> {
        let limit = self.limits.step;
        let Some(stream) = &mut self.state else {
            return Err(VmmError::State("more state came after its end".into()));
        };
        let written = tokio::time::timeout(limit, stream.write_all(&state)).await;
        match written {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(self.explain(error.into())),
            Err(_) => Err(VmmError::Timeout { waited_for: "taking its state", seconds: limit.as_secs() }),
        }
    }

    async fn finish(&mut self) -> Result<(), VmmError> {
        // Closing the pipe is the end of the stream.
        self.state = None;
        self.wait_for("the end of loading", |event| {
            if event.name != "MIGRATION" {
                return None;
            }
            match event.data["status"].as_str() {
                Some("completed") => Some(Ok(())),
                Some("failed") => Some(Err("loading failed".into())),
                _ => None,
            }
        })
        .await
    }

    async fn run(&mut self) -> Result<(), VmmError> {
        // The answer comes after the vCPUs were started; the event is for those who watch.
        match self.qmp.execute("cont", json!({})).await {
            Ok(_) => Ok(()),
            // It may run all the same: that no answer came in time proves nothing, and what runs must not be ended.
            Err(error @ QmpError::Timeout { .. }) => self.runs_after_all().await.map_err(|()| error.into()),
            Err(error) => Err(error.into()),
        }
    }

    async fn ended(&mut self) -> VmmError {
        self.qmp.closed().await;
        self.explain(VmmError::State("QEMU on the destination has ended".into()))
    }

    async fn destroy(&mut self) -> Option<Destroyed> {
        if !self.told && !self.is_ours() {
            // It holds nothing of the VM and goes on waiting, as it did before it was looked at.
            return Some(Destroyed::NeverRan);
        }
        self.state = None;
        if let Err(error) = self.qmp.execute("quit", json!({})).await {
            tracing::debug!(vm = self.vm, %error, "the half-made VM did not answer quit");
        }
        let process = format!("/proc/{}/exe", self.qmp.pid());
        let gone = || std::fs::read_link(&process).is_err();
        let deadline = Instant::now() + self.limits.quit;
        while !gone() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        if let Some(mut started) = self.child.take() {
            end(&mut started);
        }
        if !gone() {
            return None;
        }
        // Its monitor's end is read to the last byte, so that no event is missed.
        while !self.qmp.is_closed() && Instant::now() < deadline + self.limits.quit {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let ran = !self.qmp.is_closed() || self.has_resumed();
        Some(if ran { Destroyed::MayHaveRun } else { Destroyed::NeverRan })
    }
}

impl QemuDestination {
    /// Whether a QEMU that was told to run and did not answer in time does run.
    async fn runs_after_all(&mut self) -> Result<(), ()> {
        let deadline = Instant::now() + self.limits.step;
        while !self.qmp.is_closed() && Instant::now() < deadline {
            if self.has_resumed() {
                return Ok(());
            }
            // Asked after `cont`, answered after it.
            if let Ok(status) = self.qmp.execute("query-status", json!({})).await {
                return if status["status"] == "running" { Ok(()) } else { Err(()) };
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
        if !self.qmp.is_closed() && self.has_resumed() { Ok(()) } else { Err(()) }
    }

    /// Whether QEMU said that its vCPUs run. It says so before they do (`vm_prepare_start` in system/cpus.c sends
    /// RESUME, `vm_start` starts them after it), so silence to the end means that they never did.
    fn has_resumed(&mut self) -> bool {
        use broadcast::error::TryRecvError;
        while !self.resumed {
            match self.events.try_recv() {
                // What was missed may have been it.
                Err(TryRecvError::Lagged(_)) => self.resumed = true,
                Ok(event) => self.resumed = event.name == "RESUME",
                Err(TryRecvError::Empty | TryRecvError::Closed) => break,
            }
        }
        self.resumed
    }
}

/// Starts QEMU in a session of its own, so that it outlives the agent.
fn start(command: &[String], log: &Path) -> std::io::Result<Started> {
    std::fs::File::create(log)?;
    // Appending, so that it begins anew when somebody who rotates logs cuts it: QEMU never opens it again.
    let output = std::fs::File::options().append(true).open(log)?;
    let mut process = Command::new(&command[0]);
    process
        .args(&command[1..])
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        // Signals to the agent's process group (Ctrl-C in a terminal) must not reach the VM.
        .process_group(0);
    Ok(Started { child: process.spawn()?, log: log.to_owned() })
}

/// Ends a QEMU that we started. Once a VM has been handed over it is never called.
fn end(started: &mut Started) {
    // Both fail only when it has ended already.
    let _ = started.child.kill();
    let _ = started.child.wait();
}

/// Waits until a VM's process has ended, and takes its exit status.
///
/// Not by a waiting `wait`: that would also take the stops of a thread under trace, which belong to the
/// dirty tracker when this agent later sends the same VM away (`ptrace(2)`: any thread of the tracer's process
/// may collect them).
fn reap(mut child: Child) {
    use rustix::{
        event::{PollFd, PollFlags, poll},
        process::{Pid, PidfdFlags, pidfd_open},
    };
    if let Ok(process) = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
        while let Err(rustix::io::Errno::INTR) = poll(&mut [PollFd::new(&process, PollFlags::IN)], None) {}
        // It has ended: this does not wait.
        let _ = child.wait();
    }
}

/// The end of what QEMU printed: up to three lines. A guest whose console is QEMU's standard output decides what
/// stands there, and how much of it.
fn last_words(log: &Path) -> String {
    let text = files::tail(log, LAST_WORDS).unwrap_or_default();
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let lines: Vec<String> = lines.map(terminal::harmless).collect();
    let tail = lines[lines.len().saturating_sub(3)..].join(" / ");
    if tail.is_empty() { "it printed nothing".into() } else { tail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_is_cut_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("vm.log");
        let script = r#"echo first; while [ -s "$0" ]; do sleep 0.01; done; echo second"#;
        let command = ["sh", "-c", script, log.to_str().unwrap()].map(str::to_owned);
        let mut started = start(&command, &log).unwrap();
        while std::fs::read(&log).unwrap() != b"first\n" {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::fs::File::options().write(true).open(&log).unwrap().set_len(0).unwrap();
        assert!(started.child.wait().unwrap().success());
        assert_eq!(std::fs::read(&log).unwrap(), b"second\n");
    }

    #[test]
    fn last_words_are_few_and_plain() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("vm.log");
        assert_eq!(last_words(&log), "it printed nothing");
        std::fs::write(&log, "one\ntwo\n\n  three\nfour \x1b[2J\x1b]0;owned\x07\n").unwrap();
        assert_eq!(last_words(&log), "two / three / four \u{fffd}[2J\u{fffd}]0;owned\u{fffd}");
        std::fs::write(&log, vec![b'x'; 1 << 20]).unwrap();
        assert_eq!(last_words(&log).len() as u64, LAST_WORDS);
    }
}
