//! The control channel: what the two agents say to each other about one migration, over one TCP connection, in TLS 1.3
//! unless it is configured `insecure`.
//!
//! Each message is a length (4 bytes, big-endian), a type byte, and a body: JSON for [`Message`]s, raw bytes for
//! device state. Lengths are checked before memory is taken, and what is in a message before it is used.

#[cfg(test)]
mod arbitrary;
mod channel;
mod check;
mod message;
mod socket;
mod stream;
mod tls;

pub use channel::{Channel, Item, MAX_MESSAGE, StreamChannel, decode, split};
pub use message::{Commit, Examined, Message, PROTOCOL, Prepare, Prepared, Running, VerifyMode};
pub use socket::{connect, listen, tune};
pub use stream::ControlStream;
pub use tls::{secure_from, secure_to};

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
    Broken(#[source] std::io::Error),
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
    /// The peer speaks TLS where none is awaited.
    #[error(
        "the other agent speaks TLS, and this one has insecure = true: give this host certificates too (`xferry pki`) and take \
         insecure = true away, or set it on both hosts"
    )]
    PeerTls,
    /// The peer speaks something else than TLS.
    #[error(
        "the other agent does not speak TLS, which this one wants: give that host certificates too (`xferry pki`) and take \
         insecure = true away there, or set it on both hosts"
    )]
    PeerPlain,
    /// The peer is not who it should be.
    #[error("the other agent's certificate is not accepted: {0}")]
    Peer(String),
    /// The peer does not believe who this is.
    #[error("the other agent does not accept this host's certificate: {0}")]
    Own(String),
    /// The peer's name is not that of its certificate.
    #[error(
        "the other agent says that it is {said:?}, and its certificate is one for {certified:?}: its `name` must be that of its \
         certificate"
    )]
    Name {
        /// What it says.
        said: String,
        /// What it proved.
        certified: String,
    },
    /// Something else about TLS.
    #[error("the TLS handshake failed: {0}")]
    Tls(String),
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

impl ControlError {
    /// Whether it is certain that the two agents do not trust each other: trying again changes nothing.
    pub const fn is_distrust(&self) -> bool {
        matches!(self, Self::PeerTls | Self::PeerPlain | Self::Peer(_) | Self::Own(_) | Self::Name { .. })
    }
}

impl From<std::io::Error> for ControlError {
    fn from(error: std::io::Error) -> Self {
        tls::explained(&error).unwrap_or(Self::Broken(error))
    }
}
