//! What a migration looks like from outside: for the VM's users, the switch, and whoever asks QEMU.
//!
//! Probes run on threads of their own inside the lab's namespaces and stop when they are dropped.

mod fdb;
mod owner;
mod ping;
mod rarp;
mod tcp_stream;
mod vm_watch;
mod worker;

pub use fdb::fdb_port;
pub use owner::{owner_count, qemu_status};
pub use ping::{Mark, PingFigures, PingProbe};
pub use rarp::{RarpCapture, rarp_frame, send_rarp};
pub use tcp_stream::TcpStreamProbe;
pub use vm_watch::{VmEvent, VmWatch};
pub(crate) use worker::Workers;
