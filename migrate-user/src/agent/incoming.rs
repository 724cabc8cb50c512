//! A VM comes to this host: the waiting QEMU, its memory and the receiving end behind the destination's state
//! machine.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{Arc, atomic::Ordering},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use migrate_common::PAGE_SIZE;

use super::{Agent, announcing, ram::RamFiles};
use crate::{
    control::{Prepare, Prepared},
    datapath::{Feedback, FeedbackTx, FrameLayout, Inbound, InboundSpec, LaneLosses, losses},
    memory::{
        Access, Digest, Mapping, PageHashes, PageSet, RESERVE_CHUNK, RamLayout, Reservation, data_extents,
    },
    migration::{DestinationHost, DestinationRecord, MigrationError, Recorded, Session, Unprepared, Verdict},
    network::Announcer,
    vmm::{QemuDestination, VmDefinition, VmFacts, VmmError, inspect},
};

/// Without a new frame for this long, the missing ones of a round are taken for lost.
const QUIET: Duration = Duration::from_millis(20);
/// The same while the VM is stopped: what is lost is sent again at once, so patience costs more than it saves.
const QUIET_LAST: Duration = Duration::from_millis(10);
/// Longest wait for probe frames.
const PROBE_WAIT: Duration = Duration::from_millis(500);
/// Memory that is left to the host beside the VM's, bytes.
const HEADROOM: u64 = 64 << 20;

/// This host's part of one arriving migration.
pub(super) struct IncomingHost {
    agent: Arc<Agent>,
    inbound: Option<Arc<Inbound>>,
    announcer: Option<Announcer>,
    nics: u32,
    /// Name in the list of arriving VMs.
    listed: Option<String>,
    reserver: Option<JoinHandle<()>>,
    session: Option<Session>,
    definition: Option<VmDefinition>,
    /// Emptied if the VM does not come to run here.
    ram: RamFiles,
    /// Address of the host that the VM comes from.
    peer: IpAddr,
}

impl Drop for IncomingHost {
    fn drop(&mut self) {
        if let Some(vm) = &self.listed {
            self.agent.arriving().retain(|other| other != vm);
        }
    }
}

/// Feedback to every lane's own socket.
struct LaneFeedback(Vec<UdpSocket>);

impl FeedbackTx for LaneFeedback {
    fn send(&self, feedback: Feedback) {
        if let Some(socket) = self.0.get(usize::from(feedback.lane)) {
            FeedbackTx::send(socket, feedback);
        }
    }
}

impl IncomingHost {
    pub fn new(agent: Arc<Agent>, peer: IpAddr) -> Self {
        Self {
            agent,
            inbound: None,
            announcer: None,
            nics: 0,
            listed: None,
            reserver: None,
            session: None,
            definition: None,
            ram: RamFiles::default(),
            peer,
        }
    }

    /// Number of the session, once there is one.
    pub fn session(&self) -> Option<u64> {
        self.session.as_ref().map(|session| session.session)
    }

    fn inbound(&self) -> Result<&Arc<Inbound>, MigrationError> {
        self.inbound.as_ref().ok_or_else(|| MigrationError::Host("no page stream is open".into()))
    }

    /// Everything that needs the waiting VM; on error the caller ends it.
    async fn receive_into(
        &mut self,
        vm: &QemuDestination,
        definition: &VmDefinition,
        request: &Prepare,
    ) -> Result<Prepared, MigrationError> {
        let facts = inspect(vm.qmp()).await?;
        fits(request, &facts)?;
        let (announcer, nics) = announcing::open(definition, &request.macs, &facts)?;
        (self.announcer, self.nics) = (Some(announcer), nics);

        let nic = self.agent.port.nic()?;
        let layout = RamLayout::new(request.backends.clone());
        let populated: u64 = request.populated.iter().map(|(start, end)| end.saturating_sub(*start)).sum();
        let needed = (populated * RESERVE_CHUNK * PAGE_SIZE as u64).min(layout.bytes());
        enough_memory(needed, layout.bytes())?;
        let mappings = facts
            .files
            .iter()
            .map(|file| Mapping::new(file.open(true)?, file.path.clone(), Access::Write))
            .collect::<Result<Vec<_>, _>>()?;
        self.ram = RamFiles::open(&facts.files)?;
        let reservations = mappings.iter().map(Reservation::clear).collect::<Result<Vec<_>, _>>()?;
        enough_room(needed, &mappings)?;

        let port = &self.agent.port;
        let ipv6 = request.ip.is_ipv6();
        let single = request.single_buffer || !port.binding().multi_buffer;
        let frames = FrameLayout::new(request.mtu.min(nic.mtu), ipv6, single)
            .map_err(|error| MigrationError::Path(format!("migration network: {error}")))?;
        let window = port.window(&frames, request.feedback_ports.len());
        let inbound = Inbound::new(InboundSpec {
            session: request.session,
            layout,
            mappings,
            reservations,
            frames,
            hash: request.verify.is_some(),
            feedback: Box::new(self.feedback_sockets(&nic, request)?),
            feedback_every: (window / 4).clamp(1, 32),
        });
        // Before memory is taken: an agent that dies now finds it again.
        if let Some(session) = &mut self.session {
            session.ram = facts.files.iter().map(|file| file.path.clone()).collect();
            let session = session.clone();
            self.agent.write_journal(move |journal| journal.wait(session)).await?;
        }
        if !request.check_only {
            self.reserver = Some(reserve(&inbound, request.populated.clone())?);
        }
        port.open_session(&inbound, request.ip)?;
        self.inbound = Some(inbound);
        Ok(Prepared {
            ip: nic.address(),
            mac: nic.mac,
            mtu: nic.mtu,
            single_buffer: !port.binding().multi_buffer,
            port: port.data_port(),
            window,
            transport: port.describe(),
        })
    }

    fn feedback_sockets(
        &self,
        nic: &crate::network::Nic,
        request: &Prepare,
    ) -> Result<LaneFeedback, MigrationError> {
        request
            .feedback_ports
            .iter()
            .map(|&port| {
                let socket = UdpSocket::bind(SocketAddr::new(nic.address(), 0))?;
                socket.set_nonblocking(true)?;
                socket.connect(SocketAddr::new(request.ip, port))?;
                Ok(socket)
            })
            .collect::<std::io::Result<_>>()
            .map(LaneFeedback)
            .map_err(|error| {
                MigrationError::Host(format!(
                    "{} cannot be reached from {}: {error}; the migration NICs need addresses of one network, or routes",
                    request.ip, nic.name
                ))
            })
    }
}

/// Whether what waits here is the same machine as the one that runs there.
fn fits(request: &Prepare, facts: &VmFacts) -> Result<(), MigrationError> {
    if request.machine != facts.machine {
        return Err(MigrationError::Mismatch(format!(
            "the VM's machine type is {} at the source and {} here: give the same -machine in both definitions (QEMU {} and {})",
            request.machine, facts.machine, request.vmm_version, facts.version
        )));
    }
    if request.backends != facts.backends {
        let list = |backends: &[crate::memory::Backend]| {
            let parts: Vec<String> = backends
                .iter()
                .map(|backend| format!("{} of {} MiB", backend.id, backend.size >> 20))
                .collect();
            parts.join(", ")
        };
        return Err(MigrationError::Mismatch(format!(
            "the VM's RAM differs: {} at the source, {} here: give the same -m and memory backends in both definitions",
            list(&request.backends),
            list(&facts.backends)
        )));
    }
    Ok(())
}

/// Whether this host can take `needed` bytes now.
fn enough_memory(needed: u64, total: u64) -> Result<(), MigrationError> {
    let available = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        })
        .map(|kib| kib * 1024);
    match available {
        Some(available) if available < needed + HEADROOM => Err(MigrationError::Host(format!(
            "not enough memory: the VM has {} MiB of its {} MiB in use, and this host has {} MiB free; free some, or migrate to \
             another host",
            needed >> 20,
            total >> 20,
            available >> 20
        ))),
        _ => Ok(()),
    }
}

/// Whether the file systems that hold the RAM files have room for `needed` bytes. They were emptied just now.
fn enough_room(needed: u64, mappings: &[Mapping]) -> Result<(), MigrationError> {
    // Backends mostly share one file system; when they do not, the largest must do for the check.
    let room = mappings
        .iter()
        .filter_map(|mapping| rustix::fs::fstatvfs(mapping.file()).ok())
        .max_by_key(|v| v.f_bavail);
    let (Some(room), Some(first)) = (room, mappings.first()) else { return Ok(()) };
    let available = room.f_bavail * room.f_frsize;
    // A tmpfs without a limit says 0 blocks in all.
    if room.f_blocks > 0 && available < needed {
        return Err(MigrationError::Host(format!(
            "no room for the VM's RAM: {} MiB are in use at the source, and the file system of {} has {} MiB free; enlarge it \
             (mount -o remount,size=…) or free some",
            needed >> 20,
            first.path().display(),
            available >> 20
        )));
    }
    Ok(())
}

/// Takes the memory of `chunks` beside the first round: first touch is what costs, and the receive worker has
/// time to spare.
fn reserve(inbound: &Arc<Inbound>, chunks: Vec<(u64, u64)>) -> Result<JoinHandle<()>, MigrationError> {
    let inbound = Arc::clone(inbound);
    std::thread::Builder::new()
        .name("reserve".into())
        .spawn(move || inbound.reserve(chunks.into_iter().flat_map(|(start, end)| start..end)))
        .map_err(|error| MigrationError::Host(format!("no thread to reserve memory: {error}")))
}

impl DestinationHost for IncomingHost {
    type Vm = QemuDestination;

    fn admit(&mut self, request: &Prepare) -> Result<(), MigrationError> {
        let definition = VmDefinition::read(&self.agent.config.vms_dir, &request.vm)
            .map_err(|error| MigrationError::Host(error.to_string()))?;
        self.agent.settlements.free(&request.vm)?;
        {
            let mut arriving = self.agent.arriving();
            if arriving.contains(&request.vm) {
                return Err(MigrationError::Host(format!("VM {} is already arriving here", request.vm)));
            }
            arriving.push(request.vm.clone());
        }
        self.listed = Some(request.vm.clone());
        self.definition = Some(definition);
        self.session = Some(Session {
            session: request.session,
            id: request.id.clone(),
            vm: request.vm.clone(),
            peer: Some(SocketAddr::new(self.peer, request.control_port)),
            keep_source: false,
            ram: Vec::new(),
        });
        Ok(())
    }

    async fn record(&mut self, record: DestinationRecord) -> Result<Recorded, MigrationError> {
        let session = self.session.clone().ok_or_else(unprepared)?;
        let number = session.session;
        let write = self.agent.write_journal(move |journal| match record {
            DestinationRecord::Waiting => journal.wait(session).map(|()| Recorded::Written),
            DestinationRecord::Accepted => journal.decide(number, Verdict::Accepted),
            DestinationRecord::Refused => journal.revoke(number).map(|()| Recorded::Written),
            DestinationRecord::End(verdict) => journal.conclude(number, verdict).map(|()| Recorded::Written),
        });
        write.await
    }

    async fn prepare(
        &mut self,
        request: &Prepare,
    ) -> Result<(Prepared, QemuDestination), Unprepared<QemuDestination>> {
        let definition = self.definition.take().ok_or_else(unprepared)?;
        let config = &self.agent.config;
        let vm = QemuDestination::launch(&definition, &config.state_dir, config.limits.vmm()).await?;
        match self.receive_into(&vm, &definition, request).await {
            Ok(prepared) => Ok((prepared, vm)),
            Err(error) => Err(Unprepared { error, vm: Some(vm) }),
        }
    }

    async fn probes(&mut self, sent: u32) -> u64 {
        let Ok(inbound) = self.inbound() else { return 0 };
        let deadline = Instant::now() + PROBE_WAIT;
        loop {
            let came = inbound.counters().probes.load(Ordering::Relaxed);
            if came >= u64::from(sent) || Instant::now() > deadline {
                inbound.counters().probes.store(0, Ordering::Relaxed);
                return came;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn close_round(
        &mut self,
        epoch: u32,
        frames: &[u32],
        last: bool,
    ) -> Result<Vec<LaneLosses>, MigrationError> {
        let inbound = Arc::clone(self.inbound()?);
        let expected: u64 = frames.iter().map(|&frames| u64::from(frames)).sum();
        tokio::task::block_in_place(|| {
            wait_for_frames(&inbound, expected, if last { QUIET_LAST } else { QUIET })
        });
        let received = self.agent.port.close_epoch(inbound.session(), epoch).await;
        inbound.reset_arrived();
        if let Some(failure) = inbound.take_failure() {
            return Err(failure.into());
        }
        Ok(losses(frames, &received))
    }

    async fn refresh_hashes(&mut self) -> Result<(), MigrationError> {
        let inbound = self.inbound()?;
        if let Some(hashes) = inbound.hashes() {
            tokio::task::block_in_place(|| hashes.refresh(inbound.layout(), inbound.mappings()));
        }
        Ok(())
    }

    async fn digest(&mut self, full: bool) -> Result<Digest, MigrationError> {
        let inbound = self.inbound()?;
        let kept = inbound.hashes().ok_or_else(|| MigrationError::Host("no hashes were kept".into()))?;
        if !full {
            return Ok(kept.digest());
        }
        tokio::task::block_in_place(|| {
            let mut existing = PageSet::new(inbound.layout().pages());
            for (index, mapping) in inbound.mappings().iter().enumerate() {
                let first = inbound.layout().first_page(index);
                for extent in data_extents(mapping.file(), mapping.path())? {
                    existing.insert_range(first + extent.start, first + extent.end);
                }
            }
            let hashes = PageHashes::zeroed(inbound.layout().pages());
            hashes.mark_all_stale(&existing);
            hashes.refresh(inbound.layout(), inbound.mappings());
            Ok(hashes.digest())
        })
    }

    fn progress(&self) -> u64 {
        self.inbound.as_ref().map_or(0, |inbound| inbound.counters().frames.load(Ordering::Relaxed))
    }

    async fn close_stream(&mut self) {
        // The mappings stay for the digest; no frame is placed any more.
        if let Some(inbound) = &self.inbound {
            inbound.close();
            self.agent.port.close_session(inbound.session()).await;
        }
        if let Some(reserver) = self.reserver.take() {
            // It looks at the closing after every 2 MiB. A panic in it has been printed.
            let _ = tokio::task::block_in_place(|| reserver.join());
        }
    }

    fn announce(&mut self) -> (u32, u32) {
        let Some(mut announcer) = self.announcer.take() else { return (0, 0) };
        let schedule = self.agent.config.announce;
        let sent = announcer.announce();
        match announcer.repeat(schedule) {
            Ok(_) => (sent, schedule.rounds.max(1) * self.nics),
            Err(error) => {
                tracing::warn!(%error, "announcements are not repeated");
                (sent, sent)
            }
        }
    }

    async fn settle(&mut self, session: u64) -> Result<Verdict, MigrationError> {
        let answer = self.agent.write_journal(move |journal| journal.asked_by_source(session)).await?;
        answer
            .ok_or_else(|| MigrationError::Host("whose the VM is, is just being found out: ask again".into()))
    }

    async fn claim(&mut self, session: u64, whole: bool) -> Result<Verdict, MigrationError> {
        let answer =
            self.agent.write_journal(move |journal| journal.claimed_by_destination(session, whole)).await?;
        answer.ok_or_else(|| MigrationError::Host("whose the VM is, is not known here: ask again".into()))
    }

    fn give_back(&mut self) {
        std::mem::take(&mut self.ram).empty();
    }

    fn keep(&mut self, vm: QemuDestination) {
        self.ram = RamFiles::default();
        vm.hand_over();
    }
}

fn unprepared() -> MigrationError {
    MigrationError::Host("no migration was prepared".into())
}

/// Waits until `expected` frames have come, or none has come for `quiet`.
fn wait_for_frames(inbound: &Inbound, expected: u64, quiet: Duration) {
    let mut arrived = inbound.arrived();
    let mut since = Instant::now();
    while arrived < expected {
        std::thread::sleep(Duration::from_micros(50));
        let now = inbound.arrived();
        if now != arrived {
            arrived = now;
            since = Instant::now();
        } else if since.elapsed() > quiet {
            return;
        }
    }
}

impl From<VmmError> for super::AgentError {
    fn from(error: VmmError) -> Self {
        Self::Migration(error.into())
    }
}
