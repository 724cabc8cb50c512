//! The control channel: what the two agents say to each other about one migration, over one TCP connection.
//!
//! Each message is a length (4 bytes, big-endian), a type byte, and a body: JSON for [`Message`]s, raw bytes for
//! device state. Lengths are checked before memory is taken, and what is in a message before it is used.

mod channel;
mod check;
mod message;
mod socket;

pub use channel::{Channel, Item, StreamChannel, decode, split};
pub use message::{Commit, Examined, Message, PROTOCOL, Prepare, Prepared, Running, VerifyMode};
pub use socket::{connect, listen, tune};

use std::{net::SocketAddr, time::Duration};

/// What went wrong between two agents.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The peer cannot be reached.
    #[error(
        "cannot reach the agent at {address}: {source} (is `xferry agent` running there, and is the port open?)"
    )]
    Connect {
        /// Its address.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The own address cannot be used.
    #[error("cannot listen on {address}: {source}{}", match source.kind() {
        std::io::ErrorKind::AddrInUse => " (another agent, or another program, has the port: stop it or change [control] listen)",
        std::io::ErrorKind::AddrNotAvailable => " (this host has no such address: correct [control] listen)",
        _ => "",
    })]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The connection broke.
    #[error("the connection to the other agent broke: {0}")]
    Broken(#[from] std::io::Error),
    /// The peer hung up.
    #[error("the other agent closed the connection")]
    Closed,
    /// The peer said something that this version does not understand.
    #[error("the other agent's message is not understood: {0} (different versions of xferry?)")]
    Malformed(String),
    /// The peer speaks another protocol.
    #[error(
        "the other agent speaks protocol version {theirs}, this one {ours}: install the same version of xferry on both hosts"
    )]
    Version {
        /// Ours.
        ours: u32,
        /// Theirs.
        theirs: u32,
    },
    /// No answer in time.
    #[error("the other agent did not send {awaited} within {} s", limit.as_secs())]
    Timeout {
        /// What was awaited.
        awaited: &'static str,
        /// The limit.
        limit: Duration,
    },
    /// The peer gave up and says why.
    #[error("{0}")]
    Refused(String),
}
