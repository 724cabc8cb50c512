//! Live migration of running virtual machines between hosts, over a dedicated NIC, by XDP and AF_XDP.
//!
//! Dependencies point downwards only; see `docs/architecture.md`.
//!
//! ```text
//! agent        owns NIC, sessions, VMs
//!  └ migration   source and destination state machines: no sockets, no ioctls
//!     ├ datapath   page stream: frames, sender, receiver, loss accounting
//!     │   └ xsk      AF_XDP: UMEM, rings, sockets
//!     ├ control    control channel between agents, in TLS
//!     │   └ pki      certificates
//!     ├ preflight  can this VM go to that host?
//!     ├ memory     guest RAM, dirty tracking
//!     ├ vmm        QEMU
//!     ├ network    XDP program, NIC facts, announcements
//!     └ report     what a migration did
//! ```

#![deny(unsafe_code)]

pub mod accounts;
pub mod agent;
mod checksum;
pub mod control;
mod cpus;
pub mod datapath;
mod files;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
#[expect(unsafe_code, reason = "mappings shared with the VMM, ptrace, ioctls")]
pub mod memory;
pub mod migration;
pub mod network;
pub mod pki;
pub mod preflight;
pub mod privileges;
pub mod report;
mod sync;
pub mod terminal;
pub mod vmm;
#[expect(unsafe_code, reason = "rings and UMEM shared with the kernel")]
pub mod xsk;

/// Unix socket of the agent's API when none is configured.
pub const DEFAULT_SOCKET: &str = "/run/xferry/xferry.sock";
