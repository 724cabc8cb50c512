//! Telling the switches where the VM lives now.
//!
//! A RARP request with the VM's address as source (what QEMU's `announce_self` and VMware send): every switch
//! on the way learns the port, no host answers it.

use std::{thread::JoinHandle, time::Duration};

use pnet::{
    datalink::{Channel, Config, DataLinkSender},
    packet::{
        arp::{ArpHardwareTypes, ArpOperation, MutableArpPacket},
        ethernet::{EtherTypes, MutableEthernetPacket},
    },
    util::MacAddr,
};
use serde::{Deserialize, Serialize};

use super::{Mac, NetworkError};

/// Length of an announcement: the least an Ethernet frame may have, without its checksum.
const FRAME_LEN: usize = 60;
/// "Request reverse" (RFC 903).
const REVERSE_REQUEST: u16 = 3;

/// When announcements are repeated. The names and defaults are QEMU's (`announce-initial` … of
/// qapi/migration.json): at once, then after `initial` ms, each pause `step` ms longer, `max` ms at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AnnounceSchedule {
    /// First pause, ms.
    pub initial: u64,
    /// Longest pause, ms.
    pub max: u64,
    /// Number of announcements.
    pub rounds: u32,
    /// By how much each pause is longer than the last, ms.
    pub step: u64,
}

impl Default for AnnounceSchedule {
    fn default() -> Self {
        Self { initial: 50, max: 550, rounds: 5, step: 100 }
    }
}

/// Longest pause between announcements, ms.
const LONGEST_PAUSE: u64 = 3_600_000;
/// Most announcements.
const MOST_ROUNDS: u32 = 1000;

impl AnnounceSchedule {
    /// Whether it can be meant. QEMU's own limits are no wider (`migrate_params_check`, migration/options.c).
    ///
    /// # Errors
    /// What is too much.
    pub fn check(&self) -> Result<(), String> {
        for (name, ms) in [("initial", self.initial), ("max", self.max), ("step", self.step)] {
            if ms > LONGEST_PAUSE {
                return Err(format!("{name} is {ms} ms: give at most {LONGEST_PAUSE}"));
            }
        }
        if self.rounds > MOST_ROUNDS {
            return Err(format!("rounds is {}: give at most {MOST_ROUNDS}", self.rounds));
        }
        Ok(())
    }

    /// The pauses between announcements.
    pub fn pauses(&self) -> impl Iterator<Item = Duration> + use<> {
        let this = *self;
        (0..u64::from(this.rounds.saturating_sub(1)))
            .map(move |n| Duration::from_millis((this.initial + n * this.step).min(this.max)))
    }
}

/// The frame that announces `mac`.
pub fn announcement(mac: Mac) -> [u8; FRAME_LEN] {
    let mut bytes = [0; FRAME_LEN];
    let address = MacAddr::from(mac.0);
    if let Some(mut ethernet) = MutableEthernetPacket::new(&mut bytes) {
        ethernet.set_destination(MacAddr::broadcast());
        ethernet.set_source(address);
        ethernet.set_ethertype(EtherTypes::Rarp);
    }
    if let Some(mut rarp) = MutableArpPacket::new(&mut bytes[14..]) {
        rarp.set_hardware_type(ArpHardwareTypes::Ethernet);
        rarp.set_protocol_type(EtherTypes::Ipv4);
        rarp.set_hw_addr_len(6);
        rarp.set_proto_addr_len(4);
        rarp.set_operation(ArpOperation::new(REVERSE_REQUEST));
        rarp.set_sender_hw_addr(address);
        rarp.set_target_hw_addr(address);
    }
    bytes
}

/// Announces a VM's addresses from one uplink each. Opened before the cutover, so that nothing needs to be
/// set up when the VM runs.
pub struct Announcer {
    senders: Vec<(Mac, String, Box<dyn DataLinkSender>)>,
}

impl Announcer {
    /// Opens the uplinks of `(address, interface)` pairs.
    ///
    /// # Errors
    /// [`NetworkError::Announce`] with the interface.
    pub fn open(nics: &[(Mac, String)]) -> Result<Self, NetworkError> {
        let interfaces = pnet::datalink::interfaces();
        let senders = nics
            .iter()
            .map(|(mac, name)| {
                let failed = |source| NetworkError::Announce { interface: name.clone(), source };
                let interface = interfaces
                    .iter()
                    .find(|interface| interface.name == *name)
                    .ok_or_else(|| failed(std::io::Error::other("there is no such interface")))?;
                match pnet::datalink::channel(interface, Config::default()).map_err(failed)? {
                    Channel::Ethernet(sender, _) => Ok((*mac, name.clone(), sender)),
                    _ => Err(failed(std::io::ErrorKind::Unsupported.into())),
                }
            })
            .collect::<Result<_, NetworkError>>()?;
        Ok(Self { senders })
    }

    /// Sends one announcement for every address. Returns how many left.
    pub fn announce(&mut self) -> u32 {
        let mut sent = 0;
        for (mac, interface, sender) in &mut self.senders {
            match sender.send_to(&announcement(*mac), None) {
                Some(Ok(())) => sent += 1,
                Some(Err(error)) => tracing::warn!(%mac, %interface, %error, "announcement not sent"),
                None => tracing::warn!(%mac, %interface, "announcement not sent: no buffer"),
            }
        }
        sent
    }

    /// Goes on announcing by `schedule` (whose first announcement was sent already); the thread returns how
    /// many left.
    pub fn repeat(mut self, schedule: AnnounceSchedule) -> std::io::Result<JoinHandle<u32>> {
        std::thread::Builder::new().name("announce".into()).spawn(move || {
            schedule
                .pauses()
                .map(|pause| {
                    std::thread::sleep(pause);
                    self.announce()
                })
                .sum()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frame_is_a_reverse_arp_request_from_the_vm() {
        let frame = announcement(Mac([0x52, 0x54, 0, 1, 2, 3]));
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[6..12], [0x52, 0x54, 0, 1, 2, 3]);
        assert_eq!(frame[12..14], [0x80, 0x35]);
        assert_eq!(frame[14..22], [0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!(frame[22..28], frame[32..38], "sender and target are the VM");
        assert_eq!(frame[28..32], [0; 4]);
    }

    #[test]
    fn pauses_are_those_of_qemu() {
        let ms = |schedule: AnnounceSchedule| schedule.pauses().map(|p| p.as_millis()).collect::<Vec<_>>();
        assert_eq!(ms(AnnounceSchedule::default()), [50, 150, 250, 350]);
        assert_eq!(
            ms(AnnounceSchedule { rounds: 8, ..Default::default() }),
            [50, 150, 250, 350, 450, 550, 550]
        );
        assert!(ms(AnnounceSchedule { rounds: 0, ..Default::default() }).is_empty());
    }
}
