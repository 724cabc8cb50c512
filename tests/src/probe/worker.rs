//! The threads of a probe.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};

/// Told to a probe's threads when they are to end.
pub(crate) type Stop = Arc<AtomicBool>;

/// Threads that end when this is dropped; they look at [`Stop`] at least every 100 ms.
pub(crate) struct Workers {
    stop: Stop,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    pub fn new() -> Self {
        Self { stop: Stop::default(), threads: Vec::new() }
    }

    /// Starts a thread.
    pub fn start(&mut self, name: &str, work: impl FnOnce(&Stop) + Send + 'static) -> Result<()> {
        let stop = Arc::clone(&self.stop);
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || work(&stop));
        self.threads.push(thread.with_context(|| format!("cannot start thread {name}"))?);
        Ok(())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A panic was printed by its thread and shows in the probe's figures.
            let _ = thread.join();
        }
    }
}

/// Asks the scheduler to run the calling thread soon when it wakes: the lab's processors are busy
/// with a guest and two agents, and the probe is to measure the network, not its own waiting.
pub(super) fn raise_priority() {
    // Without the right to do so the figures are less sharp, that is all.
    let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), -15);
}
