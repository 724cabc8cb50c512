//! QEMU as the VM that leaves.

use std::{
    os::{fd::AsFd, unix::net::UnixStream as StdUnixStream},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::{Bytes, BytesMut};
use serde_json::{Value, json};
use tokio::{io::AsyncReadExt, net::UnixStream, sync::broadcast, task::JoinHandle};

use super::{
    Event, Qmp, QmpError, SourceVm, VmmError, VmmLimits,
    qmp::within,
    throttle::{self, VcpuThrottle},
};

/// Name under which QEMU keeps the pipe that we hand over.
const PIPE: &str = "xferry-state";
/// Largest part of the device state taken at a time, bytes.
const STATE_CHUNK: usize = 128 << 10;

/// QEMU behind its monitor, with a migration of its own in the background that carries the devices.
pub struct QemuSource {
    vm: String,
    qmp: Qmp,
    limits: VmmLimits,
    events: broadcast::Receiver<Event>,
    state: Option<UnixStream>,
    buffer: BytesMut,
    /// The command that lets the state flow. QEMU answers it only after the state has left it, so it must not be
    /// waited for before the state is read.
    released: Option<JoinHandle<Result<Value, QmpError>>>,
    throttle: Option<VcpuThrottle>,
}

impl QemuSource {
    /// Takes the monitor of a running VM.
    pub fn new(vm: String, qmp: Qmp, limits: VmmLimits) -> Self {
        let events = qmp.subscribe();
        Self { vm, qmp, limits, events, state: None, buffer: BytesMut::new(), released: None, throttle: None }
    }

    /// The monitor.
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// Waits until QEMU's migration is in one of `wanted`.
    async fn migration_status(
        &mut self,
        wanted: &[&'static str],
        waited_for: &'static str,
    ) -> Result<(), VmmError> {
        let seconds = self.limits.step.as_secs();
        let reached = within(self.limits.step, async {
            loop {
                let event = next(&mut self.events, &self.qmp).await?;
                if event.name != "MIGRATION" {
                    continue;
                }
                let status = event.data["status"].as_str().unwrap_or_default();
                if wanted.contains(&status) {
                    return Ok(());
                }
                if matches!(status, "failed" | "cancelled") {
                    return Err(self.failure(status).await);
                }
            }
        });
        reached.await.map_err(|_| VmmError::Timeout { waited_for, seconds })?
    }

    async fn failure(&self, status: &str) -> VmmError {
        let answer = self.qmp.execute("query-migrate", json!({})).await.unwrap_or_default();
        let reason = answer["error-desc"].as_str().unwrap_or("QEMU gives no reason");
        VmmError::State(format!("sending {status}: {reason}"))
    }

    /// Numbers of the vCPUs' threads.
    async fn vcpu_threads(&self) -> Result<Vec<u32>, QmpError> {
        let vcpus = self.qmp.execute("query-cpus-fast", json!({})).await?;
        let threads = vcpus.as_array().into_iter().flatten();
        let mut threads: Vec<u32> =
            threads.filter_map(|vcpu| vcpu["thread-id"].as_u64()?.try_into().ok()).collect();
        // Translated vCPUs may share one.
        threads.sort_unstable();
        threads.dedup();
        Ok(threads)
    }

    async fn run_state(&self) -> Result<String, QmpError> {
        let status = self.qmp.execute("query-status", json!({})).await?;
        Ok(status["status"].as_str().unwrap_or_default().to_owned())
    }
}

/// The next event; an error once the monitor has closed.
pub(super) async fn next(events: &mut broadcast::Receiver<Event>, qmp: &Qmp) -> Result<Event, VmmError> {
    loop {
        tokio::select! {
            // What came before the end comes before it here.
            biased;
            event = events.recv() => match event {
                Ok(event) => return Ok(event),
                // Events were missed: later ones and query-* tell the same.
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => break,
            },
            () = qmp.closed() => break,
        }
    }
    Err(VmmError::State("QEMU has ended".into()))
}

/// Capabilities and parameters that make QEMU move its devices and leave RAM to us.
pub(super) async fn prepare_migration(qmp: &Qmp) -> Result<(), QmpError> {
    let capability = |name: &str| json!({ "capability": name, "state": true });
    qmp.execute(
        "migrate-set-capabilities",
        json!({ "capabilities": [capability("x-ignore-shared"), capability("pause-before-switchover"), capability("events")] }),
    )
    .await?;
    // 0 is "unlimited"; the default of 128 MiB/s would slow the device state down.
    qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": 0 })).await?;
    Ok(())
}

impl SourceVm for QemuSource {
    async fn pause(&mut self) -> Result<(), VmmError> {
        self.qmp.execute("stop", json!({})).await?;
        Ok(())
    }

    async fn unpause(&mut self) -> Result<(), VmmError> {
        self.qmp.execute("cont", json!({})).await?;
        Ok(())
    }

    async fn throttle(&mut self, percent: u8) -> Result<&'static str, VmmError> {
        if self.throttle.is_none() {
            let threads = self.vcpu_threads().await?;
            // A thread that is moved waits for the kernel's grace periods.
            let made = tokio::task::block_in_place(|| VcpuThrottle::new(self.qmp.pid(), &threads));
            self.throttle = Some(made?);
        }
        let Some(throttle) = &mut self.throttle else { return Ok("none") };
        throttle.set(percent)?;
        Ok(throttle.mechanism())
    }

    async fn unthrottle(&mut self) -> Result<(), VmmError> {
        if let Some(throttle) = self.throttle.take() {
            return Ok(tokio::task::block_in_place(|| throttle.release())?);
        }
        let threads = self.vcpu_threads().await?;
        if tokio::task::block_in_place(|| throttle::release_leftovers(self.qmp.pid(), &threads))? {
            tracing::info!(vm = self.vm, "a throttle that was left behind is lifted");
        }
        Ok(())
    }

    async fn stop(&mut self) -> Result<Instant, VmmError> {
        prepare_migration(&self.qmp).await?;
        let (ours, theirs) = StdUnixStream::pair()?;
        ours.set_nonblocking(true)?;
        self.qmp.send_fd(PIPE, theirs.as_fd()).await?;
        drop(theirs);
        self.state = Some(UnixStream::from_std(ours)?);
        // Only what happens from here on counts.
        self.events = self.qmp.subscribe();
        self.qmp.execute("migrate", json!({ "uri": format!("fd:{PIPE}") })).await?;
        let mut stopped = None;
        let seconds = self.limits.step.as_secs();
        let reached = within(self.limits.step, async {
            loop {
                let event = next(&mut self.events, &self.qmp).await?;
                match (event.name.as_str(), event.data["status"].as_str().unwrap_or_default()) {
                    ("STOP", _) => stopped = Some(instant_of(event.micros)),
                    ("MIGRATION", "pre-switchover") => return Ok(stopped.unwrap_or_else(Instant::now)),
                    ("MIGRATION", status @ ("failed" | "cancelled")) => {
                        return Err(self.failure(status).await);
                    }
                    _ => {}
                }
            }
        });
        reached
            .await
            .map_err(|_| VmmError::Timeout { waited_for: "its stop before the switchover", seconds })?
    }

    async fn release_state(&mut self) -> Result<(), VmmError> {
        let qmp = self.qmp.clone();
        self.released = Some(tokio::spawn(async move {
            qmp.execute("migrate-continue", json!({ "state": "pre-switchover" })).await
        }));
        Ok(())
    }

    async fn state(&mut self) -> Result<Option<Bytes>, VmmError> {
        let limit = self.limits.step;
        let Some(stream) = &mut self.state else { return Ok(None) };
        self.buffer.reserve(STATE_CHUNK);
        let read = tokio::time::timeout(limit, stream.read_buf(&mut self.buffer));
        let seconds = limit.as_secs();
        let count = tokio::select! {
            biased;
            count = read => count.map_err(|_| VmmError::Timeout { waited_for: "its next bytes of state", seconds })??,
            error = refusal(&mut self.released) => return Err(error),
        };
        if count > 0 {
            return Ok(Some(self.buffer.split().freeze()));
        }
        self.state = None;
        self.migration_status(&["completed"], "the end of its state").await?;
        Ok(None)
    }

    async fn resume(&mut self) -> Result<(), VmmError> {
        self.state = None;
        let migration = self.qmp.execute("query-migrate", json!({})).await?;
        let status = migration["status"].as_str().unwrap_or("none").to_owned();
        if !matches!(status.as_str(), "none" | "completed" | "failed" | "cancelled") {
            // Asking again is harmless; the end shows in query-migrate.
            self.qmp.execute("migrate_cancel", json!({})).await?;
            let deadline = Instant::now() + self.limits.step;
            loop {
                let migration = self.qmp.execute("query-migrate", json!({})).await?;
                if matches!(migration["status"].as_str(), Some("completed" | "failed" | "cancelled")) {
                    break;
                }
                if Instant::now() > deadline {
                    return Err(VmmError::Timeout {
                        waited_for: "the end of its cancelled migration",
                        seconds: self.limits.step.as_secs(),
                    });
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        if self.run_state().await? != "running" {
            self.qmp.execute("cont", json!({})).await?;
        }
        let state = self.run_state().await?;
        if state != "running" {
            return Err(VmmError::Unfit {
                vm: self.vm.clone(),
                reason: format!(
                    "it should run again here but QEMU says {state:?}: look at it with QMP query-status, and `cont` it"
                ),
            });
        }
        Ok(())
    }

    async fn quit(&mut self) -> Result<(), VmmError> {
        match self.qmp.execute("quit", json!({})).await {
            // It may close before it answers.
            Ok(_) | Err(QmpError::Closed { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let gone = tokio::time::timeout(self.limits.quit, async {
            let process = format!("/proc/{}/exe", self.qmp.pid());
            while std::fs::read_link(&process).is_ok() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        let seconds = self.limits.quit.as_secs();
        gone.await.map_err(|_| VmmError::Timeout { waited_for: "its own end", seconds })
    }
}

/// Ends only when the command failed.
async fn refusal(released: &mut Option<JoinHandle<Result<Value, QmpError>>>) -> VmmError {
    if let Some(command) = released {
        let answer = command.await;
        *released = None;
        match answer {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return error.into(),
            Err(error) => return VmmError::State(format!("its state was not released: {error}")),
        }
    }
    std::future::pending().await
}

/// The instant at which QEMU saw something, from its wall-clock stamp; both are of this host.
fn instant_of(micros: u64) -> Instant {
    let stamp = UNIX_EPOCH + Duration::from_micros(micros);
    let ago = SystemTime::now().duration_since(stamp).unwrap_or_default();
    // A clock step between the two would give nonsense.
    Instant::now().checked_sub(ago.min(Duration::from_secs(1))).unwrap_or_else(Instant::now)
}
