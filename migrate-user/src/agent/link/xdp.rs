//! AF_XDP as link: XDP program, sockets, send queues.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex},
};

use super::Target;
use crate::{
    agent::{AgentError, config::MigrationConfig},
    datapath::{Endpoint, FrameLayout, FramePath, FrameSink, UdpGroup, XskSink, XskSource},
    migration::MigrationError,
    network::{AttachMode, Bouncer, DropCount, Nic},
    sync::lock,
    xsk::{BindMode, Binding, CHUNK_SIZE, Socket, SocketConfig, TxQueue},
};

/// Receive buffers of one queue: 16 MiB.
const RX_CHUNKS: u32 = 4096;
/// Memory for frames that wait to be sent, of one queue, bytes.
const TX_BYTES: usize = 4 << 20;

/// XDP program, sockets, send queues.
pub(in crate::agent) struct XdpLink {
    binding: Binding,
    attach_mode: AttachMode,
    bouncer: Mutex<Bouncer>,
    sockets: Vec<Socket>,
    senders: Arc<Mutex<Vec<TxQueue>>>,
    /// No frame reaches it past the XDP program. It keeps the data port from everybody else: from an agent with UDP sockets,
    /// to which none would come.
    _port: UdpGroup,
}

impl XdpLink {
    /// Attaches the XDP program and binds a socket to every queue; with the sources of what comes to them.
    ///
    /// # Errors
    /// What is in the way, with a remedy.
    pub fn open(nic: &Nic, config: &MigrationConfig) -> Result<(Self, Vec<XskSource>), AgentError> {
        let port = UdpGroup::open(&nic.name, SocketAddr::new(nic.address(), config.port), 1)
            .map_err(MigrationError::from)?;
        let mut bouncer = Bouncer::attach(nic, config.port).map_err(MigrationError::from)?;
        let largest = FrameLayout::new(nic.mtu, nic.address().is_ipv6(), false)
            .map_err(|error| AgentError::Host(format!("{}: {error}", nic.name)))?;
        let mut sources = Vec::new();
        let mut sockets = Vec::new();
        let mut senders = Vec::new();
        let mut binding = None;
        for queue in 0..config.queues_of(nic) {
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
            sources.push(XskSource::new(rx, config.port));
            sockets.push(socket);
            senders.push(tx);
        }
        let link = Self {
            attach_mode: bouncer.mode(),
            binding: binding.unwrap_or(Binding { multi_buffer: false, zero_copy: false }),
            bouncer: Mutex::new(bouncer),
            sockets,
            senders: Arc::new(Mutex::new(senders)),
            _port: port,
        };
        Ok((link, sources))
    }

    pub fn attach_mode(&self) -> AttachMode {
        self.attach_mode
    }

    pub fn binding(&self) -> Binding {
        self.binding
    }

    pub fn lanes(&self) -> usize {
        self.sockets.len()
    }

    pub fn room(&self, frames: &FrameLayout) -> usize {
        RX_CHUNKS as usize / frames.receive_buffers()
    }

    pub fn admit(&self, session: u64, peer: IpAddr) -> Result<(), MigrationError> {
        Ok(lock(&self.bouncer).admit(session, peer)?)
    }

    pub fn dismiss(&self, session: u64) {
        lock(&self.bouncer).dismiss(session);
    }

    pub fn drops(&self) -> Vec<DropCount> {
        lock(&self.bouncer).drops()
    }

    pub fn no_buffer(&self) -> u64 {
        let statistics = self.sockets.iter().filter_map(|socket| socket.statistics().ok());
        statistics.map(|s| s.rx_ring_full + s.rx_fill_ring_empty + s.rx_dropped).sum()
    }

    /// All send queues, for one migration.
    ///
    /// # Errors
    /// When another migration has them.
    pub fn lease(&self, nic: &Nic) -> Result<Vec<LeasedSink>, MigrationError> {
        let queues: Vec<TxQueue> = lock(&self.senders).drain(..).collect();
        if queues.is_empty() {
            return Err(MigrationError::Host(format!(
                "another migration is using the send queues of {}: wait until it is done (`xferry status`)",
                nic.name
            )));
        }
        Ok(queues
            .into_iter()
            .map(|queue| LeasedSink { sink: Some(XskSink::new(queue)), home: Arc::clone(&self.senders) })
            .collect())
    }
}

/// A send queue on loan; goes back when dropped.
pub(in crate::agent) struct LeasedSink {
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
    fn frame(&mut self, fill: impl FnOnce(&mut [u8]) -> usize) -> std::io::Result<bool> {
        self.sink.as_mut().map_or(Ok(false), |sink| sink.frame(fill))
    }

    fn flush(&mut self) -> std::io::Result<usize> {
        self.sink.as_mut().map_or(Ok(0), FrameSink::flush)
    }
}

/// Headers of frames to `to`.
pub(super) fn path(nic: &Nic, source_port: u16, to: Target) -> Result<FramePath, MigrationError> {
    let own = Endpoint { mac: nic.mac.0, ip: nic.address() };
    let peer = Endpoint { mac: next_hop(nic, to.ip, to.mac)?, ip: to.ip };
    Ok(FramePath::new(own, peer, source_port, to.port))
}

/// Ethernet address for frames to `peer`: its own where it is a neighbour, else the gateway's.
fn next_hop(nic: &Nic, peer: IpAddr, peer_mac: [u8; 6]) -> Result<[u8; 6], MigrationError> {
    if nic.on_link(peer) {
        return Ok(peer_mac);
    }
    crate::network::gateway_mac(&nic.name, peer).ok_or_else(|| {
        MigrationError::Host(format!(
            "{peer} is not on the network of {}, and no gateway towards it is known there: give both migration NICs \
             addresses of one network, or add a route (`ip route add {peer} via … dev {}`) and ping it once",
            nic.name, nic.name
        ))
    })
}

/// How often the XDP program's log is looked at. It logs rare events only.
const LOG_INTERVAL: std::time::Duration = std::time::Duration::from_millis(250);

/// Passes on what the XDP program logs, for as long as the agent runs.
pub(in crate::agent) fn log_xdp(link: &XdpLink) {
    let logger = aya_log::EbpfLogger::init(lock(&link.bouncer).ebpf_mut());
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
