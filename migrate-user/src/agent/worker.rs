//! A receive worker: one thread that takes the frames of one source.

use std::{
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use rustix::event::{EventfdFlags, eventfd};
use tokio::sync::oneshot;

use crate::datapath::{Demux, FrameSet, FrameSource, Inbound};

/// Frames taken before commands are looked at.
const BUDGET: usize = 64;
/// How long an empty queue is looked at again before the worker sleeps.
const SPIN: Duration = Duration::from_micros(30);
/// Longest sleep, ms.
const SLEEP_MS: i64 = 1000;
/// The same while a sender may wait for feedback that was lost.
const REPEAT_MS: i64 = 10;

/// What a worker can be told.
pub(super) enum Command {
    /// Take frames of a new migration.
    Open(Arc<Inbound>),
    /// Close an epoch of a migration and say which frames came, by lane.
    Close(u64, u32, oneshot::Sender<Vec<FrameSet>>),
    /// Forget a migration; answered when nothing of it is touched any more.
    Forget(u64, oneshot::Sender<()>),
    /// End.
    Stop,
}

/// A running worker.
pub(super) struct Worker {
    commands: mpsc::Sender<Command>,
    wake: Arc<OwnedFd>,
    damaged: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Worker {
    /// Starts the worker that takes what comes from `source` as that of `queue`.
    pub fn start(queue: u32, source: impl FrameSource + 'static) -> std::io::Result<Self> {
        let (commands, inbox) = mpsc::channel();
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let demux = Demux::default();
        let damaged = demux.damaged();
        let mut run = Run { source, queue, inbox, wake: Arc::clone(&wake), demux };
        let thread = std::thread::Builder::new().name(format!("receive-{queue}")).spawn(move || run.run())?;
        Ok(Self { commands, wake, damaged, thread: Some(thread) })
    }

    /// Gives it a command.
    pub fn tell(&self, command: Command) {
        // A worker that has ended dropped its inbox, and whoever awaits an answer learns it by that.
        if self.commands.send(command).is_ok() {
            // A full counter means that it is being woken already.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }

    /// Frames that were not whole, had changed on the way or were forged.
    pub fn damaged(&self) -> u64 {
        self.damaged.load(Ordering::Relaxed)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.tell(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // It panicked when this fails, and has said so.
            let _ = thread.join();
        }
    }
}

struct Run<S> {
    source: S,
    queue: u32,
    inbox: mpsc::Receiver<Command>,
    wake: Arc<OwnedFd>,
    demux: Demux,
}

impl<S: FrameSource> Run<S> {
    fn run(&mut self) {
        let mut idle_since = None;
        loop {
            while let Ok(command) = self.inbox.try_recv() {
                match command {
                    Command::Open(inbound) => self.demux.open(inbound, self.queue),
                    Command::Close(session, epoch, reply) => {
                        let _ = reply.send(self.demux.close(session, epoch));
                    }
                    Command::Forget(session, reply) => {
                        self.demux.forget(session);
                        let _ = reply.send(());
                    }
                    Command::Stop => return,
                }
            }
            let demux = &mut self.demux;
            if self.source.receive(BUDGET, |datagram| demux.take(datagram)) > 0 {
                idle_since = None;
                demux.feedback(false);
                continue;
            }
            let since = *idle_since.get_or_insert_with(Instant::now);
            if !demux.is_empty() && since.elapsed() < SPIN {
                std::hint::spin_loop();
                continue;
            }
            demux.feedback(true);
            let repeat = demux.may_repeat();
            let asleep = Instant::now();
            if let Err(error) = self.source.wait(&self.wake, if repeat { REPEAT_MS } else { SLEEP_MS }) {
                tracing::error!(%error, "a receive queue cannot be waited for");
                std::thread::sleep(Duration::from_millis(10));
            }
            let mut counter = [0; 8];
            // Nothing to read when it was a frame that woke us.
            let _ = rustix::io::read(&self.wake, &mut counter);
            if repeat && asleep.elapsed() >= Duration::from_millis(REPEAT_MS as u64) {
                self.demux.repeat_feedback();
            }
        }
    }
}
