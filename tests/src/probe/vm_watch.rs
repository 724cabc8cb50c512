//! Watches one QEMU after the other on a host through the lab's own QMP socket: when did a VM stop
//! and resume, and does it run now?

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;

use super::worker::{Stop, Workers};
use crate::lab::lock;
use crate::lab::monitor::{ANSWER_LIMIT, Monitor, status_of};

/// How often a QEMU that is not there yet is looked for: soon enough for its first RESUME.
const SEARCH_INTERVAL: Duration = Duration::from_millis(5);

/// Something QEMU said happened.
#[derive(Clone, Debug)]
pub struct VmEvent {
    /// QMP's name for it: `STOP`, `RESUME`, `SHUTDOWN` …
    pub name: String,
    /// When, by QEMU's clock, which in the lab is everybody's.
    pub at: SystemTime,
    /// Process id of the QEMU that said it.
    pub pid: i32,
}

/// Watches whatever QEMU listens on one socket.
pub struct VmWatch {
    shared: Arc<Shared>,
    _workers: Workers,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    answered: Condvar,
    /// Told of every event.
    happened: Condvar,
}

#[derive(Default)]
struct State {
    events: Vec<VmEvent>,
    /// Counts questions, and up to which one `status` answers.
    asked: u64,
    answered: u64,
    /// QEMU's run state; `None` without a QEMU.
    status: Option<String>,
    /// The QEMU that is watched now.
    qemu: Option<Watched>,
}

/// A process by what stays its own when it has ended and its number is somebody else's.
struct Watched {
    pid: Pid,
    pidfd: OwnedFd,
}

impl VmWatch {
    /// Starts to watch the QEMU that listens on `socket` now or later.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn start(socket: PathBuf) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let mut workers = Workers::new();
        let watching = Arc::clone(&shared);
        workers.start("vm-watch", move |stop| {
            while !stop.load(Ordering::Relaxed) {
                match Monitor::open(&socket) {
                    // It ends when QEMU does, and that is no error.
                    Ok(Some(monitor)) => {
                        drop(follow(monitor, &watching, stop));
                        lock(&watching.state).qemu = None;
                    }
                    Ok(None) => watching.answer(None),
                    // Somebody else holds the socket, or QEMU is just ending: who asks must wait.
                    Err(_) => {}
                }
                thread::sleep(SEARCH_INTERVAL);
            }
        })?;
        Ok(Self { shared, _workers: workers })
    }

    /// What happened from `since` on, oldest first.
    pub fn events_since(&self, since: SystemTime) -> Vec<VmEvent> {
        lock(&self.shared.state).events.iter().filter(|event| event.at >= since).cloned().collect()
    }

    /// Waits for an event of this name from `since` on, and returns the first; `None` if there is none within `limit`.
    pub fn wait_event(&self, name: &str, since: SystemTime, limit: Duration) -> Option<VmEvent> {
        let deadline = Instant::now() + limit;
        let mut state = lock(&self.shared.state);
        loop {
            let first = state.events.iter().find(|event| event.at >= since && event.name == name);
            if let Some(event) = first {
                return Some(event.clone());
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            let woken = self.shared.happened.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Process id of the QEMU that is watched now.
    pub fn pid(&self) -> Option<i32> {
        lock(&self.shared.state).qemu.as_ref().map(|qemu| qemu.pid.as_raw_nonzero().get())
    }

    /// Kills the QEMU that is watched now with SIGKILL, at once. Returns its process id.
    ///
    /// # Errors
    /// If it cannot be killed.
    pub fn kill(&self) -> Result<Option<i32>> {
        let state = lock(&self.shared.state);
        let Some(qemu) = &state.qemu else { return Ok(None) };
        match pidfd_send_signal(&qemu.pidfd, Signal::KILL) {
            // It has ended by itself, and that has not been seen yet.
            Err(rustix::io::Errno::SRCH) => Ok(None),
            Err(error) => Err(error).context("killing QEMU"),
            Ok(()) => Ok(Some(qemu.pid.as_raw_nonzero().get())),
        }
    }

    /// QEMU's run state now (`running`, `paused`, `inmigrate`, `postmigrate` …); `None` if no QEMU listens.
    ///
    /// # Errors
    /// If a QEMU listens but does not answer.
    pub fn status(&self) -> Result<Option<String>> {
        let mut state = lock(&self.shared.state);
        state.asked += 1;
        let question = state.asked;
        let answered =
            self.shared.answered.wait_timeout_while(state, ANSWER_LIMIT, |state| state.answered < question);
        let (state, timeout) = answered.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            bail!("QEMU does not answer `query-status` within {} s", ANSWER_LIMIT.as_secs());
        }
        Ok(state.status.clone())
    }
}

impl Shared {
    /// Answers all questions asked so far.
    fn answer(&self, status: Option<String>) {
        let mut state = lock(&self.state);
        state.answered = state.asked;
        state.status = status;
        drop(state);
        self.answered.notify_all();
    }
}

/// Records events and answers questions until QEMU ends.
fn follow(mut monitor: Monitor, shared: &Shared, stop: &Stop) -> Result<()> {
    let pid = monitor.peer()?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("looking at QEMU's process")?;
    lock(&shared.state).qemu = Some(Watched { pid, pidfd });
    let mut pending = None;
    while !stop.load(Ordering::Relaxed) {
        if pending.is_none() {
            let state = lock(&shared.state);
            pending = (state.asked > state.answered).then_some(state.asked);
            drop(state);
            if pending.is_some() {
                monitor.execute("query-status")?;
            }
        }
        let Some(message) = monitor.read()? else { continue };
        if let Some(event) = event_of(&message, pid) {
            lock(&shared.state).events.push(event);
            shared.happened.notify_all();
        } else if let Some(status) = status_of(&message) {
            let mut state = lock(&shared.state);
            // A question asked meanwhile wants a later answer than this one.
            state.answered = pending.take().unwrap_or(state.answered);
            state.status = Some(status);
            drop(state);
            shared.answered.notify_all();
        }
    }
    Ok(())
}

fn event_of(message: &Value, pid: Pid) -> Option<VmEvent> {
    let name = message["event"].as_str()?.to_owned();
    let stamp = &message["timestamp"];
    let since_epoch = Duration::from_secs(stamp["seconds"].as_u64()?)
        + Duration::from_micros(stamp["microseconds"].as_u64()?);
    Some(VmEvent { name, at: SystemTime::UNIX_EPOCH + since_epoch, pid: pid.as_raw_nonzero().get() })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn event_has_its_time() {
        let message = json!({"event": "STOP", "timestamp": {"seconds": 3, "microseconds": 250_000}});
        let event = event_of(&message, Pid::INIT).unwrap();
        assert_eq!(event.name, "STOP");
        assert_eq!(event.at, SystemTime::UNIX_EPOCH + Duration::from_millis(3250));
        assert!(event_of(&json!({"return": {}}), Pid::INIT).is_none());
    }

    #[test]
    fn without_qemu_there_is_no_status() {
        let watch = VmWatch::start("/nonexistent/qmp".into()).unwrap();
        assert_eq!(watch.status().unwrap(), None);
        assert_eq!((watch.pid(), watch.kill().unwrap()), (None, None));
        assert!(watch.wait_event("STOP", SystemTime::UNIX_EPOCH, Duration::from_millis(1)).is_none());
    }
}
