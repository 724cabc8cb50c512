//! The laboratory of `xferry`: two hosts, a switch and a client made of network namespaces, real
//! QEMU guests in it, and probes that look at a live migration from outside.
//!
//! * [`lab`] builds and removes the namespaces and everything that runs in them.
//! * [`guest`] provides the guests, which dirty and verify their own memory all the time.
//! * [`probe`] measures what the VM's users would notice: pings, a TCP stream, RARP, the switch's FDB.
//! * [`wire`] is a migration network that loses, reorders, repeats, corrupts and delays.
//! * [`intruder`] is a third host on the migration network that sniffs, replays, forges and floods.
//! * [`bench`] is the program `bench`: xferry beside its peers on the same link.
//! * [`scenario`] is a VM in a lab, ready to be migrated, and what must hold whatever happens to it.
//! * [`faults`] is the program `faults`: one fault in each of many migrations, and what became of the VM.
//! * [`demo`] is the program `demo`: a VM migrated there and back, and a report whether all went well.
//!
//! Everything needs root, because it makes namespaces; [`lab::missing`] says what else.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking"))]

pub mod bench;
pub mod demo;
pub mod faults;
pub mod guest;
pub mod intruder;
pub mod lab;
pub mod probe;
pub mod scenario;
pub mod wire;
