//! Can this VM go to that host? Asked by `xferry check`, and by every migration before its first page.
//!
//! Three steps, apart: each host collects *facts* ([`crate::vmm::inspect`] from QEMU, [`HostFacts`] and
//! [`ImageFacts`] from the host); pure functions *compare* them; what they say are [`Finding`]s, each with a
//! verdict, what was found, and a remedy. The source's facts travel in `prepare`, the destination compares
//! (it also has to refuse what it cannot take), and its findings travel back. All of them are shown: an operator
//! who repairs one thing wants to know the next before trying again.
//!
//! `--force` overrides a finding only where the worst case is a guest that misses something, never where the VM
//! could be lost: each [`Check`] says which it is.

mod compare;
mod cpuid;
mod encryption;
mod facts;
mod finding;
mod host;
mod image;
mod own;
mod secured;
mod table;

#[cfg(test)]
pub(crate) use compare::tests::pair as test_pair;
pub use compare::{
    after_launch, before_launch, clock, needed, not_compared, not_launched, path_lost, path_proved,
    path_unproved,
};
pub use encryption::page_encryption;
pub use facts::{
    Admission, Backing, DestinationFacts, HostFacts, HugePool, ImageFacts, NicFacts, Room, Sample,
    SourceFacts, Uplink,
};
pub use finding::{Check, Finding, Outcome, Verdict, notes, outcome, refusal, settle};
pub use host::{backings, host_facts, wall_clock};
pub use image::image_facts;
pub use own::{own, sending_nic};
pub use secured::control_channel;
pub use table::table;
