//! A VM comes to this host: the waiting QEMU, its memory and the receiving end behind the destination's state
//! machine.

mod reserving;

use std::{
    fs::Metadata,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::unix::fs::MetadataExt,
    sync::{Arc, atomic::Ordering},
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

use migrate_common::PAGE_SIZE;

use super::{
    Agent, announcing,
    ram::RamFiles,
    security::{Place, took_part},
};
use crate::{
    control::{ControlError, Prepare, Prepared},
    datapath::{
        Codec, Feedback, FeedbackKey, FeedbackSocket, FeedbackTx, FrameLayout, Inbound, InboundSpec,
        LaneLosses, Protection, QueueFigures, Secret, agree, losses,
    },
    memory::{Access, Backend, Digest, Mapping, RamFile, RamLayout, Reservation},
    migration::{
        DestinationHost, DestinationRecord, MigrationError, Preparation, Recorded, Role, Session, Unprepared,
        Verdict,
    },
    network::Announcer,
    pki::Certified,
    preflight::{self, Admission, Check, DestinationFacts, Finding, HostFacts, Outcome},
    vmm::{QemuDestination, VmDefinition, VmFacts, VmmError, inspect},
};

/// Without a new frame for this long, the missing ones of a round are taken for lost. Longer where frames take longer.
const QUIET: Duration = Duration::from_millis(20);
/// The same while the VM is stopped: what is lost is sent again at once, so patience costs more than it saves.
const QUIET_LAST: Duration = Duration::from_millis(10);
/// The same once every lane's last frame is here: nothing is on its way any more but what was overtaken.
const QUIET_BEHIND: Duration = Duration::from_millis(2);
/// Longest wait for probe frames.
const PROBE_WAIT: Duration = Duration::from_millis(500);

/// What a connection proves of who opened it; nothing with `insecure = true`.
pub(super) struct Caller {
    /// Whose certificate it showed.
    pub certified: Option<Certified>,
    /// What only the two ends know.
    pub secret: Option<Secret>,
}

/// This host's part of one arriving migration.
pub(super) struct IncomingHost {
    agent: Arc<Agent>,
    inbound: Option<Arc<Inbound>>,
    announcer: Option<Announcer>,
    nics: u32,
    /// Name in the list of arriving VMs.
    listed: Option<String>,
    reservers: Vec<JoinHandle<()>>,
    session: Option<Session>,
    /// What was found out before anything was started.
    admitted: Option<Admitted>,
    /// Emptied if the VM does not come to run here.
    ram: RamFiles,
    /// Address of the host that the VM comes from.
    peer: IpAddr,
    /// What that host has proved to be; `None` with `insecure = true`.
    certified: Option<Certified>,
    /// What only that host and this one know.
    secret: Option<Secret>,
    /// Its place among those who have not yet said who they are.
    place: Option<Place>,
    /// That it may send nothing here, not even probes.
    forbidden: bool,
}

impl Drop for IncomingHost {
    fn drop(&mut self) {
        if let Some(vm) = &self.listed {
            self.agent.arrivals.leave(vm);
        }
    }
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

impl IncomingHost {
    pub fn new(agent: Arc<Agent>, peer: IpAddr, caller: Caller, place: Place) -> Self {
        Self {
            agent,
            certified: caller.certified,
            secret: caller.secret,
            place: Some(place),
            forbidden: false,
            inbound: None,
            announcer: None,
            nics: 0,
            listed: None,
            reservers: Vec::new(),
            session: None,
            admitted: None,
            ram: RamFiles::default(),
            peer,
        }
    }

    /// Number of the session, once there is one.
    pub fn session(&self) -> Option<u64> {
        self.session.as_ref().map(|session| session.session)
    }

    /// Whether who asks may know how a session stands: only its other host, and only in the part that asks this.
    fn may_ask(&self, session: u64, role: Role) -> Result<(), MigrationError> {
        let Some((ours, begun)) = self.agent.journal.begun(session) else {
            // There is no answer then, whoever asks.
            return Ok(());
        };
        let asks = self.certified.as_ref();
        if ours == role && asks.is_none_or(|asks| took_part(&self.agent.config, asks, self.peer, &begun)) {
            return Ok(());
        }
        let who = self.certified.as_ref().map_or_else(|| self.peer.to_string(), |it| it.name.clone());
        tracing::warn!(who, id = begun.id, "asks about a migration that is not its own, and is not told");
        Err(MigrationError::Host(format!("{who} took no such part in this migration: it is not told")))
    }

    fn inbound(&self) -> Result<&Arc<Inbound>, MigrationError> {
        self.inbound.as_ref().ok_or_else(|| MigrationError::Host("no page stream is open".into()))
    }

    /// Makes everything ready for the pages of a VM that may come; on error the caller ends it.
    async fn receive_into(
        &mut self,
        waiting: &mut Waiting,
        request: &Prepare,
    ) -> Result<Prepared, MigrationError> {
        waiting.vm.expect_state().await?;
        let (announcer, nics) = announcing::open(&waiting.uplinks)?;
        (self.announcer, self.nics) = (Some(announcer), nics);
        let mappings = waiting
            .files
            .iter()
            .map(|file| Mapping::new(file.open(true)?, file.path.clone(), Access::Write))
            .collect::<Result<Vec<_>, _>>()?;
        fits(&request.facts.machine.backends, &mappings)?;
        self.ram = RamFiles::open(&waiting.files)?;
        let reservations = mappings.iter().map(Reservation::clear).collect::<Result<Vec<_>, _>>()?;
        let files = mappings.iter().filter_map(|mapping| mapping.file().try_clone().ok()).collect();
        self.agent.arrivals.takes_from(&request.vm, files);
        let layout = RamLayout::new(request.facts.machine.backends.clone());
        // Before memory is taken: an agent that dies now finds it again.
        if let Some(session) = &mut self.session {
            session.ram = waiting.files.iter().map(|file| file.path.clone()).collect();
            let session = session.clone();
            self.agent.write_journal(move |journal| journal.wait(session)).await?;
        }
        let prepared = self.open_session(request, layout, mappings, reservations)?;
        let _placed = self.agent.port.place();
        self.reservers = reserving::start(self.inbound()?, &request.populated, self.agent.port.lanes())?;
        Ok(prepared)
    }

    /// Lets the source's frames in.
    fn open_session(
        &mut self,
        request: &Prepare,
        layout: RamLayout,
        mappings: Vec<Mapping>,
        reservations: Vec<Reservation>,
    ) -> Result<Prepared, MigrationError> {
        let port = &self.agent.port;
        let nic = port.nic()?;
        let ipv6 = request.ip.is_ipv6();
        let single = request.single_buffer || !port.binding().multi_buffer;
        let frames = FrameLayout::new(request.mtu.min(nic.mtu), ipv6, single)
            .map_err(|error| MigrationError::Path(format!("migration network: {error}")))?;
        // Whoever disagrees was told so by a finding, and only probes come.
        let cipher = agree(&request.encryption, &self.agent.config.pages()).unwrap_or_default();
        let protection = Protection::agreed(cipher, self.secret.as_ref(), request.session)?;
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
            queues: port.lanes() as u32,
            lanes: request.feedback_ports.len() as u16,
            protection,
        });
        port.open_session(&inbound, request.ip)?;
        self.inbound = Some(inbound);
        Ok(Prepared {
            ip: nic.address(),
            mac: nic.mac,
            mtu: nic.mtu,
            single_buffer: !port.binding().multi_buffer,
            port: port.data_port(),
            window,
            cipher,
            unpacks: Codec::ALL.to_vec(),
            transport: port.describe(),
        })
    }

    fn feedback_sockets(
        &self,
        nic: &crate::network::Nic,
        request: &Prepare,
    ) -> Result<LaneFeedback, MigrationError> {
        let key = FeedbackKey::agreed(self.secret.as_ref(), request.session)?;
        request
            .feedback_ports
            .iter()
            .map(|&port| {
                let socket = UdpSocket::bind(SocketAddr::new(nic.address(), 0))?;
                socket.set_nonblocking(true)?;
                socket.connect(SocketAddr::new(request.ip, port))?;
                Ok(FeedbackSocket::new(socket, key.clone()))
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

/// The page stream's bounds are those of the source's backends: what is mapped here must reach as far.
fn fits(backends: &[Backend], mappings: &[Mapping]) -> Result<(), MigrationError> {
    let here = mappings.iter().map(Mapping::pages);
    let there = backends.iter().map(|backend| backend.size / PAGE_SIZE as u64);
    if here.eq(there) {
        return Ok(());
    }
    Err(MigrationError::Mismatch(
        "the RAM files here are not as large as the source's memory backends".into(),
    ))
}

/// What is known of a VM that may come, before anything is started.
struct Admitted {
    definition: VmDefinition,
    host: HostFacts,
    admission: Admission,
    /// Bytes that each backend needs.
    needed: Vec<u64>,
}

/// A QEMU that waits.
struct Waiting {
    vm: QemuDestination,
    files: Vec<RamFile>,
    uplinks: Vec<preflight::Uplink>,
    /// When it was not yet started.
    since: SystemTime,
}

impl Waiting {
    /// Removes the RAM files that QEMU made as it started. The next attempt may need another size, and with
    /// `prealloc=on` they hold memory. What was there before is not ours to remove.
    fn forget_ram(&self) {
        for file in self.files.iter().filter(|_| self.vm.is_ours()) {
            // As QEMU sees it: it may have mounts of its own.
            let path = format!("/proc/{}/root{}", file.pid, file.path.display());
            let made_now = || -> Option<bool> {
                let mapped = file.open(false).ok()?.metadata().ok()?;
                let named = std::fs::symlink_metadata(&path).ok()?;
                let inode = |metadata: &Metadata| (metadata.dev(), metadata.ino());
                Some(
                    named.is_file() && inode(&mapped) == inode(&named) && named.created().ok()? >= self.since,
                )
            };
            if made_now() == Some(true)
                && let Err(error) = std::fs::remove_file(&path)
            {
                tracing::warn!(%path, %error, "the RAM file of a VM that does not come stays");
            }
        }
    }
}

/// A QEMU that waits, compared with the source's. `None` where there is none, with the finding that says why.
async fn launch(
    agent: &Agent,
    admitted: Admitted,
    request: &Prepare,
    findings: &mut Vec<Finding>,
) -> Option<Waiting> {
    let config = &agent.config;
    let Admitted { definition, host, admission, needed } = admitted;
    let since = SystemTime::now();
    let launched = QemuDestination::launch(&definition, &config.state_dir, config.limits.vmm()).await;
    let vm = match launched {
        Ok(vm) => vm,
        Err(error) => {
            findings.extend(preflight::not_launched(&request.facts, &host.name, &error.to_string()));
            return None;
        }
    };
    match inspect(vm.qmp()).await {
        Ok(found) => {
            let facts = destination_facts(host, &found, &definition, request, needed).await;
            findings.extend(preflight::after_launch(&request.facts, &facts, &admission));
            let files = found.files.unwrap_or_default();
            Some(Waiting { vm, files, uplinks: facts.uplinks, since })
        }
        Err(error) => {
            findings.extend(preflight::not_launched(&request.facts, &host.name, &error.to_string()));
            Some(Waiting { vm, files: Vec::new(), uplinks: Vec::new(), since })
        }
    }
}

async fn destination_facts(
    host: HostFacts,
    found: &VmFacts,
    definition: &VmDefinition,
    request: &Prepare,
    needed: Vec<u64>,
) -> DestinationFacts {
    let images = Some(request.facts.images_for(&found.machine.disks));
    let macs: Vec<_> = request.facts.machine.nics.iter().map(|nic| nic.mac).collect();
    DestinationFacts {
        host,
        machine: found.machine.clone(),
        pid: found.pid,
        backing: preflight::backings(&found.files),
        reserved: found.reserved,
        needed,
        images: preflight::image_facts(found.pid, found.machine.disks.clone(), images).await,
        uplinks: announcing::uplinks(definition, &macs, found),
    }
}

impl DestinationHost for IncomingHost {
    type Vm = QemuDestination;

    fn greeted(&mut self, name: &str) -> Result<(), MigrationError> {
        self.place = None;
        match &self.certified {
            Some(certified) if !certified.is(name) => {
                Err(ControlError::Name { said: name.to_owned(), certified: certified.name.clone() }.into())
            }
            _ => Ok(()),
        }
    }

    fn admit(&mut self, request: &Prepare) -> Vec<Finding> {
        let agent = Arc::clone(&self.agent);
        let source = &request.facts;
        let name = &agent.config.name;
        // Before anything of this host is told.
        if let Some(certified) = &self.certified
            && let Err(error) = agent.config.may_send(&certified.name)
        {
            self.forbidden = true;
            tracing::warn!(vm = request.vm, %error, "a VM is refused");
            return vec![
                Finding::bad(Check::Admission, error.to_string(), ""),
                preflight::not_compared(name),
            ];
        }
        // A number that is somebody's: whoever says it has listened to the migration network.
        if agent.journal.begun(request.session).is_some() {
            self.forbidden = true;
            tracing::warn!(vm = request.vm, peer = %self.peer, session = request.session, "a VM comes under another one's session");
            let reason = "the session's number is another migration's: try again, with a new one";
            return vec![Finding::bad(Check::Admission, reason, ""), preflight::not_compared(name)];
        }
        let mtu = agent.port.nic().map_or(0, |nic| nic.mtu);
        let host = preflight::host_facts(name, agent.port.facts(mtu));
        let definition = match VmDefinition::read(&agent.config.vms_dir, &request.vm) {
            Ok(definition) => definition,
            Err(error) => return preflight::not_launched(source, name, &error.to_string()),
        };
        if let Err(error) = agent.settlements.free(&request.vm) {
            return vec![
                Finding::bad(Check::Admission, format!("on {name}: {error}"), ""),
                preflight::not_compared(name),
            ];
        }
        let needed = preflight::needed(&request.populated, &source.machine.backends);
        let total = needed.iter().sum();
        let admission = agent.arrivals.enter(&request.vm, request.check_only, total, agent.config.admission);
        if !admission.same {
            self.listed = Some(request.vm.clone());
        }
        let mut findings =
            preflight::before_launch(source, &host, &admission, &needed, definition.preallocates());
        findings.push(preflight::page_encryption(
            (&source.host.name, &request.encryption),
            (name, &agent.config.pages()),
        ));
        if findings.iter().any(Finding::refuses) {
            findings.push(preflight::not_compared(name));
        }
        self.admitted = Some(Admitted { definition, host, admission, needed });
        self.session = Some(Session {
            session: request.session,
            id: request.id.clone(),
            vm: request.vm.clone(),
            peer: Some(SocketAddr::new(self.peer, request.control_port)),
            peer_name: self.certified.as_ref().map(|certified| certified.name.clone()),
            keep_source: false,
            ram: Vec::new(),
        });
        findings
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
    ) -> Result<Preparation<QemuDestination>, Unprepared<QemuDestination>> {
        let admitted = self.admitted.take().ok_or_else(unprepared)?;
        let mut findings = Vec::new();
        let Some(mut waiting) = launch(&self.agent, admitted, request, &mut findings).await else {
            return Ok(Preparation { findings, prepared: None, vm: None });
        };
        preflight::settle(&mut findings, request.force);
        if request.check_only || preflight::outcome(&findings) != Outcome::CanGo {
            waiting.forget_ram();
            return Ok(Preparation { findings, prepared: None, vm: Some(waiting.vm) });
        }
        match self.receive_into(&mut waiting, request).await {
            Ok(prepared) => Ok(Preparation { findings, prepared: Some(prepared), vm: Some(waiting.vm) }),
            Err(error) => Err(Unprepared { error, vm: Some(waiting.vm) }),
        }
    }

    fn hear_probes(&mut self, request: &Prepare, findings: &mut Vec<Finding>) -> Option<Prepared> {
        if self.forbidden {
            return None;
        }
        // Without a page that a frame could be placed in.
        let nowhere = RamLayout::new(Vec::new());
        match self.open_session(request, nowhere, Vec::new(), Vec::new()) {
            Ok(prepared) => Some(prepared),
            Err(error) => {
                findings.push(preflight::path_unproved(&error.to_string(), true));
                None
            }
        }
    }

    async fn probes(&mut self, sent: u32) -> u64 {
        let Ok(inbound) = self.inbound() else { return 0 };
        let begun = Instant::now();
        let mut last = (0, begun);
        loop {
            let came = inbound.counters().probes.load(Ordering::Relaxed);
            if came != last.0 {
                last = (came, Instant::now());
            }
            // One is proof enough, and the others are lost when they do not follow it.
            let limit = if came > 0 { QUIET } else { PROBE_WAIT };
            if came >= u64::from(sent) || last.1.elapsed() > limit {
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
        transit: Duration,
    ) -> Result<Vec<LaneLosses>, MigrationError> {
        let inbound = Arc::clone(self.inbound()?);
        if !inbound.can_be(frames) {
            return Err(MigrationError::Mismatch(format!(
                "a round of {frames:?} frames by lane is more than {} pages take",
                inbound.layout().pages()
            )));
        }
        let quiet = if last { QUIET_LAST } else { QUIET };
        tokio::task::block_in_place(|| wait_for_frames(&inbound, frames, quiet, transit));
        let received = self.agent.port.close_epoch(inbound.session(), epoch).await;
        inbound.reset_arrived();
        if let Some(failure) = inbound.take_failure() {
            return Err(failure.into());
        }
        Ok(losses(frames, &received))
    }

    fn figures(&self) -> Vec<QueueFigures> {
        self.inbound.as_ref().map(|inbound| inbound.figures()).unwrap_or_default()
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
        let read = tokio::task::block_in_place(|| Digest::of(inbound.layout(), inbound.mappings()));
        Ok(read?)
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
        for reserver in self.reservers.drain(..) {
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
        self.may_ask(session, Role::Destination)?;
        let answer = self.agent.write_journal(move |journal| journal.asked_by_source(session)).await?;
        answer
            .ok_or_else(|| MigrationError::Host("whose the VM is, is just being found out: ask again".into()))
    }

    async fn claim(&mut self, session: u64, whole: bool) -> Result<Verdict, MigrationError> {
        self.may_ask(session, Role::Source)?;
        let answer =
            self.agent.write_journal(move |journal| journal.claimed_by_destination(session, whole)).await?;
        answer.ok_or_else(|| MigrationError::Host("whose the VM is, is not known here: ask again".into()))
    }

    fn give_back(&mut self) {
        std::mem::take(&mut self.ram).empty();
        if let Some(vm) = self.listed.take() {
            self.agent.arrivals.leave(&vm);
        }
    }

    fn keep(&mut self, vm: QemuDestination) {
        self.ram = RamFiles::default();
        vm.hand_over();
    }
}

fn unprepared() -> MigrationError {
    MigrationError::Host("no migration was prepared".into())
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

impl From<VmmError> for super::AgentError {
    fn from(error: VmmError) -> Self {
        Self::Migration(error.into())
    }
}
