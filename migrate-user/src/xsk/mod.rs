//! AF_XDP sockets: memory shared with the kernel, the four rings, sending and receiving of frames that
//! span several buffers.
//!
//! Knows nothing of migration. What the kernel does with the rings can be played by the other end of an
//! in-memory pair, so that [`TxQueue`] and [`RxQueue`] are tested without a kernel.
//!
//! Ownership: a chunk of the [`Umem`] belongs either to this process or to the kernel, and moves between
//! them only through the rings. Sending owns its own part of the UMEM ([`TxQueue`]), receiving the rest
//! ([`RxQueue`]), so the two halves of one socket can live on two threads without a lock.

mod joined;
mod ring;
mod rx;
mod socket;
mod tx;
mod umem;

pub use joined::{FilePart, JoinedMemory};
pub use ring::{Consumer, Producer, ring_pair};
pub use rx::{Packet, RxQueue};
pub use socket::{BindMode, Binding, Socket, SocketConfig, Statistics};
pub use tx::{ChainChunk, TxQueue, TxSlot};
pub use umem::{AnonymousMemory, CHUNK_SIZE, Umem, UmemMemory};

/// What went wrong with an AF_XDP socket.
#[derive(Debug, thiserror::Error)]
pub enum XskError {
    /// A system call failed.
    #[error("{operation} of an AF_XDP socket on {interface} queue {queue}: {source}{}", remedy(*.source))]
    System {
        /// What was tried.
        operation: &'static str,
        /// Network interface.
        interface: String,
        /// Queue of the interface.
        queue: u32,
        /// The kernel's answer.
        source: rustix::io::Errno,
    },
    /// A configuration that cannot work.
    #[error("AF_XDP socket: {0}")]
    Config(String),
}

fn remedy(errno: rustix::io::Errno) -> &'static str {
    use rustix::io::Errno;
    match errno {
        Errno::AFNOSUPPORT => " (this kernel has no AF_XDP: it needs CONFIG_XDP_SOCKETS)",
        Errno::BUSY => {
            " (another program has an AF_XDP socket on this queue; stop it or choose another queue)"
        }
        Errno::PERM | Errno::ACCESS => " (AF_XDP needs root or CAP_NET_RAW with CAP_BPF)",
        Errno::NOBUFS => " (locked memory is limited: raise LimitMEMLOCK)",
        _ => "",
    }
}
