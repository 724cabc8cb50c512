//! Who is measured: those that move VMs, and what else the link and the memory can do.

pub(super) mod af_xdp;
pub(super) mod criterion;
pub(super) mod iperf;
pub(super) mod memcpy;
pub(super) mod qemu;
pub(super) mod xferry;

use std::fmt;
use std::time::Duration;

use anyhow::Result;

pub(super) use qemu::Qemu;
pub(super) use xferry::Xferry;

use super::bed::Bed;
use super::figures::Told;
use super::guests::Guest;
use crate::lab::Side;

/// How long a migration may take before it counts as one that does not end. Longest of all is 1 GiB at 1 Gbit/s, 9 s.
pub(super) const LIMIT: Duration = Duration::from_secs(40);

/// Who moves a VM. Its [`Display`](fmt::Display) tells it from all others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Mover {
    Xferry(Xferry),
    Qemu(Qemu),
}

impl Mover {
    /// Makes ready before the guest is started.
    pub fn prepare(&self, bed: &Bed, guest: &Guest) -> Result<()> {
        match self {
            Self::Xferry(xferry) => xferry.start_agents(bed, guest),
            Self::Qemu(_) => Ok(()),
        }
    }

    /// Moves the guest away from `source`.
    ///
    /// # Errors
    /// If it does not come to an end within [`LIMIT`], or fails.
    pub fn migrate(&self, bed: &Bed, guest: &Guest, source: Side) -> Result<Told> {
        match self {
            Self::Xferry(xferry) => xferry.migrate(bed, source),
            Self::Qemu(qemu) => qemu.migrate(bed, guest, source),
        }
    }
}

impl fmt::Display for Mover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Xferry(xferry) => xferry.fmt(f),
            Self::Qemu(qemu) => qemu.fmt(f),
        }
    }
}
