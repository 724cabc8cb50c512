//! The migration NIC and the switches around it: its facts, the XDP program on it, announcements.

mod announce;
mod bouncer;
mod channels;
mod gateway;
mod nic;
mod transport;
mod uplink;

pub use announce::{AnnounceSchedule, Announcer, announcement};
pub use bouncer::{AttachMode, Bouncer, DropCount};
pub use channels::ChangedChannels;
pub use gateway::gateway_mac;
pub use nic::{Mac, Nic};
pub use transport::Transport;
pub use uplink::{find_uplink, tap_bridge};

/// What went wrong with a network interface.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// No such interface.
    #[error(
        "there is no network interface {0}: name the dedicated NIC in [migration] interface = \"…\" (`ip link` lists them)"
    )]
    NoInterface(String),
    /// The interface has no link.
    #[error("{0} has no carrier: check the cable, the switch port, and `ip link set {0} up`")]
    NoCarrier(String),
    /// The interface has no address.
    #[error("{0} has no IP address: give it one (`ip address add … dev {0}`)")]
    NoAddress(String),
    /// Reading facts failed.
    #[error("cannot read {what} of {interface}: {source}")]
    Facts {
        /// Which fact.
        what: &'static str,
        /// Of which interface.
        interface: String,
        /// Why not.
        source: std::io::Error,
    },
    /// A NIC cannot have such channels.
    #[error("[migration] channels: {interface} cannot have {wanted}: {problem}")]
    Channels {
        /// Interface.
        interface: String,
        /// How many were wanted.
        wanted: u32,
        /// What it offers or its driver says, with the remedy.
        problem: String,
    },
    /// A NIC still has the channels that the agent gave it.
    #[error("{interface} still has the agent's channels: {problem}; give it back its own by `{command}`")]
    ChannelsKept {
        /// Interface.
        interface: String,
        /// What stands in the way.
        problem: String,
        /// What does it by hand.
        command: String,
    },
    /// Another XDP program is there.
    #[error(
        "{0} already has an XDP program, and xferry does not take it over: detach it (`ip link set {0} xdp off`) \
         or give xferry a NIC of its own"
    )]
    Occupied(String),
    /// The XDP program cannot be used.
    #[error("XDP program on {interface}: {step}: {problem}")]
    Xdp {
        /// Interface.
        interface: String,
        /// What was tried.
        step: &'static str,
        /// The kernel's or the loader's answer.
        problem: String,
    },
    /// Announcements cannot be sent.
    #[error(
        "cannot announce the VM on {interface}: {source}; name the uplink in the VM's definition: nics = [{{ mac = \"…\", announce-on = \"…\" }}]"
    )]
    Announce {
        /// Interface.
        interface: String,
        /// Why not.
        source: std::io::Error,
    },
}
