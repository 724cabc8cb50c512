//! The receive worker of one NIC queue.

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

use crate::{
    datapath::{FrameSet, Inbound, SessionReceiver, checked_frame, claimed_session},
    xsk::RxQueue,
};

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
    corrupt: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Worker {
    /// Starts the worker of `queue`.
    pub fn start(queue: u32, rx: RxQueue, port: u16) -> std::io::Result<Self> {
        let (commands, inbox) = mpsc::channel();
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let corrupt = Arc::new(AtomicU64::new(0));
        let mut run = Run {
            rx,
            queue,
            port,
            inbox,
            wake: Arc::clone(&wake),
            corrupt: Arc::clone(&corrupt),
            sessions: Vec::new(),
        };
        let thread = std::thread::Builder::new().name(format!("receive-{queue}")).spawn(move || run.run())?;
        Ok(Self { commands, wake, corrupt, thread: Some(thread) })
    }

    /// Gives it a command.
    pub fn tell(&self, command: Command) {
        // A worker that has ended dropped its inbox, and whoever awaits an answer learns it by that.
        if self.commands.send(command).is_ok() {
            // A full counter means that it is being woken already.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }

    /// Frames that were not whole or had changed on the way.
    pub fn corrupt(&self) -> u64 {
        self.corrupt.load(Ordering::Relaxed)
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

struct Run {
    rx: RxQueue,
    queue: u32,
    port: u16,
    inbox: mpsc::Receiver<Command>,
    wake: Arc<OwnedFd>,
    corrupt: Arc<AtomicU64>,
    sessions: Vec<SessionReceiver>,
}

impl Run {
    fn run(&mut self) {
        let mut idle_since = None;
        loop {
            while let Ok(command) = self.inbox.try_recv() {
                match command {
                    Command::Open(inbound) => self.sessions.push(SessionReceiver::new(inbound, self.queue)),
                    Command::Close(session, epoch, reply) => {
                        let found =
                            self.sessions.iter_mut().find(|other| other.inbound().session() == session);
                        let _ = reply.send(found.map(|receiver| receiver.close(epoch)).unwrap_or_default());
                    }
                    Command::Forget(session, reply) => {
                        self.sessions.retain(|other| other.inbound().session() != session);
                        let _ = reply.send(());
                    }
                    Command::Stop => return,
                }
            }
            if self.receive() > 0 {
                idle_since = None;
                self.sessions.iter_mut().for_each(|session| session.feedback(false));
                continue;
            }
            self.sessions.iter_mut().for_each(|session| session.feedback(true));
            let since = *idle_since.get_or_insert_with(Instant::now);
            if !self.sessions.is_empty() && since.elapsed() < SPIN {
                std::hint::spin_loop();
                continue;
            }
            let repeat = self.sessions.iter().any(SessionReceiver::may_repeat);
            let asleep = Instant::now();
            if let Err(error) = self.rx.wait(&self.wake, if repeat { REPEAT_MS } else { SLEEP_MS }) {
                tracing::error!(%error, "a receive queue cannot be waited for");
                std::thread::sleep(Duration::from_millis(10));
            }
            let mut counter = [0; 8];
            // Nothing to read when it was a frame that woke us.
            let _ = rustix::io::read(&self.wake, &mut counter);
            if repeat && asleep.elapsed() >= Duration::from_millis(REPEAT_MS as u64) {
                self.sessions.iter_mut().for_each(|session| {
                    session.repeat_feedback();
                });
            }
        }
    }

    fn receive(&mut self) -> usize {
        let Self { rx, port, corrupt, sessions, .. } = self;
        rx.receive(BUDGET, |packet| match checked_frame(&packet, *port) {
            Ok(frame) => {
                let session = frame.header.session;
                if let Some(receiver) = sessions.iter_mut().find(|other| other.inbound().session() == session)
                {
                    receiver.handle(&frame);
                }
            }
            Err(_) => {
                corrupt.fetch_add(1, Ordering::Relaxed);
                let session = claimed_session(&packet, *port);
                if let Some(receiver) =
                    sessions.iter().find(|other| Some(other.inbound().session()) == session)
                {
                    receiver.corrupt();
                }
            }
        })
    }
}
