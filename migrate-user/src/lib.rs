//! wip
pub mod memory;
pub mod xsk;
