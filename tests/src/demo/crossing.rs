//! One migration with everything that watches it.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use super::args::Guest;
use super::checks::Checks;
use super::vm::serial;
use crate::lab::plan::{ECHO_PORT, SWITCH_BRIDGE, UPLINK, VM_IP, VM_MAC, VM_MAC_BYTES, VM_NAME};
use crate::lab::{Lab, Report, Side, wait_for};
use crate::probe::{
    Mark, PingProbe, RarpCapture, TcpStreamProbe, VmEvent, VmWatch, fdb_port, owner_count, send_rarp,
};

/// How long a migration may take before the demo gives it up.
const MIGRATION_LIMIT: Duration = Duration::from_secs(300);
/// How long the VM's services may take to be there after the guest is up.
const SERVICE_LIMIT: Duration = Duration::from_secs(20);
/// How long the guest may take to show that it goes on.
const PROGRESS_LIMIT: Duration = Duration::from_secs(20);
/// How long it may take to have looked at all its memory. A sweep takes a second, on a busy host a few.
const SWEEP_LIMIT: Duration = Duration::from_secs(60);
/// So many more completed sweeps mean that every page was verified since: the first may have begun before.
const SWEEPS: u64 = 2;
/// How long the source's QEMU may take to end after the migration.
const SOURCE_END_LIMIT: Duration = Duration::from_secs(10);
/// A TCP stream that lost segments needs a few doubled retransmission times.
const TCP_LIMIT: Duration = Duration::from_secs(10);
/// Announcements come at most 550 ms apart.
const RARP_QUIET: Duration = Duration::from_millis(700);
const RARP_LIMIT: Duration = Duration::from_secs(10);

/// The probes that watch the VM for as long as it lives.
pub struct Watch<'a> {
    lab: &'a Lab,
    network: Option<Network>,
    rarp: RarpCapture,
    /// QEMU on host-a and on host-b.
    vms: [VmWatch; 2],
}

/// What the client does with a guest that has a network.
struct Network {
    ping: PingProbe,
    tcp: TcpStreamProbe,
}

/// What came of a migration.
#[derive(Clone, Debug, Serialize)]
pub struct Migration {
    /// Where the VM was.
    #[serde(skip)]
    pub source: Side,
    /// What the agents say.
    pub report: Report,
    /// What the lab saw.
    pub checks: Checks,
}

impl Migration {
    /// Whether everything holds.
    pub fn holds(&self) -> bool {
        self.checks.verdicts(&self.report, self.source).iter().all(|verdict| verdict.holds)
    }

    /// Whether the VM is on the destination for sure, so that it can go on from there.
    pub fn arrived(&self) -> bool {
        let checks = &self.checks;
        checks.counter_continues && checks.source_gone && checks.owner_count == 1
    }
}

impl<'a> Watch<'a> {
    /// Starts the probes; the VM is up on host-a.
    pub fn start(lab: &'a Lab, guest: Guest) -> Result<Self> {
        let client = lab.layout().client();
        let network = match guest {
            Guest::Linux => Some(Network::start(&client)?),
            Guest::Bare => {
                // It never sends a frame: somebody must tell the switch where it is.
                send_rarp(&lab.a.namespace(), UPLINK, VM_MAC_BYTES)?;
                None
            }
        };
        let watch = |side| VmWatch::start(lab.host(side).vm_paths().lab_qmp);
        Ok(Self {
            lab,
            network,
            rarp: RarpCapture::start(&client, VM_MAC_BYTES)?,
            vms: [watch(Side::A)?, watch(Side::B)?],
        })
    }

    /// Migrates away from `source` with `xferry migrate` and `options`, whose output is shown, and looks at what
    /// came of it.
    ///
    /// # Errors
    /// If there is no report to judge; a migration that went wrong but has one is no error.
    pub fn migrate(&self, source: Side, options: &[&str]) -> Result<Migration> {
        let before = self.before(source)?;
        let command = ["migrate", VM_NAME, "--to", source.other().name()];
        let command: Vec<&str> = command.into_iter().chain(options.iter().copied()).collect();
        let status = self.lab.host(source).xferry_shown(&command, MIGRATION_LIMIT)?;
        let report = self.lab.host(source).report(None);
        let report = report.with_context(|| format!("`xferry {}` ended with {status}", command.join(" ")))?;
        if before.report_id.is_some() && before.report_id.as_deref() == report.text("/id") {
            bail!(
                "`xferry {}` ended with {status} and left no report of its own\n{}",
                command.join(" "),
                self.lab.host(source).agent_tail()
            );
        }
        let completed = report.status() == Some("completed");
        let checks = self.look(source, &before, completed)?;
        // A command that says otherwise than its report would be as wrong as a failed migration.
        if status.success() != completed {
            bail!(
                "`xferry {}` ended with {status}, but its report says {:?}",
                command.join(" "),
                report.status()
            );
        }
        Ok(Migration { source, report, checks })
    }

    fn before(&self, source: Side) -> Result<Before> {
        self.rarp.wait_quiet(RARP_QUIET, RARP_LIMIT)?;
        Ok(Before {
            at: SystemTime::now(),
            ping: self.network.as_ref().map(|network| network.ping.mark()),
            fdb: self.fdb()?,
            // Without an earlier migration there is no report, which the command says by failing.
            report_id: self
                .lab
                .host(source)
                .report(None)
                .ok()
                .and_then(|report| Some(report.text("/id")?.to_owned())),
        })
    }

    /// Without a `completed` migration it does not wait for what will not come.
    fn look(&self, source: Side, before: &Before, completed: bool) -> Result<Checks> {
        let patience = |limit: Duration| if completed { limit } else { Duration::ZERO };
        let mut checks = Checks { fdb_before: before.fdb.clone(), ..Checks::default() };
        checks.source_gone = self.lab.host(source).wait_vm_gone(patience(SOURCE_END_LIMIT)).is_ok();
        if let (Some(network), Some(begin)) = (&self.network, before.ping) {
            checks.tcp_stream_alive = Some(network.tcp.check_alive(TCP_LIMIT).is_ok());
            let figures = network.ping.figures(begin, network.ping.mark());
            checks.pings_sent = Some(figures.sent);
            checks.pings_lost = Some(figures.lost);
            checks.longest_gap_ms = Some(figures.longest_gap.as_secs_f64() * 1000.0);
        }
        self.ask_guest(source, &mut checks, patience);
        self.rarp.wait_quiet(RARP_QUIET, RARP_LIMIT)?;
        checks.fdb_after = self.fdb()?;
        checks.owner_count = owner_count(&self.vms)?;
        let (stop, resume) = self.switchover(source, before.at);
        checks.blackout_seen_ms = stop.zip(resume).map(|(stop, resume)| milliseconds_between(stop, resume));
        let frames = self.rarp.since(before.at);
        checks.rarp_captured = frames.len() as u64;
        checks.rarp_too_early = resume.map(|resume| frames.iter().filter(|&&at| at < resume).count() as u64);
        Ok(checks)
    }

    /// What the guest says of itself: its source's serial line is silent by now, so that has its last word.
    fn ask_guest(&self, source: Side, checks: &mut Checks, patience: impl Fn(Duration) -> Duration) {
        let last = serial(self.lab, source).latest().map(|report| report.count);
        let mut there = serial(self.lab, source.other());
        let continued = wait_for("the guest's counter", patience(PROGRESS_LIMIT), || {
            Ok(there.latest().filter(|report| Some(report.count) > last))
        });
        let Ok(first) = continued else { return };
        checks.counter_continues = true;
        let swept = wait_for("the guest's sweeps", patience(SWEEP_LIMIT), || {
            Ok(there.latest().filter(|report| report.sweeps >= first.sweeps + SWEEPS))
        });
        checks.memory_swept = swept.is_ok();
        checks.guest_errors = there.latest().map(|report| report.errors);
    }

    /// When the VM last stopped on the source and first ran on the destination. The source may have stopped and gone
    /// on several times before, for scans.
    fn switchover(&self, source: Side, since: SystemTime) -> (Option<SystemTime>, Option<SystemTime>) {
        let events = |side: Side| self.vm(side).events_since(since);
        let is = |name: &'static str| move |event: &VmEvent| (event.name == name).then_some(event.at);
        let stop = events(source).iter().rev().find_map(is("STOP"));
        let resume = events(source.other()).iter().find_map(is("RESUME"));
        (stop, resume)
    }

    fn vm(&self, side: Side) -> &VmWatch {
        let [a, b] = &self.vms;
        match side {
            Side::A => a,
            Side::B => b,
        }
    }

    fn fdb(&self) -> Result<Option<String>> {
        fdb_port(&self.lab.layout().switch(), SWITCH_BRIDGE, VM_MAC)
    }
}

impl Network {
    fn start(client: &str) -> Result<Self> {
        let ping = PingProbe::start(client, VM_IP)?;
        ping.wait_answered(SERVICE_LIMIT)?;
        let tcp = TcpStreamProbe::start(client, VM_IP, ECHO_PORT, SERVICE_LIMIT)?;
        Ok(Self { ping, tcp })
    }
}

/// How things were before a migration.
struct Before {
    at: SystemTime,
    ping: Option<Mark>,
    fdb: Option<String>,
    report_id: Option<String>,
}

/// Negative if `later` was earlier.
fn milliseconds_between(earlier: SystemTime, later: SystemTime) -> f64 {
    match later.duration_since(earlier) {
        Ok(span) => span.as_secs_f64() * 1000.0,
        Err(error) => error.duration().as_secs_f64() * -1000.0,
    }
}
