//! What goes over the migration network, as somebody sees who has the switch.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Result;
use migrate_common::locate;
use migrate_common::wire::{FrameHeader, FrameKind, HEADER_LEN};

use crate::lab::plan::{INTRUDER_NIC, MIGRATION_PORT};
use crate::lab::{lock, wait_for};
use crate::probe::Workers;
use crate::wire::PacketNic;

use super::Stream;

/// Frames that are kept of each epoch, as many of the last.
const KEPT: usize = 64;
/// Longest frame, bytes.
const ROOM: usize = 65_536 + 64;
/// How late the end is noticed.
const LOOK: Duration = Duration::from_millis(20);
/// What a feedback datagram begins with.
const FEEDBACK: &[u8] = b"XFBK";
/// Ethernet, IPv4 without options, UDP.
const HEADERS: usize = 14 + 20 + 8;

/// A frame as it was seen.
#[derive(Clone, Debug)]
pub struct Sniffed {
    /// All of it.
    pub frame: Vec<u8>,
}

impl Sniffed {
    /// The UDP datagram's payload.
    pub fn payload(&self) -> &[u8] {
        // What is kept is IPv4 without options or tags.
        let len = usize::from(u16::from_be_bytes([self.frame[38], self.frame[39]]));
        let end = (HEADERS + len.saturating_sub(8)).min(self.frame.len());
        &self.frame[HEADERS..end]
    }

    /// UDP ports.
    pub fn ports(&self) -> (u16, u16) {
        let port = |at: usize| u16::from_be_bytes([self.frame[at], self.frame[at + 1]]);
        (port(34), port(36))
    }
}

#[derive(Default)]
struct Booty {
    /// The header seen last.
    header: Option<FrameHeader>,
    /// The first frames of each epoch.
    first: BTreeMap<u32, Vec<Sniffed>>,
    /// The last ones, in no order.
    last: Vec<Sniffed>,
    /// Page frames so far.
    frames: u64,
    feedback: Vec<Sniffed>,
    /// Feedback so far.
    datagrams: u64,
}

/// Listens at the intruder's NIC until it is dropped.
pub struct Sniffer {
    booty: Arc<Mutex<Booty>>,
    _workers: Workers,
}

impl Sniffer {
    pub(super) fn start(namespace: &str) -> Result<Self> {
        let nic = PacketNic::open(namespace, INTRUDER_NIC)?;
        let booty = Arc::new(Mutex::new(Booty::default()));
        let shared = Arc::clone(&booty);
        let mut workers = Workers::new();
        workers.start("sniffer", move |stop| {
            let mut room = vec![0; ROOM];
            while !stop.load(Ordering::Relaxed) {
                match nic.receive(&mut room) {
                    Ok(Some(len)) => lock(&shared).take(&room[..len]),
                    _ => nic.wait(LOOK),
                }
            }
        })?;
        Ok(Self { booty, _workers: workers })
    }

    /// Waits until it has seen `frames` page frames and `datagrams` of feedback.
    ///
    /// # Errors
    /// If they do not come.
    pub fn wait(&self, frames: u64, datagrams: u64, limit: Duration) -> Result<()> {
        wait_for("frames to sniff", limit, || {
            let booty = lock(&self.booty);
            Ok((booty.frames >= frames && booty.datagrams >= datagrams).then_some(()))
        })
    }

    /// The migration that was seen last.
    pub fn stream(&self) -> Option<Stream> {
        lock(&self.booty).header.map(|header| Stream { header })
    }

    /// Page frames of epochs before the last.
    pub fn old(&self) -> Vec<Sniffed> {
        let booty = lock(&self.booty);
        let last = booty.header.map_or(0, |header| header.epoch);
        booty
            .first
            .iter()
            .filter(|(epoch, _)| **epoch < last)
            .flat_map(|(_, frames)| frames.clone())
            .collect()
    }

    /// The page frames seen last.
    pub fn latest(&self) -> Vec<Sniffed> {
        lock(&self.booty).last.clone()
    }

    /// Feedback seen last.
    pub fn feedback(&self) -> Vec<Sniffed> {
        lock(&self.booty).feedback.clone()
    }
}

impl Booty {
    fn take(&mut self, frame: &[u8]) {
        if let Some(header) = page_header(frame) {
            if header.kind != FrameKind::Pages {
                return;
            }
            if self.header.is_some_and(|last| last.session != header.session) {
                self.first.clear();
            }
            self.header = Some(header);
            let sniffed = Sniffed { frame: frame.to_vec() };
            let first = self.first.entry(header.epoch).or_default();
            if first.len() < KEPT {
                first.push(sniffed.clone());
            }
            keep(&mut self.last, self.frames, sniffed);
            self.frames += 1;
        } else if frame.get(HEADERS..HEADERS + FEEDBACK.len()) == Some(FEEDBACK) {
            keep(&mut self.feedback, self.datagrams, Sniffed { frame: frame.to_vec() });
            self.datagrams += 1;
        }
    }
}

/// Keeps the last [`KEPT`].
fn keep(list: &mut Vec<Sniffed>, number: u64, sniffed: Sniffed) {
    if list.len() < KEPT {
        list.push(sniffed);
    } else {
        list[number as usize % KEPT] = sniffed;
    }
}

fn page_header(frame: &[u8]) -> Option<FrameHeader> {
    let at = locate::datagram(frame, MIGRATION_PORT).filter(|found| found.payload_offset == HEADERS)?;
    let bytes: &[u8; HEADER_LEN] = frame.get(at.payload_offset..)?.first_chunk()?;
    FrameHeader::parse(bytes).ok()
}
