//! VMMs
pub mod qmp;
