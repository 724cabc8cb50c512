//! A VM comes to this host: the waiting QEMU, its memory and the receiving end behind the destination's state
//! machine.

mod reserving;
mod stream;
mod waiting;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use self::{
    stream::{Memory, Stream},
    waiting::{Admitted, Waiting, launch},
};
use super::{
    Agent, announcing,
    ram::RamFiles,
    security::{Place, took_part},
};
use crate::{
    control::{ControlError, Prepare, Prepared},
    datapath::{LaneLosses, QueueFigures, Secret},
    memory::{Access, Digest, Mapping},
    migration::{
        DestinationHost, DestinationRecord, MigrationError, Preparation, Recorded, Role, Session, Unprepared,
        Verdict,
    },
    network::Announcer,
    pki::Certified,
    preflight::{self, Check, Finding, Outcome},
    vmm::{QemuDestination, VmDefinition, VmmError},
};

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
    stream: Option<Stream>,
    announcer: Option<Announcer>,
    nics: u32,
    /// Name in the list of arriving VMs.
    listed: Option<String>,
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

impl IncomingHost {
    pub fn new(agent: Arc<Agent>, peer: IpAddr, caller: Caller, place: Place) -> Self {
        Self {
            agent,
            certified: caller.certified,
            secret: caller.secret,
            place: Some(place),
            forbidden: false,
            stream: None,
            announcer: None,
            nics: 0,
            listed: None,
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

    fn stream(&self) -> Result<&Stream, MigrationError> {
        self.stream.as_ref().ok_or_else(|| MigrationError::Host("no page stream is open".into()))
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
        let files = mappings.iter().filter_map(|mapping| mapping.file().try_clone().ok()).collect();
        let memory = Memory::new(&request.facts.machine.backends, mappings)?;
        self.ram = RamFiles::open(&waiting.files)?;
        self.agent.arrivals.takes_from(&request.vm, files);
        // Before memory is taken: an agent that dies now finds it again.
        if let Some(session) = &mut self.session {
            session.ram = waiting.files.iter().map(|file| file.path.clone()).collect();
            let session = session.clone();
            self.agent.write_journal(move |journal| journal.wait(session)).await?;
        }
        let (mut stream, prepared) = Stream::open(&self.agent, request, self.secret.as_ref(), memory)?;
        let reserving = stream.reserve(&self.agent.port, &request.populated);
        self.stream = Some(stream);
        reserving.map(|()| prepared)
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
        match Stream::open(&self.agent, request, self.secret.as_ref(), Memory::nowhere()) {
            Ok((stream, prepared)) => {
                self.stream = Some(stream);
                Some(prepared)
            }
            Err(error) => {
                findings.push(preflight::path_unproved(&error.to_string(), true));
                None
            }
        }
    }

    async fn probes(&mut self, sent: u32) -> u64 {
        match &self.stream {
            Some(stream) => stream.probes(sent).await,
            None => 0,
        }
    }

    async fn close_round(
        &mut self,
        epoch: u32,
        frames: &[u32],
        last: bool,
        transit: Duration,
    ) -> Result<Vec<LaneLosses>, MigrationError> {
        self.stream()?.close_round(&self.agent.port, epoch, frames, last, transit).await
    }

    fn figures(&self) -> Vec<QueueFigures> {
        self.stream.as_ref().map(Stream::figures).unwrap_or_default()
    }

    async fn refresh_hashes(&mut self) -> Result<(), MigrationError> {
        self.stream()?.refresh_hashes()
    }

    async fn digest(&mut self) -> Result<Digest, MigrationError> {
        self.stream()?.digest()
    }

    fn progress(&self) -> u64 {
        self.stream.as_ref().map_or(0, Stream::frames)
    }

    async fn close_stream(&mut self) {
        if let Some(stream) = &mut self.stream {
            stream.close(&self.agent.port).await;
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

impl From<VmmError> for super::AgentError {
    fn from(error: VmmError) -> Self {
        Self::Migration(error.into())
    }
}
