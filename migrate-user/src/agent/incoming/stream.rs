//! The receiving end of one migration's page stream.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{Arc, atomic::Ordering},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use migrate_common::PAGE_SIZE;

use super::reserving;
use crate::{
    agent::{Agent, port::Port},
    control::{Prepare, Prepared, VerifyMode},
    datapath::{
        Codec, Feedback, FeedbackKey, FeedbackSocket, FeedbackTx, FrameLayout, Inbound, InboundSpec,
        LaneLosses, Protection, QueueFigures, Secret, agree, losses,
    },
    memory::{Backend, Digest, Mapping, PageHashes, RamLayout, Reservation},
    migration::MigrationError,
    network::Nic,
};

/// Without a new frame for this long, the missing ones of a round are taken for lost. Longer where frames take longer.
const QUIET: Duration = Duration::from_millis(20);
/// The same while the VM is stopped: what is lost is sent again at once, so patience costs more than it saves.
const QUIET_LAST: Duration = Duration::from_millis(10);
/// The same once every lane's last frame is here: nothing is on its way any more but what was overtaken.
const QUIET_BEHIND: Duration = Duration::from_millis(2);
/// Longest wait for probe frames.
const PROBE_WAIT: Duration = Duration::from_millis(500);

/// Where pages are placed.
pub(super) struct Memory {
    pub(super) layout: RamLayout,
    /// One for each backend of the layout.
    pub(super) mappings: Vec<Mapping>,
    /// One for each mapping.
    pub(super) reservations: Vec<Reservation>,
}

impl Memory {
    /// Without a page that a frame could be placed in.
    pub(super) fn nowhere() -> Self {
        Self { layout: RamLayout::new(Vec::new()), mappings: Vec::new(), reservations: Vec::new() }
    }

    /// Memory for the pages of `backends` in files that are emptied.
    ///
    /// # Errors
    /// When the files are not as large, or cannot be emptied.
    pub(super) fn new(backends: &[Backend], mappings: Vec<Mapping>) -> Result<Self, MigrationError> {
        // The stream's bounds are those of the source's backends: what is mapped here must reach as far.
        let here = mappings.iter().map(Mapping::pages);
        if !here.eq(backends.iter().map(|backend| backend.size / PAGE_SIZE as u64)) {
            return Err(MigrationError::Mismatch(
                "the RAM files here are not as large as the source's memory backends".into(),
            ));
        }
        let reservations = mappings.iter().map(Reservation::clear).collect::<Result<_, _>>()?;
        Ok(Self { layout: RamLayout::new(backends.to_vec()), mappings, reservations })
    }
}

/// The open page stream.
pub(super) struct Stream {
    inbound: Arc<Inbound>,
    reservers: Vec<JoinHandle<()>>,
}

/// Feedback to every lane's own socket.
struct LaneFeedback(Vec<FeedbackSocket>);

impl FeedbackTx for LaneFeedback {
    fn send(&self, feedback: Feedback) {
        if let Some(socket) = self.0.get(usize::from(feedback.lane)) {
            FeedbackTx::send(socket, feedback);
        }
    }
}

impl LaneFeedback {
    fn open(nic: &Nic, request: &Prepare, key: Option<Arc<FeedbackKey>>) -> Result<Self, MigrationError> {
        let open = |&port: &u16| {
            let socket = UdpSocket::bind(SocketAddr::new(nic.address(), 0))?;
            socket.set_nonblocking(true)?;
            socket.connect(SocketAddr::new(request.ip, port))?;
            Ok(FeedbackSocket::new(socket, key.clone()))
        };
        let opened: std::io::Result<_> = request.feedback_ports.iter().map(open).collect();
        opened.map(Self).map_err(|error| {
            MigrationError::Host(format!(
                "{} cannot be reached from {}: {error}; the migration NICs need addresses of one network, or routes",
                request.ip, nic.name
            ))
        })
    }
}

impl Stream {
    /// Lets the source's frames in. `secret` is what only the two hosts know.
    ///
    /// # Errors
    /// When there is no path or no agreement.
    pub(super) fn open(
        agent: &Agent,
        request: &Prepare,
        secret: Option<&Secret>,
        memory: Memory,
    ) -> Result<(Self, Prepared), MigrationError> {
        let port = &agent.port;
        let nic = port.nic()?;
        let ipv6 = request.ip.is_ipv6();
        let single = request.single_buffer || !port.binding().multi_buffer;
        let frames = FrameLayout::new(request.mtu.min(nic.mtu), ipv6, single)
            .map_err(|error| MigrationError::Path(format!("migration network: {error}")))?;
        // Whoever disagrees was told so by a finding, and only probes come.
        let cipher = agree(&request.encryption, &agent.config.pages()).unwrap_or_default();
        let protection = Protection::agreed(cipher, secret, request.session)?;
        let window = port.window(&frames, request.feedback_ports.len());
        let key = FeedbackKey::agreed(secret, request.session)?;
        let inbound = Inbound::new(InboundSpec {
            session: request.session,
            layout: memory.layout,
            mappings: memory.mappings,
            reservations: memory.reservations,
            frames,
            hash: request.verify == Some(VerifyMode::Hash),
            feedback: Box::new(LaneFeedback::open(&nic, request, key)?),
            feedback_every: (window / 4).clamp(1, 32),
            queues: port.lanes() as u32,
            lanes: request.feedback_ports.len() as u16,
            protection,
        });
        port.open_session(&inbound, request.ip)?;
        let prepared = Prepared {
            ip: nic.address(),
            mac: nic.mac,
            mtu: nic.mtu,
            single_buffer: !port.binding().multi_buffer,
            port: port.data_port(),
            window,
            cipher,
            unpacks: Codec::ALL.to_vec(),
            transport: port.describe(),
        };
        Ok((Self { inbound, reservers: Vec::new() }, prepared))
    }

    /// Takes the memory of `chunks` beside the first round, by threads that run where those of `port` do.
    ///
    /// # Errors
    /// When there is no thread for it.
    pub(super) fn reserve(&mut self, port: &Port, chunks: &[(u64, u64)]) -> Result<(), MigrationError> {
        let _placed = port.place();
        self.reservers = reserving::start(&self.inbound, chunks, port.lanes())?;
        Ok(())
    }

    /// Waits for `sent` probe frames, not for long. Returns how many came.
    pub(super) async fn probes(&self, sent: u32) -> u64 {
        let counter = &self.inbound.counters().probes;
        let begun = Instant::now();
        let mut last = (0, begun);
        loop {
            let came = counter.load(Ordering::Relaxed);
            if came != last.0 {
                last = (came, Instant::now());
            }
            // One is proof enough, and the others are lost when they do not follow it.
            let limit = if came > 0 { QUIET } else { PROBE_WAIT };
            if came >= u64::from(sent) || last.1.elapsed() > limit {
                counter.store(0, Ordering::Relaxed);
                return came;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Ends a round of so many `frames` by lane, the `last` one or not. `transit` is how long frames take. Returns what was lost.
    ///
    /// # Errors
    /// When the numbers cannot be, or a page could not be placed.
    pub(super) async fn close_round(
        &self,
        port: &Port,
        epoch: u32,
        frames: &[u32],
        last: bool,
        transit: Duration,
    ) -> Result<Vec<LaneLosses>, MigrationError> {
        let inbound = &self.inbound;
        if !inbound.can_be(frames) {
            return Err(MigrationError::Mismatch(format!(
                "a round of {frames:?} frames by lane is more than {} pages take",
                inbound.layout().pages()
            )));
        }
        let quiet = if last { QUIET_LAST } else { QUIET };
        tokio::task::block_in_place(|| wait_for_frames(inbound, frames, quiet, transit));
        let received = port.close_epoch(inbound.session(), epoch).await;
        inbound.reset_arrived();
        match inbound.take_failure() {
            Some(failure) => Err(failure.into()),
            None => Ok(losses(frames, &received)),
        }
    }

    /// What arrived, by queue.
    pub(super) fn figures(&self) -> Vec<QueueFigures> {
        self.inbound.figures()
    }

    /// Frames that have arrived.
    pub(super) fn frames(&self) -> u64 {
        self.inbound.counters().frames.load(Ordering::Relaxed)
    }

    /// Hashes what has changed, where hashes are kept.
    ///
    /// # Errors
    /// When memory cannot be read.
    pub(super) fn refresh_hashes(&self) -> Result<(), MigrationError> {
        let refresh = |hashes: &PageHashes| hashes.refresh(self.inbound.layout(), self.inbound.mappings());
        Ok(self.inbound.hashes().map_or(Ok(()), |hashes| tokio::task::block_in_place(|| refresh(hashes)))?)
    }

    /// The digest of all memory: from the hashes that were kept, or by reading it where none were.
    ///
    /// # Errors
    /// When memory cannot be read.
    pub(super) fn digest(&self) -> Result<Digest, MigrationError> {
        let inbound = &self.inbound;
        let read = || Ok(Digest::of(inbound.layout(), inbound.mappings())?);
        inbound.hashes().map_or_else(|| tokio::task::block_in_place(read), |kept| Ok(kept.digest()))
    }

    /// Places no frame any more. The memory stays mapped, for the digest.
    pub(super) async fn close(&mut self, port: &Port) {
        self.inbound.close();
        port.close_session(self.inbound.session()).await;
        for reserver in self.reservers.drain(..) {
            // It looks at the closing after every 2 MiB. A panic in it has been printed.
            let _ = tokio::task::block_in_place(|| reserver.join());
        }
    }
}

/// Waits until all `frames` have come, or none has come for `quiet`, or for as long as frames may be on their way:
/// the word that they were sent comes by another network, which may be faster.
fn wait_for_frames(inbound: &Inbound, frames: &[u32], quiet: Duration, transit: Duration) {
    let expected: u64 = frames.iter().map(|&frames| u64::from(frames)).sum();
    let (quiet, behind) = (quiet.max(transit * 2), QUIET_BEHIND.max(transit / 4));
    let mut arrived = inbound.arrived();
    let mut since = Instant::now();
    while arrived < expected {
        std::thread::sleep(Duration::from_micros(50));
        let now = inbound.arrived();
        if now != arrived {
            arrived = now;
            since = Instant::now();
        } else if since.elapsed() > if inbound.ends_seen(frames) { behind } else { quiet } {
            return;
        }
    }
}
