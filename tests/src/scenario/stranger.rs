//! Somebody on the migration network who sends to the data port what does not belong there.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use migrate_common::wire::{HEADER_LEN, MAGIC, VERSION};

use crate::lab::plan::{MIGRATION_NIC, MIGRATION_PORT, PREFIX_LEN, Side};
use crate::lab::{Lab, netns};
use crate::probe::Workers;

use super::link::ip;

/// The stranger's address. It has no NIC of its own, but the agents do not know it.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 66);
/// Between two datagrams.
const INTERVAL: Duration = Duration::from_millis(2);

/// A kind of datagram, and what the agent is to count it as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Junk {
    /// Text.
    Garbage,
    /// Half a header.
    Truncated,
    /// A header that promises more than follows.
    Short,
    /// A header of a version to come.
    FutureVersion,
    /// A header with an unknown kind of frame.
    UnknownKind,
    /// A sound frame of a migration that there is not.
    UnknownSession,
}

impl Junk {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Garbage,
        Self::Truncated,
        Self::Short,
        Self::FutureVersion,
        Self::UnknownKind,
        Self::UnknownSession,
    ];

    /// The agent's name for the reason to drop it.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Garbage => "bad-magic",
            Self::Truncated | Self::Short => "truncated",
            Self::FutureVersion => "bad-version",
            Self::UnknownKind => "malformed",
            Self::UnknownSession => "unknown-session",
        }
    }

    /// The datagram.
    pub fn bytes(self) -> Vec<u8> {
        let mut header = vec![0; HEADER_LEN];
        // Magic, version, kind 2: a probe.
        header[..4].copy_from_slice(&MAGIC);
        header[4..6].copy_from_slice(&[VERSION, 2]);
        header[8..16].fill(0x5a);
        match self {
            Self::Garbage => {
                return b"GET / HTTP/1.1\r\nHost: the wrong port, and long enough\r\n\r\n".to_vec();
            }
            Self::Truncated => header.truncate(HEADER_LEN / 2),
            Self::Short => header[28..32].copy_from_slice(&4096u32.to_le_bytes()),
            Self::FutureVersion => header[4] = VERSION + 1,
            Self::UnknownKind => header[5] = 77,
            Self::UnknownSession => {}
        }
        header
    }
}

/// Sends all kinds of junk until it is dropped.
pub struct Stranger {
    rounds: Arc<AtomicU64>,
    _workers: Workers,
}

impl Stranger {
    /// Appears on the migration link at `side`'s end and sends to the other host.
    ///
    /// # Errors
    /// If it cannot have an address there.
    pub fn start(lab: &Lab, side: Side) -> Result<Self> {
        let namespace = lab.host(side).namespace();
        ip(&namespace, &format!("address add {ADDRESS}/{PREFIX_LEN} dev {MIGRATION_NIC}"))?;
        let socket = netns::inside(&namespace, || {
            let socket = UdpSocket::bind(SocketAddr::from((ADDRESS, 0))).context("binding a UDP socket")?;
            let target = SocketAddr::from((side.other().migration_ip(), MIGRATION_PORT));
            socket.connect(target).with_context(|| format!("connecting to {target}"))?;
            Ok(socket)
        })?;
        let rounds = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&rounds);
        let mut workers = Workers::new();
        workers.start("stranger", move |stop| {
            while !stop.load(Ordering::Relaxed) {
                for junk in Junk::ALL {
                    // A full queue is as good as a frame that gets lost.
                    let _ = socket.send(&junk.bytes());
                    thread::sleep(INTERVAL);
                }
                counter.fetch_add(1, Ordering::Relaxed);
            }
        })?;
        Ok(Self { rounds, _workers: workers })
    }

    /// How many datagrams of each kind it sent so far.
    pub fn sent(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }
}
