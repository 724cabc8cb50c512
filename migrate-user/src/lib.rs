//! wip
pub mod datapath;
pub mod memory;
pub mod xsk;
