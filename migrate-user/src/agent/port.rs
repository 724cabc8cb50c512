//! The migration NIC as the agent owns it: XDP program, sockets, receive workers, send queues.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use serde::Serialize;
use tokio::sync::oneshot;

use super::{
    AgentError,
    config::MigrationConfig,
    worker::{Command, Worker},
};
use crate::{
    datapath::{FrameLayout, FrameSet, FrameSink, Inbound, QueueFigures, XskSink, XskSource},
    migration::MigrationError,
    network::{AttachMode, Bouncer, DropCount, NetworkError, Nic},
    preflight::NicFacts,
    xsk::{BindMode, Binding, CHUNK_SIZE, Socket, SocketConfig, Statistics, TxQueue},
};

/// Receive buffers of one queue: 16 MiB.
const RX_CHUNKS: u32 = 4096;
/// Memory for frames that wait to be sent, of one queue, bytes.
const TX_BYTES: usize = 4 << 20;
/// Most frames a lane may have on the way. A veth queue holds 256 (`VETH_RING_SIZE`, drivers/net/veth.c); real
/// NICs more, but a window beyond bandwidth × delay only fills queues.
const MAX_WINDOW: u32 = 240;

/// The NIC, in use.
pub struct Port {
    nic: Nic,
    data_port: u16,
    binding: Binding,
    attach_mode: AttachMode,
    bouncer: Mutex<Bouncer>,
    workers: Vec<Worker>,
    sockets: Vec<Socket>,
    senders: Arc<Mutex<Vec<TxQueue>>>,
    /// Those that are being received, and some that were.
    inbounds: Mutex<Vec<Weak<Inbound>>>,
}

/// A migration that is being received, for status.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SessionStatus {
    /// Its number.
    pub session: u64,
    /// What came to each queue so far.
    pub queues: Vec<QueueFigures>,
}

/// State of the NIC, for status.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PortStatus {
    /// Interface.
    pub interface: String,
    /// Address.
    pub address: String,
    /// MTU, bytes.
    pub mtu: usize,
    /// Driver or generic.
    pub xdp_mode: AttachMode,
    /// Whether the driver works on the UMEM itself.
    pub zero_copy: bool,
    /// Whether frames may span several buffers.
    pub multi_buffer: bool,
    /// AF_XDP sockets.
    pub queues: usize,
    /// Frames to the data port that the XDP program dropped.
    pub drops: Vec<DropCount>,
    /// Frames that reached userspace and were not whole.
    pub corrupt: u64,
    /// The same by queue.
    pub corrupt_by_queue: Vec<u64>,
    /// Migrations that are being received.
    pub sessions: Vec<SessionStatus>,
    /// Frames the kernel dropped for lack of buffers, all queues.
    pub no_buffer: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Port {
    /// Attaches the XDP program, binds a socket to every queue, starts the workers.
    ///
    /// # Errors
    /// What is in the way, with a remedy.
    pub(super) fn open(config: &MigrationConfig) -> Result<Self, AgentError> {
        let nic = Nic::read(&config.interface).map_err(MigrationError::from)?;
        let mut bouncer = Bouncer::attach(&nic, config.port).map_err(MigrationError::from)?;
        let queues =
            nic.queues.min(config.queues.unwrap_or(u32::MAX)).clamp(1, migrate_common::maps::MAX_QUEUES);
        let largest = FrameLayout::new(nic.mtu, nic.address().is_ipv6(), false)
            .map_err(|error| AgentError::Host(format!("{}: {error}", nic.name)))?;
        let mut workers = Vec::new();
        let mut sockets = Vec::new();
        let mut senders = Vec::new();
        let mut binding = None;
        for queue in 0..queues {
            let socket_config = SocketConfig {
                interface: nic.name.clone(),
                ifindex: nic.index,
                queue,
                rx_chunks: RX_CHUNKS,
                tx_slots: (TX_BYTES / largest.frame_len).clamp(64, 512) as u32,
                tx_slot_chunks: largest.frame_len.div_ceil(CHUNK_SIZE) as u32,
            };
            let modes: &[BindMode] = match binding {
                // All queues alike.
                None => &BindMode::LADDER,
                Some(Binding { zero_copy: true, multi_buffer: true }) => &[BindMode::ZeroCopyMultiBuffer],
                Some(Binding { zero_copy: true, multi_buffer: false }) => &[BindMode::ZeroCopy],
                Some(Binding { zero_copy: false, multi_buffer: true }) => &[BindMode::CopyMultiBuffer],
                Some(Binding { zero_copy: false, multi_buffer: false }) => &[BindMode::Copy],
            };
            let (socket, tx, rx) = Socket::open(&socket_config, modes).map_err(MigrationError::from)?;
            binding = Some(socket.binding());
            bouncer.register_socket(queue, socket.fd()).map_err(MigrationError::from)?;
            workers.push(Worker::start(queue, XskSource::new(rx, config.port)).map_err(|error| {
                AgentError::Host(format!("no thread for queue {queue} of {}: {error}", nic.name))
            })?);
            sockets.push(socket);
            senders.push(tx);
        }
        Ok(Self {
            attach_mode: bouncer.mode(),
            binding: binding.unwrap_or(Binding { multi_buffer: false, zero_copy: false }),
            data_port: config.port,
            bouncer: Mutex::new(bouncer),
            workers,
            sockets,
            senders: Arc::new(Mutex::new(senders)),
            inbounds: Mutex::default(),
            nic,
        })
    }

    /// The NIC with its facts of now.
    ///
    /// # Errors
    /// When it lost its carrier, its address, or itself; or its MTU was changed, for which buffers were sized.
    pub(super) fn nic(&self) -> Result<Nic, MigrationError> {
        let nic = Nic::read(&self.nic.name)?;
        if nic.index != self.nic.index {
            return Err(MigrationError::Host(format!(
                "{} was replaced since the agent started: restart the agent",
                nic.name
            )));
        }
        if nic.mtu > self.nic.mtu {
            return Err(MigrationError::Host(format!(
                "the MTU of {} was raised from {} to {} since the agent started: restart the agent",
                nic.name, self.nic.mtu, nic.mtu
            )));
        }
        Ok(nic)
    }

    /// The NIC as it was when the agent started.
    pub(super) fn nic_at_start(&self) -> &Nic {
        &self.nic
    }

    /// What the other host is told about it.
    pub(super) fn facts(&self, mtu: usize) -> NicFacts {
        NicFacts {
            name: self.nic.name.clone(),
            mtu,
            xdp_mode: match self.attach_mode {
                AttachMode::Driver => "driver",
                AttachMode::Generic => "generic",
            }
            .into(),
            zero_copy: self.binding.zero_copy,
            multi_buffer: self.binding.multi_buffer,
            queues: self.sockets.len(),
        }
    }

    /// UDP port of the page stream.
    pub(super) fn data_port(&self) -> u16 {
        self.data_port
    }

    /// What the kernel agreed to.
    pub(super) fn binding(&self) -> Binding {
        self.binding
    }

    /// One line about how frames are received here.
    pub(super) fn describe(&self) -> String {
        format!(
            "AF_XDP on {}, XDP {}, {}, {} queue(s)",
            self.nic.name,
            match self.attach_mode {
                AttachMode::Driver => "driver",
                AttachMode::Generic => "generic",
            },
            if self.binding.zero_copy { "zero-copy" } else { "copy mode" },
            self.workers.len()
        )
    }

    /// Frames that each of `lanes` may have on the way to here.
    pub(super) fn window(&self, frames: &FrameLayout, lanes: usize) -> u32 {
        // All lanes may hash to one queue; an eighth stays free for probes and strays.
        let room = RX_CHUNKS as usize * 7 / 8 / frames.receive_buffers() / lanes.max(1);
        (room as u32).clamp(1, MAX_WINDOW)
    }

    /// Lets a migration's frames in.
    ///
    /// # Errors
    /// When the XDP program's maps are full.
    pub(super) fn open_session(
        &self,
        inbound: &Arc<Inbound>,
        peer: std::net::IpAddr,
    ) -> Result<(), NetworkError> {
        for worker in &self.workers {
            worker.tell(Command::Open(Arc::clone(inbound)));
        }
        lock(&self.inbounds).push(Arc::downgrade(inbound));
        lock(&self.bouncer).admit(inbound.session(), peer)
    }

    /// Closes an epoch on every worker: the frames that came, by lane.
    pub(super) async fn close_epoch(&self, session: u64, epoch: u32) -> Vec<FrameSet> {
        let mut answers = Vec::new();
        for worker in &self.workers {
            let (reply, answer) = oneshot::channel();
            worker.tell(Command::Close(session, epoch, reply));
            answers.push(answer);
        }
        let mut all: Vec<FrameSet> = Vec::new();
        for answer in answers {
            for (lane, received) in answer.await.unwrap_or_default().into_iter().enumerate() {
                if lane >= all.len() {
                    all.resize_with(lane + 1, FrameSet::default);
                }
                all[lane].union_with(&received);
            }
        }
        all
    }

    /// Shuts a migration out; when this returns, none of its pages is touched any more.
    pub(super) async fn close_session(&self, session: u64) {
        lock(&self.bouncer).dismiss(session);
        for worker in &self.workers {
            let (reply, answer) = oneshot::channel();
            worker.tell(Command::Forget(session, reply));
            // No answer: the worker has ended and touches nothing.
            let _ = answer.await;
        }
    }

    /// All send queues, for one migration.
    ///
    /// # Errors
    /// When another migration has them.
    pub(super) fn lease_senders(&self) -> Result<Vec<LeasedSink>, MigrationError> {
        let queues: Vec<TxQueue> = lock(&self.senders).drain(..).collect();
        if queues.is_empty() {
            return Err(MigrationError::Host(format!(
                "another migration is using the send queues of {}: wait until it is done (`xferry status`)",
                self.nic.name
            )));
        }
        Ok(queues
            .into_iter()
            .map(|queue| LeasedSink { sink: Some(XskSink::new(queue)), home: Arc::clone(&self.senders) })
            .collect())
    }

    /// How many lanes a migration from here has.
    pub(super) fn lanes(&self) -> usize {
        self.sockets.len()
    }

    fn sessions(&self) -> Vec<SessionStatus> {
        let mut inbounds = lock(&self.inbounds);
        inbounds.retain(|inbound| inbound.strong_count() > 0);
        let live = inbounds.iter().filter_map(Weak::upgrade);
        live.map(|inbound| SessionStatus { session: inbound.session(), queues: inbound.figures() }).collect()
    }

    /// State for the operator.
    pub fn status(&self) -> PortStatus {
        let statistics: Vec<Statistics> =
            self.sockets.iter().filter_map(|socket| socket.statistics().ok()).collect();
        PortStatus {
            interface: self.nic.name.clone(),
            address: self.nic.address().to_string(),
            mtu: self.nic.mtu,
            xdp_mode: self.attach_mode,
            zero_copy: self.binding.zero_copy,
            multi_buffer: self.binding.multi_buffer,
            queues: self.sockets.len(),
            drops: lock(&self.bouncer).drops(),
            corrupt: self.workers.iter().map(Worker::damaged).sum(),
            corrupt_by_queue: self.workers.iter().map(Worker::damaged).collect(),
            sessions: self.sessions(),
            no_buffer: statistics.iter().map(|s| s.rx_ring_full + s.rx_fill_ring_empty + s.rx_dropped).sum(),
        }
    }
}

/// A send queue on loan; goes back when dropped.
pub(super) struct LeasedSink {
    sink: Option<XskSink>,
    home: Arc<Mutex<Vec<TxQueue>>>,
}

impl Drop for LeasedSink {
    fn drop(&mut self) {
        if let Some(sink) = self.sink.take() {
            lock(&self.home).push(sink.into_inner());
        }
    }
}

impl FrameSink for LeasedSink {
    fn capacity(&self) -> usize {
        self.sink.as_ref().map_or(0, FrameSink::capacity)
    }

    fn frame(&mut self, fill: impl FnOnce(&mut [u8]) -> usize) -> std::io::Result<bool> {
        self.sink.as_mut().map_or(Ok(false), |sink| sink.frame(fill))
    }

    fn flush(&mut self) -> std::io::Result<usize> {
        self.sink.as_mut().map_or(Ok(0), FrameSink::flush)
    }
}

/// How often the XDP program's log is looked at. It logs rare events only.
const LOG_INTERVAL: std::time::Duration = std::time::Duration::from_millis(250);

/// Passes on what the XDP program logs, for as long as the agent runs.
pub(super) fn log_xdp(port: &Port) {
    let logger = aya_log::EbpfLogger::init(lock(&port.bouncer).ebpf_mut());
    match logger {
        Ok(mut logger) => {
            tokio::spawn(async move {
                loop {
                    tokio::time::sleep(LOG_INTERVAL).await;
                    logger.flush();
                }
            });
        }
        Err(error) => tracing::warn!(%error, "the XDP program's log is not heard; its counters are"),
    }
}
