//! A VM leaves this host: QEMU, its memory and the page stream behind the source's state machine.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{
    Agent, MigrateRequest, Peer,
    port::{LeasedSink, Port},
    ram::RamFiles,
    refuse,
    security::AgentChannel,
    settle,
};
use crate::{
    control::{ControlError, Message, Prepare, Prepared},
    datapath::{
        Endpoint, FrameLayout, FramePath, LaneConfig, LaneLosses, LaneRound, LaneSender, Pages, SendError,
    },
    memory::{
        Access, AtomicPageSet, Digest, DirtyTracker, Injector, Mapping, MemoryError, PageSet, RESERVE_CHUNK,
        RamFile, RamLayout, existing_pages,
    },
    migration::{
        Cancel, Limits, MigrationError, PageStream, RoundSent, Session, SourceHost, SourceMemory,
        SourceMigration, SourcePlan, SourceRecord, Verdict,
    },
    network::Nic,
    preflight::{self, Check, Finding, Outcome, SourceFacts},
    report::Recorder,
    vmm::{MachineFacts, QemuSource, Qmp, QmpError, VmDefinition, VmFacts, inspect},
};

/// First source port of the page stream; each lane has its own, so that the receiver's NIC spreads them.
const FIRST_SOURCE_PORT: u16 = 49_152;
/// Longest predicted blackout when the operator says nothing (QEMU's `downtime-limit`).
const DEFAULT_DOWNTIME_LIMIT: Duration = Duration::from_millis(300);

/// All that is needed to migrate or to check.
struct Departure {
    vm: QemuSource,
    memory: GuestMemory,
    host: OutgoingHost,
    plan: SourcePlan,
    channel: AgentChannel,
}

/// Runs one migration to its end; the report says how it ended.
pub(super) async fn migrate(
    agent: &Arc<Agent>,
    definition: &VmDefinition,
    peer: Peer,
    request: MigrateRequest,
    record: Recorder,
    cancel: Cancel,
) {
    match depart(agent, definition, &peer, &request, &record).await {
        Ok(mut departure) => {
            let Departure { vm, memory, host, plan, channel } = &mut departure;
            SourceMigration::new(vm, memory, host, channel, plan.clone(), record).run(cancel).await;
        }
        Err(findings) => {
            let reason = preflight::refusal(&request.vm, &request.to, &findings);
            refuse(&record, &MigrationError::Preflight(reason.unwrap_or_default()));
        }
    }
}

/// The preflight alone, taken back.
pub(super) async fn check(
    agent: &Arc<Agent>,
    definition: &VmDefinition,
    peer: Peer,
    request: &MigrateRequest,
    record: &Recorder,
) -> Vec<Finding> {
    match depart(agent, definition, &peer, request, record).await {
        Ok(mut departure) => {
            departure.plan.prepare.check_only = true;
            let Departure { vm, memory, host, plan, channel } = &mut departure;
            SourceMigration::new(vm, memory, host, channel, plan.clone(), record.clone()).check().await
        }
        Err(findings) => findings,
    }
}

/// Looks at the VM and at this host, and connects. On error the destination was not asked, and the findings say
/// why.
async fn depart(
    agent: &Arc<Agent>,
    definition: &VmDefinition,
    peer: &Peer,
    request: &MigrateRequest,
    record: &Recorder,
) -> Result<Departure, Vec<Finding>> {
    let limits = agent.config.limits;
    let connect = || agent.security.connect(peer, Some(agent.config.control.listen.ip()), limits);
    let unreachable = |error: ControlError| match error.is_distrust() {
        true => Finding::bad(Check::ControlChannel, error.to_string(), ""),
        false => Finding::unknown(Check::Peer, error.to_string(), ""),
    };
    let (qmp, facts) = match look(definition, limits).await {
        Ok(found) => found,
        Err(finding) => {
            return Err(std::iter::once(finding).chain(connect().await.err().map(unreachable)).collect());
        }
    };
    let quiesced = !facts.direct_nodes.is_empty();
    let backing = preflight::backings(&facts.files);
    let mut findings = preflight::own(&agent.config.name, &facts, &backing);
    let images = preflight::image_facts(facts.pid, facts.machine.disks.clone(), None).await;
    let VmFacts { pid, machine, files, .. } = facts;
    let memory =
        files.map_err(MigrationError::from).and_then(|files| GuestMemory::open(pid, &machine, files));
    let populated = memory.as_ref().ok().map(GuestMemory::populated_chunks).transpose();
    let memory = memory.unwrap_or_else(|error| {
        if !findings.iter().any(|finding| finding.check == Check::RamBacking && finding.refuses()) {
            findings.push(Finding::bad(Check::RamBacking, error.to_string(), ""));
        }
        GuestMemory::none(pid)
    });
    let populated = populated.unwrap_or_else(|error| {
        findings.push(Finding::bad(Check::RamBacking, error.to_string(), ""));
        None
    });
    let session = rand::random();
    let (queues, problem) = match Queues::lease(agent) {
        Ok(queues) => (queues, None),
        Err(error) => (Queues::none(agent), Some(error.to_string())),
    };
    let can_send = problem.is_none();
    let nic = queues.nic.clone();
    let nic_facts = agent.port.facts(nic.mtu);
    findings.push(preflight::sending_nic(&nic_facts, problem));
    record.update(|report| {
        report.session = session;
        let scan = findings.iter().find(|finding| finding.check == Check::DirtyScan);
        // `live` alone: programs compare it. The reason is for a quiesced one.
        report.scan_mode = match scan {
            Some(scan) if quiesced => scan.found.clone(),
            _ => "live".into(),
        };
        report.transport.mode = "af-xdp staged".into();
        report.transport.xdp_mode.clone_from(&nic_facts.xdp_mode);
        report.transport.zero_copy = nic_facts.zero_copy;
        report.transport.mtu = nic.mtu;
        report.transport.lanes = agent.port.lanes();
        report.ram.total = memory.layout.bytes();
        report.ram.page_size = migrate_common::PAGE_SIZE as u64;
    });
    let host = OutgoingHost::new(agent, peer, session, request, &memory, record, queues);
    let feedback_ports = host.feedback_ports().unwrap_or_else(|error| {
        findings.push(Finding::bad(Check::SendingNic, error.to_string(), ""));
        Vec::new()
    });
    // The VM stays here, but what else is in its way is worth knowing.
    preflight::settle(&mut findings, request.force);
    let refused = preflight::outcome(&findings) != Outcome::CanGo;
    let prepare = Prepare {
        session,
        id: record.snapshot().id,
        control_port: agent.config.control.listen.port(),
        vm: definition.name.clone(),
        facts: SourceFacts {
            host: preflight::host_facts(&agent.config.name, nic_facts),
            machine,
            pid,
            backing: backing.unwrap_or_default(),
            images,
        },
        populated: populated.unwrap_or_default(),
        mtu: nic.mtu,
        single_buffer: !agent.port.binding().multi_buffer,
        ip: nic.address(),
        mac: nic.mac,
        feedback_ports,
        verify: request.verify,
        force: request.force,
        check_only: refused,
    };
    let channel = match connect().await {
        Ok(channel) => channel,
        Err(error) => {
            findings.push(unreachable(error));
            return Err(findings);
        }
    };
    Ok(Departure {
        vm: QemuSource::new(definition.name.clone(), qmp, limits.vmm()),
        memory,
        host,
        plan: SourcePlan {
            own_name: agent.config.name.clone(),
            peer_name: request.to.clone(),
            prepare,
            findings,
            certified: channel.peer().cloned(),
            secured: agent.security.finding(channel.peer()),
            can_send,
            quiesced,
            downtime_limit: request.downtime_limit_ms.map_or(DEFAULT_DOWNTIME_LIMIT, Duration::from_millis),
            timeout: request.timeout_s.map(Duration::from_secs),
            keep_source: request.keep_source,
            limits,
        },
        channel,
    })
}

/// The VM's monitor and what it tells.
async fn look(definition: &VmDefinition, limits: Limits) -> Result<(Qmp, VmFacts), Finding> {
    let qmp = Qmp::connect(&definition.qmp, limits.vmm().answer).await.map_err(|error| {
        let found = error.to_string();
        match error {
            // Nobody is there, so nothing can leave.
            QmpError::Connect { .. } => Finding::bad(Check::Monitor, found, ""),
            _ => Finding::unknown(Check::Monitor, found, ""),
        }
    })?;
    match inspect(&qmp).await {
        Ok(facts) => Ok((qmp, facts)),
        Err(error) => Err(Finding::unknown(Check::Monitor, error.to_string(), "")),
    }
}

/// The leaving VM's RAM and its tracker.
struct GuestMemory {
    pid: u32,
    layout: Arc<RamLayout>,
    mappings: Arc<Vec<Mapping>>,
    sent: Arc<AtomicPageSet>,
    files: Option<Vec<RamFile>>,
    /// The same files, open for writing: to empty them when the VM has left.
    emptied_later: RamFiles,
    tracker: Option<DirtyTracker>,
}

impl GuestMemory {
    fn open(pid: u32, machine: &MachineFacts, files: Vec<RamFile>) -> Result<Self, MigrationError> {
        let layout = RamLayout::new(machine.backends.clone());
        let mappings = files
            .iter()
            .map(|file| Mapping::new(file.open(false)?, file.path.clone(), Access::Read))
            .collect::<Result<Vec<_>, _>>()?;
        for (mapping, backend) in mappings.iter().zip(layout.backends()) {
            if mapping.pages() * (migrate_common::PAGE_SIZE as u64) < backend.size {
                return Err(MigrationError::Host(format!(
                    "{} is smaller than memory backend {}: was it truncated under the running VM?",
                    mapping.path().display(),
                    backend.id
                )));
            }
        }
        let emptied_later = RamFiles::open(&files)?;
        Ok(Self {
            pid,
            sent: Arc::new(AtomicPageSet::new(layout.pages())),
            layout: Arc::new(layout),
            mappings: Arc::new(mappings),
            files: Some(files),
            emptied_later,
            tracker: None,
        })
    }

    /// For a VM that stays: no memory at all.
    fn none(pid: u32) -> Self {
        let layout = RamLayout::new(Vec::new());
        Self {
            pid,
            sent: Arc::new(AtomicPageSet::new(0)),
            layout: Arc::new(layout),
            mappings: Arc::default(),
            files: None,
            emptied_later: RamFiles::default(),
            tracker: None,
        }
    }

    /// Ranges of reservation chunks that hold pages, so that the destination can take memory for them early.
    fn populated_chunks(&self) -> Result<Vec<(u64, u64)>, MemoryError> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for (start, end) in existing_pages(&self.layout, &self.mappings)?.runs() {
            let (start, end) = (start / RESERVE_CHUNK, end.div_ceil(RESERVE_CHUNK));
            match ranges.last_mut() {
                Some((_, last)) if start <= *last => *last = end.max(*last),
                _ => ranges.push((start, end)),
            }
        }
        Ok(ranges)
    }
}

impl SourceMemory for GuestMemory {
    async fn begin(&mut self) -> Result<PageSet, MemoryError> {
        tokio::task::block_in_place(|| {
            let files = self.files.take().unwrap_or_default();
            // Our own program, also when its file was replaced since we started.
            let injector = Injector::Helper("/proc/self/exe".into());
            self.tracker = Some(DirtyTracker::install(self.pid, &injector, &self.layout, files)?);
            // After protecting: a page that comes to be from here on is a page that was written.
            existing_pages(&self.layout, &self.mappings)
        })
    }

    async fn take_written(&mut self) -> Result<PageSet, MemoryError> {
        match &mut self.tracker {
            Some(tracker) => tokio::task::block_in_place(|| tracker.take_written()),
            None => Ok(PageSet::new(self.layout.pages())),
        }
    }

    async fn digest(&mut self) -> Result<Digest, MemoryError> {
        tokio::task::block_in_place(|| Digest::of(&self.layout, &self.mappings))
    }

    fn discard(&mut self) -> Result<(), MemoryError> {
        self.emptied_later.try_empty()
    }

    fn release(&mut self) {
        self.tracker = None;
    }
}

/// This host's part: journal, NIC, send queues, feedback sockets.
struct OutgoingHost {
    agent: Arc<Agent>,
    peer: Peer,
    port: Arc<Port>,
    nic: Nic,
    session: Session,
    bandwidth: Option<u64>,
    sinks: Vec<LeasedSink>,
    feedback: Vec<UdpSocket>,
    layout: Arc<RamLayout>,
    mappings: Arc<Vec<Mapping>>,
    sent: Arc<AtomicPageSet>,
    progress: Arc<AtomicU64>,
}

/// What frames leave by.
struct Queues {
    nic: Nic,
    sinks: Vec<LeasedSink>,
    feedback: Vec<UdpSocket>,
}

impl Queues {
    fn lease(agent: &Agent) -> Result<Self, MigrationError> {
        let nic = agent.port.nic()?;
        let sinks = agent.port.lease_senders()?;
        let feedback = sinks
            .iter()
            .map(|_| {
                let socket = UdpSocket::bind(SocketAddr::new(nic.address(), 0))?;
                socket.set_nonblocking(true)?;
                Ok(socket)
            })
            .collect::<std::io::Result<Vec<_>>>()
            .map_err(|error| {
                MigrationError::Host(format!("cannot open a UDP socket on {}: {error}", nic.name))
            })?;
        Ok(Self { nic, sinks, feedback })
    }

    /// None, where the NIC cannot be used.
    fn none(agent: &Agent) -> Self {
        Self { nic: agent.port.nic_at_start().clone(), sinks: Vec::new(), feedback: Vec::new() }
    }
}

impl OutgoingHost {
    fn new(
        agent: &Arc<Agent>,
        peer: &Peer,
        session: u64,
        request: &MigrateRequest,
        memory: &GuestMemory,
        record: &Recorder,
        queues: Queues,
    ) -> Self {
        Self {
            agent: Arc::clone(agent),
            peer: peer.clone(),
            port: Arc::clone(&agent.port),
            nic: queues.nic,
            session: Session {
                session,
                id: record.snapshot().id,
                vm: request.vm.clone(),
                peer: Some(peer.address),
                peer_name: peer.name.clone(),
                keep_source: request.keep_source,
                ram: memory.mappings.iter().map(|mapping| mapping.path().to_owned()).collect(),
            },
            bandwidth: request.bandwidth_mib.map(|mib| mib << 20),
            sinks: queues.sinks,
            feedback: queues.feedback,
            layout: Arc::clone(&memory.layout),
            mappings: Arc::clone(&memory.mappings),
            sent: Arc::clone(&memory.sent),
            progress: Arc::clone(record.progress()),
        }
    }

    fn feedback_ports(&self) -> Result<Vec<u16>, MigrationError> {
        self.feedback
            .iter()
            .map(|socket| socket.local_addr().map(|address| address.port()))
            .collect::<std::io::Result<_>>()
            .map_err(|error| MigrationError::Host(format!("a UDP socket has no address: {error}")))
    }

    /// Ethernet address for frames to `peer`: its own where it is a neighbour, else the gateway's.
    fn next_hop(&self, peer: IpAddr, peer_mac: [u8; 6]) -> Result<[u8; 6], MigrationError> {
        if self.nic.on_link(peer) {
            return Ok(peer_mac);
        }
        crate::network::gateway_mac(&self.nic.name, peer).ok_or_else(|| {
            MigrationError::Host(format!(
                "{peer} is not on the network of {}, and no gateway towards it is known there: give both migration NICs \
                 addresses of one network, or add a route (`ip route add {peer} via … dev {}`) and ping it once",
                self.nic.name, self.nic.name
            ))
        })
    }
}

impl SourceHost for OutgoingHost {
    type Stream = OutgoingStream;

    async fn record(&mut self, record: SourceRecord) -> Result<(), MigrationError> {
        let session = self.session.clone();
        let number = session.session;
        let write = self.agent.write_journal(move |journal| match record {
            SourceRecord::Offer => journal.offer(session),
            SourceRecord::Commit => journal.commit(number),
            SourceRecord::End(verdict) => journal.conclude(number, verdict),
        });
        write.await
    }

    async fn ask(&mut self) -> Option<Verdict> {
        let question = Message::Settle { session: self.session.session };
        let asking = settle::ask_until_answered(&self.agent, &self.peer, question, |_| {});
        tokio::time::timeout(Limits::of(self.agent.config.limits.settle), asking).await.ok()
    }

    async fn open_stream(&mut self, prepared: &Prepared) -> Result<OutgoingStream, MigrationError> {
        let single = !self.port.binding().multi_buffer || prepared.single_buffer;
        let own = Endpoint { mac: self.nic.mac.0, ip: self.nic.address() };
        let peer = Endpoint { mac: self.next_hop(prepared.ip, prepared.mac.0)?, ip: prepared.ip };
        let mtu = self.nic.mtu.min(prepared.mtu);
        let lanes = self.sinks.len();
        let mut senders = Vec::with_capacity(lanes);
        let mut frames = None;
        for (lane, (sink, feedback)) in self.sinks.drain(..).zip(self.feedback.drain(..)).enumerate() {
            let path = FramePath::new(own, peer, FIRST_SOURCE_PORT + lane as u16, prepared.port);
            let layout = FrameLayout::new(mtu, path.is_ipv6(), single)
                .map_err(|error| MigrationError::Path(format!("migration network: {error}")))?;
            frames = Some(layout);
            let config = LaneConfig {
                session: self.session.session,
                lane: lane as u16,
                frames: layout,
                path,
                window: prepared.window,
                bandwidth: self.bandwidth.map(|total| total / lanes as u64),
            };
            senders.push(LaneSender::new(config, sink, feedback));
        }
        let frames = frames.ok_or_else(|| MigrationError::Host("the page stream was opened twice".into()))?;
        Ok(OutgoingStream {
            lanes: senders,
            frames,
            stop: Arc::new(AtomicBool::new(false)),
            rounds: Vec::new(),
            layout: Arc::clone(&self.layout),
            mappings: Arc::clone(&self.mappings),
            sent: Arc::clone(&self.sent),
            progress: Arc::clone(&self.progress),
        })
    }
}

type Lane = LaneSender<LeasedSink, UdpSocket>;

/// The page stream over this host's send queues, a thread for each.
struct OutgoingStream {
    lanes: Vec<Lane>,
    frames: FrameLayout,
    /// Set when nobody waits for the senders any more.
    stop: Arc<AtomicBool>,
    rounds: Vec<LaneRound>,
    layout: Arc<RamLayout>,
    mappings: Arc<Vec<Mapping>>,
    sent: Arc<AtomicPageSet>,
    progress: Arc<AtomicU64>,
}

impl Drop for OutgoingStream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl OutgoingStream {
    /// Runs `work` with the lanes on threads of their own. A caller that goes away leaves them to the stop flag.
    async fn with_lanes<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Vec<Lane>, &AtomicBool) -> Result<T, SendError> + Send + 'static,
    ) -> Result<T, MigrationError> {
        let mut lanes = std::mem::take(&mut self.lanes);
        let stop = Arc::clone(&self.stop);
        let task = tokio::task::spawn_blocking(move || {
            let result = work(&mut lanes, &stop);
            (lanes, result)
        });
        let (lanes, result) =
            task.await.map_err(|error| MigrationError::Host(format!("a sender thread failed: {error}")))?;
        self.lanes = lanes;
        Ok(result?)
    }
}

impl PageStream for OutgoingStream {
    async fn probe(&mut self, count: u32) -> Result<(), MigrationError> {
        let frames = self.frames;
        self.with_lanes(move |lanes, stop| match lanes.first_mut() {
            Some(lane) => lane.probe(frames, count, stop),
            None => Ok(()),
        })
        .await
    }

    async fn send(&mut self, epoch: u32, pages: Arc<PageSet>) -> Result<RoundSent, MigrationError> {
        let (layout, mappings) = (Arc::clone(&self.layout), Arc::clone(&self.mappings));
        let (sent, progress) = (Arc::clone(&self.sent), Arc::clone(&self.progress));
        let rounds = self
            .with_lanes(move |lanes, stop| {
                let view = Pages { layout: &layout, mappings: &mappings, sent: &sent };
                let borders = shares(&pages, lanes.len());
                std::thread::scope(|scope| {
                    let mut work = lanes.iter_mut().zip(borders.windows(2)).map(|(lane, border)| {
                        let (from, to) = (border[0], border[1]);
                        let numbers = pages.iter_from(from).take_while(move |&page| page < to);
                        let progress = &progress;
                        move || lane.send_round(epoch, view, numbers, stop, progress)
                    });
                    // The first lane's work is done by this thread.
                    let own = work.next();
                    let others: Vec<_> = work.map(|work| scope.spawn(work)).collect();
                    let mut rounds = Vec::with_capacity(others.len() + 1);
                    rounds.extend(own.map(|work| work()));
                    for thread in others {
                        rounds.push(thread.join().unwrap_or_else(|_| {
                            Err(SendError::Link(std::io::Error::other("a sender thread panicked")))
                        }));
                    }
                    rounds.into_iter().collect::<Result<Vec<_>, _>>()
                })
            })
            .await?;
        self.rounds = rounds;
        Ok(RoundSent {
            frames: self.rounds.iter().map(|round| round.frames).collect(),
            data_pages: self.rounds.iter().map(|round| round.data_pages).sum(),
            zero_pages: self.rounds.iter().map(|round| round.zero_pages).sum(),
            wire_bytes: self.rounds.iter().map(|round| round.wire_bytes).sum(),
            stalls: self.rounds.iter().map(|round| round.stalls).collect(),
            transit: self.lanes.iter().map(LaneSender::transit).max().unwrap_or_default(),
        })
    }

    fn lost(&mut self, pages: &PageSet, losses: &[LaneLosses]) -> PageSet {
        let mut again = PageSet::new(pages.bound());
        for (index, (lane, round)) in self.lanes.iter_mut().zip(&self.rounds).enumerate() {
            let mut lost = 0;
            for losses in losses.iter().filter(|losses| usize::from(losses.lane) == index) {
                round.lost_pages(losses, pages, &mut again);
                lost += losses.frames();
            }
            lane.on_round(lost);
        }
        again
    }
}

/// Cuts a set into `parts` ranges of page numbers with about as many pages each: `parts + 1` borders.
fn shares(pages: &PageSet, parts: usize) -> Vec<u64> {
    let share = pages.count().div_ceil(parts.max(1) as u64).max(1);
    let mut borders = vec![0];
    if parts > 1 {
        let starts =
            pages.iter().enumerate().filter(|(index, _)| *index > 0 && (*index as u64).is_multiple_of(share));
        borders.extend(starts.map(|(_, page)| page).take(parts - 1));
    }
    borders.resize(parts + 1, pages.bound());
    borders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_every_page_once() {
        let mut pages = PageSet::new(1000);
        (0..1000).filter(|page| page % 7 == 0 || *page > 900).for_each(|page| pages.insert(page));
        for parts in 1..6 {
            let borders = shares(&pages, parts);
            assert_eq!(borders.len(), parts + 1);
            let counts: Vec<usize> =
                borders.windows(2).map(|b| pages.iter_from(b[0]).take_while(|&p| p < b[1]).count()).collect();
            assert_eq!(counts.iter().sum::<usize>() as u64, pages.count());
            assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= parts);
        }
        assert_eq!(shares(&PageSet::new(10), 3), [0, 10, 10, 10]);
    }
}
