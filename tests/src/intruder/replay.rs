//! Ways to send again what was sniffed.

use super::envelope::redress;
use super::{Intruder, Sniffed};
use crate::lab::plan::Side;

/// How a sniffed frame is sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replay {
    /// Bit by bit as it was.
    Unchanged,
    /// Under the intruder's Ethernet address.
    OwnMac,
    /// Under the intruder's Ethernet and IP addresses.
    OwnAddress,
    /// Back to the host it came from, in the name of the one it went to.
    Reflected,
}

impl Replay {
    /// A frame that was seen on its way from `source`, made ready to be sent.
    pub fn frame(self, intruder: &Intruder, sniffed: &Sniffed, source: Side) -> Vec<u8> {
        let (from, to) = (intruder.host(source), intruder.host(source.other()));
        let mut frame = sniffed.frame.clone();
        match self {
            Self::Unchanged => {}
            Self::OwnMac => redress(&mut frame, super::End { mac: intruder.own().mac, ..from }, to),
            Self::OwnAddress => redress(&mut frame, intruder.own(), to),
            Self::Reflected => redress(&mut frame, to, from),
        }
        frame
    }
}
