//! wip
pub mod datapath;
pub mod memory;
pub mod network;
pub mod vmm;
pub mod xsk;
