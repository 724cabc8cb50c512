//! Frames by the kernel's UDP sockets, where AF_XDP cannot be had. On the wire they are the same frames.
//!
//! The kernel writes and takes off the headers, cuts batches into datagrams (GSO, `UDP_SEGMENT`) and joins them
//! (GRO). What the XDP program does elsewhere, the [`Gate`] does here: frames of no registered migration are counted
//! by reason and dropped before anything is done with them.

mod gate;
mod sink;
mod socket;
mod source;
#[cfg(test)]
mod tests;

pub use gate::{Gate, GateFull};
pub use sink::UdpSink;
pub use socket::{UdpEnd, UdpGroup};
pub use source::UdpSource;

/// Longest payload of a datagram that both IPv4 and IPv6 can carry, bytes: a total length of 16 bits, less the headers.
const LONGEST: usize = 65_535 - 20 - 8;

/// What went wrong with UDP sockets.
#[derive(Debug, thiserror::Error)]
pub enum UdpError {
    /// Another socket has the address.
    #[error(
        "UDP port {address} on {interface} is in use: stop what has it (`ss -ulnp`), or set another [migration] port on both hosts"
    )]
    InUse {
        /// Network interface.
        interface: String,
        /// Address and port.
        address: std::net::SocketAddr,
    },
    /// There is no way to the peer.
    #[error(
        "{address} cannot be reached from {interface}: {source}; give both migration NICs addresses of one network, or add a route \
         (`ip route add … dev {interface}`)"
    )]
    Unreachable {
        /// Network interface.
        interface: String,
        /// The peer's address and port.
        address: std::net::SocketAddr,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// A system call failed.
    #[error("{operation} of a UDP socket for {address} on {interface}: {source}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// Network interface.
        interface: String,
        /// Address and port.
        address: std::net::SocketAddr,
        /// The kernel's answer.
        source: std::io::Error,
    },
}
