//! Reverse ARP as the client sees it: the frames that teach the switch where the VM is.

use std::io::{ErrorKind, Read};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow, bail};
use pnet_datalink::{Channel, Config, NetworkInterface};
use socket2::{Domain, Protocol, Socket, Type};

use super::worker::Workers;
use crate::lab::{lock, netns};

/// EtherType of reverse ARP (RFC 903).
const ETHERTYPE_RARP: u16 = 0x8035;
/// The shortest Ethernet frame, without its checksum.
const FRAME_LEN: usize = 60;
const BROADCAST: [u8; 6] = [0xff; 6];

/// Collects the RARP frames that a namespace receives from one MAC address.
pub struct RarpCapture {
    seen: Arc<Mutex<Vec<SystemTime>>>,
    _workers: Workers,
}

impl RarpCapture {
    /// Starts to capture on all NICs of the namespace; the lab's client has one.
    ///
    /// # Errors
    /// If the packet socket cannot be made.
    pub fn start(namespace: &str, mac: [u8; 6]) -> Result<Self> {
        // The protocol makes the kernel deliver nothing but RARP, so that a busy NIC loses us none.
        let protocol = Protocol::from(i32::from(ETHERTYPE_RARP.to_be()));
        let mut socket = netns::inside(namespace, || {
            Socket::new(Domain::PACKET, Type::RAW, Some(protocol)).context("cannot make a packet socket")
        })?;
        socket.set_read_timeout(Some(Duration::from_millis(100))).context("setting a read time-out")?;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let shared = Arc::clone(&seen);
        let mut workers = Workers::new();
        workers.start("rarp-capture", move |stop| {
            let mut frame = [0; 2048];
            while !stop.load(Ordering::Relaxed) {
                match socket.read(&mut frame) {
                    Ok(len) if is_rarp_from(&frame[..len], mac) => lock(&shared).push(SystemTime::now()),
                    Ok(_) => {}
                    Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                    // Such as "network is down" while the lab is removed: do not spin.
                    Err(_) => thread::sleep(Duration::from_millis(10)),
                }
            }
        })?;
        Ok(Self { seen, _workers: workers })
    }

    /// When frames came, from `since` on.
    pub fn since(&self, since: SystemTime) -> Vec<SystemTime> {
        lock(&self.seen).iter().copied().filter(|&at| at >= since).collect()
    }

    /// Waits until no frame came for `quiet`: announcements go on for a while after a migration, and
    /// must not be taken for those of the next one.
    ///
    /// # Errors
    /// If they do not cease within `limit`.
    pub fn wait_quiet(&self, quiet: Duration, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let last = lock(&self.seen).last().copied();
            // A clock that was set back reads as "just now".
            let silence = last.map_or(quiet, |at| at.elapsed().unwrap_or_default());
            if silence >= quiet {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("RARP frames do not cease within {:.0} s: who sends them?", limit.as_secs_f64());
            }
            thread::sleep(quiet - silence);
        }
    }
}

/// A RARP request for `mac`, as QEMU and the agents announce a VM.
pub fn rarp_frame(mac: [u8; 6]) -> [u8; FRAME_LEN] {
    let mut frame = [0; FRAME_LEN];
    frame[..6].copy_from_slice(&BROADCAST);
    frame[6..12].copy_from_slice(&mac);
    frame[12..14].copy_from_slice(&ETHERTYPE_RARP.to_be_bytes());
    // Ethernet, IPv4, address lengths 6 and 4, operation 3 (request reverse).
    frame[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 3]);
    frame[22..28].copy_from_slice(&mac);
    frame[32..38].copy_from_slice(&mac);
    frame
}

/// Sends one RARP frame from a NIC of the namespace: what teaches the switch the MAC address of a
/// guest that never sends anything itself.
///
/// # Errors
/// If there is no such NIC or it does not send.
pub fn send_rarp(namespace: &str, nic: &str, mac: [u8; 6]) -> Result<()> {
    let sent = netns::inside(namespace, || {
        let interface: NetworkInterface = pnet_datalink::interfaces()
            .into_iter()
            .find(|interface| interface.name == nic)
            .with_context(|| format!("no NIC {nic}"))?;
        let Channel::Ethernet(mut sender, _) = pnet_datalink::channel(&interface, Config::default())? else {
            bail!("{nic} is not an Ethernet NIC");
        };
        let result = sender.send_to(&rarp_frame(mac), None).context("the NIC takes no frame")?;
        result.map_err(|error| anyhow!(error))
    });
    sent.with_context(|| format!("sending RARP from {nic} in namespace {namespace}"))
}

fn is_rarp_from(frame: &[u8], mac: [u8; 6]) -> bool {
    frame.len() >= 14 && frame[6..12] == mac && frame[12..14] == ETHERTYPE_RARP.to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

    #[test]
    fn own_frame_is_recognised() {
        assert!(is_rarp_from(&rarp_frame(MAC), MAC));
    }

    #[test]
    fn other_frames_are_not() {
        let mut arp = rarp_frame(MAC);
        arp[13] = 0x06;
        assert!(!is_rarp_from(&arp, MAC));
        assert!(!is_rarp_from(&rarp_frame([2, 0, 0, 0, 0, 8]), MAC));
        assert!(!is_rarp_from(&rarp_frame(MAC)[..13], MAC));
    }
}
