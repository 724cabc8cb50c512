//! The messages.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::{
    datapath::{Cipher, Codec, LaneLosses, Offer, QueueFigures},
    memory::Digest,
    network::Mac,
    preflight::{Finding, SourceFacts, wall_clock},
};

/// Version of the control protocol. Agents with different ones refuse each other.
pub const PROTOCOL: u32 = 5;

/// How a migration is proved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum VerifyMode {
    /// The destination keeps a hash of every page as it is placed; the source reads all of its RAM, stopped,
    /// after the cutover. Costs no downtime; finds a difference but cannot undo the cutover.
    Hash,
    /// Both sides read all RAM while the VM is stopped, before ownership changes. Costs downtime; a difference
    /// aborts the migration.
    Full,
}

/// What the source asks the destination to make ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Prepare {
    /// Number of this migration, the page stream's session.
    pub session: u64,
    /// Its name for operators.
    pub id: String,
    /// TCP port on which the source's agent answers questions.
    pub control_port: u16,
    /// Name of the VM, the same on both hosts.
    pub vm: String,
    /// What the destination is to compare itself with. The order of the memory backends in it is that of the
    /// page stream.
    pub facts: SourceFacts,
    /// Parts of RAM that exist at the source, as ranges `start..end` of reservation chunks, ascending.
    pub populated: Vec<(u64, u64)>,
    /// Largest IP packet that the source's NIC sends, bytes.
    pub mtu: usize,
    /// Whether the source's NIC takes only frames of a single buffer.
    pub single_buffer: bool,
    /// Address and Ethernet address of the source's migration NIC.
    pub ip: IpAddr,
    /// See `ip`.
    pub mac: Mac,
    /// What the source wants for its pages.
    pub encryption: Offer,
    /// UDP port of the source that hears feedback, one per lane.
    pub feedback_ports: Vec<u16>,
    /// Whether and how to prove the migration.
    pub verify: Option<VerifyMode>,
    /// Whether to go on in spite of findings that may be overridden.
    pub force: bool,
    /// True when the source only wants to know whether it would work, or knows that it would not.
    pub check_only: bool,
}

/// What the destination has made ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Prepared {
    /// Address of the destination's migration NIC.
    pub ip: IpAddr,
    /// Its Ethernet address.
    pub mac: Mac,
    /// Its MTU, bytes.
    pub mtu: usize,
    /// Whether it takes only frames of a single buffer.
    pub single_buffer: bool,
    /// UDP port of its page stream.
    pub port: u16,
    /// Frames that each lane may have on the way.
    pub window: u32,
    /// By what the pages are to be encrypted; `None`: they are not.
    pub cipher: Option<Cipher>,
    /// How packed pages may be packed.
    pub unpacks: Vec<Codec>,
    /// Transport of the receiving side, for the report.
    pub transport: String,
}

/// How the destination finds itself and what would run there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Examined {
    /// Everything, also what is as it should be.
    pub findings: Vec<Finding>,
    /// Where frames can be sent: for the pages of the VM when nothing refuses it and it was not only a check, else
    /// for probes alone. `None` when no frame can be received.
    pub prepared: Option<Prepared>,
}

/// Ownership changes hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// Digest at the source, with [`VerifyMode::Full`].
    pub digest: Option<Digest>,
}

/// The VM runs at the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Running {
    /// Time from the commit's arrival until the vCPUs ran, ms.
    pub resume_ms: f64,
    /// Announcements sent so far.
    pub announced: u32,
    /// Announcements planned in all.
    pub announcements: u32,
    /// Digest of RAM before it ran, with [`VerifyMode::Hash`].
    pub digest: Option<Digest>,
}

/// Everything the agents say to each other, device state apart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Message {
    /// First message of either side.
    Hello {
        /// [`PROTOCOL`] of the sender.
        protocol: u32,
        /// Software version, for messages.
        software: String,
        /// Name of the agent's host.
        name: String,
        /// Its wall clock as it says this, µs since 1970.
        #[serde(default)]
        clock: Option<u64>,
    },
    /// Source: make ready.
    Prepare(Box<Prepare>),
    /// Destination: looked, and made ready unless something refuses the VM.
    Examined(Box<Examined>),
    /// Source: that many probe frames of full size were sent; how many came?
    Probed {
        /// Frames sent.
        frames: u32,
    },
    /// Destination: that many came.
    ProbeResult {
        /// Frames received since the last answer.
        frames: u64,
    },
    /// Source: all frames of `epoch` are on their way.
    RoundEnd {
        /// The epoch.
        epoch: u32,
        /// Frames of each lane.
        frames: Vec<u32>,
        /// Whether the VM is stopped and nothing may be waited for longer than needed.
        last: bool,
        /// How long frames and the word of them took there and back, at most of late, µs.
        transit_us: u64,
    },
    /// Destination: the epoch is closed.
    RoundClosed {
        /// The epoch.
        epoch: u32,
        /// What is missing.
        losses: Vec<LaneLosses>,
        /// What came to each queue since the stream was opened.
        queues: Vec<QueueFigures>,
    },
    /// Source: the device state is complete.
    StateEnd {
        /// Its length in bytes.
        bytes: u64,
    },
    /// Destination: the device state is loaded, the VM is whole and stopped.
    Loaded {
        /// Digest of its RAM before the load, with [`VerifyMode::Full`].
        digest: Option<Digest>,
    },
    /// Source: the VM is yours.
    Commit(Commit),
    /// Destination: it runs.
    Running(Running),
    /// Destination: it began to run, and its VMM died. It must not run again anywhere: its disks may have been written.
    Died {
        /// What is known of it.
        reason: String,
    },
    /// Source: it is over, nothing more follows.
    Done,
    /// Source, after its hello on a new connection: did you take the VM of this session? If not, you never will.
    Settle {
        /// The session.
        session: u64,
    },
    /// Destination, after its hello on a new connection to the source: I took the VM of this session and died before I
    /// wrote that it runs. May it run here?
    Claim {
        /// The session.
        session: u64,
        /// Whether it is here, whole and stopped; if not, the question is only whether it is known to have run here.
        whole: bool,
    },
    /// Answer to either: that is how it stands, for good.
    Settled {
        /// Whether the VM is the destination's.
        accepted: bool,
    },
    /// Either side gives up; the source keeps the VM.
    Abort {
        /// Why, for the operator.
        reason: String,
    },
}

impl Message {
    /// The first message of the agent of host `name`.
    pub fn hello(name: &str) -> Self {
        Self::Hello {
            protocol: PROTOCOL,
            software: env!("CARGO_PKG_VERSION").into(),
            name: name.to_owned(),
            clock: wall_clock(),
        }
    }

    /// Name for error messages.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Hello { .. } => "hello",
            Self::Prepare(_) => "prepare",
            Self::Examined(_) => "examined",
            Self::Probed { .. } => "probed",
            Self::ProbeResult { .. } => "probe-result",
            Self::RoundEnd { .. } => "round-end",
            Self::RoundClosed { .. } => "round-closed",
            Self::StateEnd { .. } => "state-end",
            Self::Loaded { .. } => "loaded",
            Self::Commit(_) => "commit",
            Self::Running(_) => "running",
            Self::Died { .. } => "died",
            Self::Done => "done",
            Self::Settle { .. } => "settle",
            Self::Claim { .. } => "claim",
            Self::Settled { .. } => "settled",
            Self::Abort { .. } => "abort",
        }
    }
}
