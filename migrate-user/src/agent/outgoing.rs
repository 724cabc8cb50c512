//! A VM leaves this host: QEMU, its memory and the page stream behind the source's state machine.

mod direct;
mod memory;
mod renewed;
mod stream;

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64},
    },
    time::Duration,
};

use super::{
    Agent, MigrateRequest, Peer,
    link::{Outlet, Target},
    port::Port,
    refuse,
    security::AgentChannel,
    settle,
};
use crate::{
    control::{ControlError, Message, Prepare, Prepared},
    datapath::{
        Bandwidth, Cipher, Compression, Encryption, FeedbackKey, FeedbackSocket, FrameLayout, LaneConfig,
        LaneSender, Protection, Secret, SentHashes, agree_packing,
    },
    memory::{AtomicPageSet, Mapping, RamLayout, TrackedRam},
    migration::{
        Cancel, Convergence, Limits, MigrationError, Session, SourceHost, SourceMigration, SourcePlan,
        SourceRecord, Verdict,
    },
    network::{Nic, Transport},
    preflight::{self, Check, Finding, Outcome, SourceFacts},
    report::Recorder,
    vmm::{QemuSource, Qmp, QmpError, VmDefinition, VmFacts, inspect},
};
use direct::DirectSource;
use memory::GuestMemory;
use stream::OutgoingStream;

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
    bandwidth: Bandwidth,
    cancel: Cancel,
) {
    match depart(agent, definition, &peer, &request, &record, bandwidth).await {
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
    match depart(agent, definition, &peer, request, record, Bandwidth::default()).await {
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
    bandwidth: Bandwidth,
) -> Result<Departure, Vec<Finding>> {
    let limits = agent.config.limits;
    let connect = || agent.security.connect(peer, Some(agent.config.control.listen.ip()), limits);
    let unreachable = |error: ControlError| match error.is_distrust() {
        true => Finding::bad(Check::ControlChannel, error.to_string(), ""),
        false => Finding::unknown(Check::Peer, error.to_string(), ""),
    };
    let (looked, connected) = tokio::join!(look(definition, limits), connect());
    let (qmp, facts) = match looked {
        Ok(found) => found,
        Err(finding) => {
            return Err(std::iter::once(finding).chain(connected.err().map(unreachable)).collect());
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
        report.transport.mode = match nic_facts.transport {
            Transport::AfXdp => "af-xdp staged".into(),
            Transport::Udp => "udp".into(),
        };
        report.transport.fallback.clone_from(&nic_facts.fallback);
        report.transport.xdp_mode.clone_from(&nic_facts.xdp_mode);
        report.transport.zero_copy = nic_facts.zero_copy;
        report.transport.mtu = nic.mtu;
        report.transport.lanes = agent.port.lanes();
        report.compression.mode = request.compression.name().into();
        report.ram.total = memory.layout.bytes();
        report.ram.page_size = migrate_common::PAGE_SIZE as u64;
    });
    let mut host = OutgoingHost::new(agent, peer, session, request, &memory, record, queues);
    host.bandwidth = bandwidth;
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
        encryption: agent.config.pages(),
        feedback_ports,
        verify: request.verify,
        force: request.force,
        check_only: refused,
    };
    let channel = match connected {
        Ok(channel) => channel,
        Err(error) => {
            findings.push(unreachable(error));
            return Err(findings);
        }
    };
    match channel.page_secret() {
        Ok(secret) => host.secret = secret,
        Err(error) => {
            findings.push(unreachable(error));
            return Err(findings);
        }
    }
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
            convergence: Convergence {
                downtime_limit: request
                    .downtime_limit_ms
                    .map_or(DEFAULT_DOWNTIME_LIMIT, Duration::from_millis),
                timeout: request.timeout_s.map(Duration::from_secs),
                timeout_action: request.timeout_action,
                auto_converge: request.auto_converge,
            },
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

/// This host's part: journal, NIC, send queues, feedback sockets.
struct OutgoingHost {
    agent: Arc<Agent>,
    peer: Peer,
    port: Arc<Port>,
    nic: Nic,
    session: Session,
    /// What only the destination and this host know.
    secret: Option<Secret>,
    bandwidth: Bandwidth,
    compression: Compression,
    outlets: Vec<Outlet>,
    feedback: Vec<UdpSocket>,
    layout: Arc<RamLayout>,
    mappings: Arc<Vec<Mapping>>,
    sent: Arc<AtomicPageSet>,
    /// What is tracked of the guest's RAM, once it is.
    tracked: Arc<OnceLock<TrackedRam>>,
    hashes: Option<Arc<SentHashes>>,
    progress: Arc<AtomicU64>,
    direct: DirectSource,
    record: Recorder,
}

/// What frames leave by.
struct Queues {
    nic: Nic,
    outlets: Vec<Outlet>,
    feedback: Vec<UdpSocket>,
}

impl Queues {
    fn lease(agent: &Agent) -> Result<Self, MigrationError> {
        let nic = agent.port.nic()?;
        let outlets = agent.port.outlets()?;
        let feedback = outlets
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
        Ok(Self { nic, outlets, feedback })
    }

    /// None, where the NIC cannot be used.
    fn none(agent: &Agent) -> Self {
        Self { nic: agent.port.nic_at_start().clone(), outlets: Vec::new(), feedback: Vec::new() }
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
            secret: None,
            bandwidth: Bandwidth::default(),
            compression: request.compression,
            outlets: queues.outlets,
            feedback: queues.feedback,
            layout: Arc::clone(&memory.layout),
            mappings: Arc::clone(&memory.mappings),
            sent: Arc::clone(&memory.sent),
            tracked: Arc::clone(&memory.tracked),
            hashes: memory.hashes().map(Arc::new),
            progress: Arc::clone(record.progress()),
            direct: DirectSource::new(agent.config.migration.sending, memory),
            record: record.clone(),
        }
    }

    fn feedback_ports(&self) -> Result<Vec<u16>, MigrationError> {
        self.feedback
            .iter()
            .map(|socket| socket.local_addr().map(|address| address.port()))
            .collect::<std::io::Result<_>>()
            .map_err(|error| MigrationError::Host(format!("a UDP socket has no address: {error}")))
    }

    /// How the pages are guarded, as the destination said: it must be something that this host wants too.
    fn protection(&self, prepared: &Prepared) -> Result<Protection, MigrationError> {
        let own = self.agent.config.pages();
        let wanted = match prepared.cipher {
            None => own.encryption != Encryption::Required,
            Some(cipher) => own.encryption != Encryption::Off && own.ciphers.contains(&cipher),
        };
        if !wanted {
            return Err(MigrationError::Mismatch(format!(
                "the destination wants pages by {}, which this host's `encryption = \"{}\"` and `ciphers` do not allow",
                prepared.cipher.map_or("no encryption", Cipher::name),
                own.encryption.name()
            )));
        }
        Ok(Protection::agreed(prepared.cipher, self.secret.as_ref(), self.session.session)?)
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
        let to = Target { ip: prepared.ip, mac: prepared.mac.0, port: prepared.port };
        let mtu = self.nic.mtu.min(prepared.mtu);
        let frames = FrameLayout::new(mtu, to.ip.is_ipv6(), single)
            .map_err(|error| MigrationError::Path(format!("migration network: {error}")))?;
        if self.outlets.is_empty() {
            return Err(MigrationError::Host("the page stream was opened twice".into()));
        }
        let protection = self.protection(prepared)?;
        self.take_direct(prepared, mtu, &frames);
        let lanes = self.outlets.len();
        let key = FeedbackKey::agreed(self.secret.as_ref(), self.session.session)?;
        let packings = agree_packing(self.compression, &prepared.unpacks)
            .map_err(|error| MigrationError::Mismatch(error.to_string()))?;
        let mut senders = Vec::with_capacity(lanes);
        for (lane, (outlet, feedback)) in self.outlets.drain(..).zip(self.feedback.drain(..)).enumerate() {
            let (sink, path) = outlet.towards(&self.nic, lane as u16, to)?;
            let config = LaneConfig {
                session: self.session.session,
                lane: lane as u16,
                frames,
                path,
                protection: protection.clone(),
                window: prepared.window,
                bandwidth: self.bandwidth.shared_by(lanes),
                packings: packings.clone(),
            };
            senders.push(LaneSender::new(config, sink, FeedbackSocket::new(feedback, key.clone())));
        }
        Ok(OutgoingStream {
            lanes: senders,
            placement: self.agent.port.placement().clone(),
            frames,
            bandwidth: self.bandwidth.clone(),
            stop: Arc::new(AtomicBool::new(false)),
            rounds: Vec::new(),
            layout: Arc::clone(&self.layout),
            mappings: Arc::clone(&self.mappings),
            sent: Arc::clone(&self.sent),
            tracked: Arc::clone(&self.tracked),
            written: None,
            hashes: self.hashes.clone(),
            progress: Arc::clone(&self.progress),
        })
    }
}
