//! What both sides of the kernel boundary must agree on, defined once.
//!
//! * [`wire`]: the frames of the page stream (specified in `docs/protocol.md`);
//! * [`locate`]: where in an Ethernet frame a page-stream frame lies, used by the XDP program to decide
//!   and by the receiver to read;
//! * [`maps`]: keys and values of the BPF maps.
#![cfg_attr(not(test), no_std)]

pub mod locate;
pub mod maps;
pub mod wire;

/// Unit of placement and of dirty tracking, in bytes. Larger guest pages are moved in units of this.
pub const PAGE_SIZE: usize = 4096;
