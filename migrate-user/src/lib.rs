//! wip
pub mod xsk;
