//! The XDP program on the migration NIC.

use std::net::IpAddr;

use aya::{
    Ebpf, EbpfLoader,
    maps::{HashMap, MapData, PerCpuArray, PerCpuHashMap, PerCpuValues, XskMap},
    programs::{ProgramError, Xdp, XdpMode},
};
use migrate_common::maps::{DropReason, Session, SessionCounters};
use serde::Serialize;

use super::{NetworkError, Nic};

/// How the program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttachMode {
    /// In the driver, before an skb exists.
    Driver,
    /// In the generic receive path: works everywhere, slowly.
    Generic,
}

/// Frames to the data port that were dropped for one reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DropCount {
    /// The reason's name.
    pub reason: &'static str,
    /// Frames since the program was attached.
    pub frames: u64,
}

/// The attached program and its maps. Detached when dropped, also by the death of the process: the
/// attachment is a BPF link held by a descriptor.
pub struct Bouncer {
    interface: String,
    mode: AttachMode,
    sockets: XskMap<MapData>,
    sessions: HashMap<MapData, u64, Session>,
    counters: PerCpuHashMap<MapData, u64, SessionCounters>,
    drops: PerCpuArray<MapData, u64>,
    ebpf: Ebpf,
}

const PROGRAM: &str = "xferry";

impl Bouncer {
    /// Loads the program for UDP port `port` and attaches it: in the driver where that works, else generic.
    ///
    /// # Errors
    /// [`NetworkError::Occupied`] when another program is there, [`NetworkError::Xdp`] for all else.
    pub fn attach(nic: &Nic, port: u16) -> Result<Self, NetworkError> {
        let failed = |step: &'static str| {
            let interface = nic.name.clone();
            move |problem: String| NetworkError::Xdp { interface, step, problem }
        };
        let mut ebpf = EbpfLoader::new()
            .override_global("DATA_PORT", &port, true)
            .load(aya::include_bytes_aligned!(env!("XFERRY_XDP_OBJECT")))
            .map_err(|error| failed("load")(chain(&error)))?;
        let program: &mut Xdp = ebpf
            .program_mut(PROGRAM)
            .ok_or_else(|| failed("load")("the object has no such program".into()))?
            .try_into()
            .map_err(|error: ProgramError| failed("load")(chain(&error)))?;
        program.load().map_err(|error| failed("verify")(chain(&error)))?;
        let mode = attach(program, nic).map_err(|error| match error {
            Refusal::Occupied => NetworkError::Occupied(nic.name.clone()),
            Refusal::Other(problem) => failed("attach")(problem),
        })?;
        let mut take = |name: &'static str| {
            ebpf.take_map(name).ok_or_else(|| failed("maps")(format!("the object has no map {name}")))
        };
        let convert = |error: aya::maps::MapError| failed("maps")(chain(&error));
        Ok(Self {
            interface: nic.name.clone(),
            mode,
            sockets: XskMap::try_from(take("SOCKETS")?).map_err(convert)?,
            sessions: HashMap::try_from(take("SESSIONS")?).map_err(convert)?,
            counters: PerCpuHashMap::try_from(take("COUNTERS")?).map_err(convert)?,
            drops: PerCpuArray::try_from(take("DROPS")?).map_err(convert)?,
            ebpf,
        })
    }

    /// How the program is attached.
    pub fn mode(&self) -> AttachMode {
        self.mode
    }

    /// The loaded object, for its logger.
    pub fn ebpf_mut(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// Redirects the frames that arrive on `queue` to an AF_XDP socket.
    ///
    /// # Errors
    /// [`NetworkError::Xdp`].
    pub fn register_socket(
        &mut self,
        queue: u32,
        socket: std::os::fd::BorrowedFd<'_>,
    ) -> Result<(), NetworkError> {
        use std::os::fd::AsRawFd;
        self.sockets
            .set(queue, socket.as_raw_fd(), 0)
            .map_err(|error| self.failed("register a socket", &error))
    }

    /// Lets frames of migration `session` from `peer` in.
    ///
    /// # Errors
    /// [`NetworkError::Xdp`], for example when the map is full.
    pub fn admit(&mut self, session: u64, peer: IpAddr) -> Result<(), NetworkError> {
        let peer = match peer {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        };
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| self.failed("count CPUs", &error))?;
        let zero = PerCpuValues::try_from(vec![SessionCounters::default(); cpus])
            .map_err(|error| self.failed("make counters", &error))?;
        self.counters.insert(session, zero, 0).map_err(|error| self.failed("add a session", &error))?;
        self.sessions
            .insert(session, Session { peer }, 0)
            .map_err(|error| self.failed("add a session", &error))
    }

    /// Shuts migration `session` out again. Harmless when it is not in.
    pub fn dismiss(&mut self, session: u64) {
        let _ = self.sessions.remove(&session);
        let _ = self.counters.remove(&session);
    }

    /// What was let in of migration `session`, over all CPUs.
    pub fn session_counters(&self, session: u64) -> Option<SessionCounters> {
        let values = self.counters.get(&session, 0).ok()?;
        Some(values.iter().fold(SessionCounters::default(), |sum, cpu| SessionCounters {
            frames: sum.frames + cpu.frames,
            bytes: sum.bytes + cpu.bytes,
        }))
    }

    /// What was dropped, by reason, over all CPUs.
    pub fn drops(&self) -> Vec<DropCount> {
        DropReason::ALL
            .into_iter()
            .map(|reason| DropCount {
                reason: reason.name(),
                frames: self.drops.get(&(reason as u32), 0).map_or(0, |values| values.iter().sum()),
            })
            .collect()
    }

    fn failed(&self, step: &'static str, error: &dyn std::error::Error) -> NetworkError {
        NetworkError::Xdp { interface: self.interface.clone(), step, problem: chain(error) }
    }
}

enum Refusal {
    Occupied,
    Other(String),
}

fn attach(program: &mut Xdp, nic: &Nic) -> Result<AttachMode, Refusal> {
    let mut driver_problem = String::new();
    for (mode, kind) in [(AttachMode::Driver, XdpMode::Driver), (AttachMode::Generic, XdpMode::Skb)] {
        match program.attach_to_if_index(nic.index, kind) {
            Ok(_) => {
                if mode == AttachMode::Generic {
                    tracing::warn!(
                        interface = nic.name,
                        "the driver takes no XDP program ({driver_problem}): generic XDP is used, which is much slower"
                    );
                }
                return Ok(mode);
            }
            Err(error) => {
                let errno = errno(&error);
                if matches!(errno, Some(libc::EBUSY | libc::EEXIST)) {
                    return Err(Refusal::Occupied);
                }
                let problem = chain(&error);
                if mode == AttachMode::Generic {
                    return Err(Refusal::Other(format!(
                        "driver mode: {driver_problem}; generic mode: {problem}"
                    )));
                }
                driver_problem = problem;
            }
        }
    }
    Err(Refusal::Other(driver_problem))
}

fn errno(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut current = Some(error);
    while let Some(error) = current {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return io.raw_os_error();
        }
        current = error.source();
    }
    None
}

/// An error with its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
