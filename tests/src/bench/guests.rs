//! The guests that are moved.

use std::fmt;

use anyhow::Result;
use clap::ValueEnum;

use crate::guest::{Fill, GuestImage, GuestKind, GuestParams, Rate};
use crate::lab::{self, Accel, VmConfig};

/// What the guest's RAM is on both hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Backing {
    /// Pages of 4 KiB.
    Tmpfs,
    /// Huge pages of 2 MiB, of a tmpfs that has them.
    HugeTmpfs,
    /// Huge pages of 2 MiB that were put aside.
    Hugetlbfs,
}

/// A guest. Its [`Display`](fmt::Display) tells it from all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Guest {
    pub kind: GuestKind,
    /// RAM, MiB.
    pub memory: u64,
    /// How much of it the guest filled, and writes to, MiB.
    pub area: u64,
    pub rate: Rate,
    pub fill: Fill,
    pub backing: Backing,
}

impl Guest {
    /// With another pace.
    pub fn at(self, rate: Rate) -> Self {
        Self { rate, ..self }
    }

    /// Pages it writes a second; `None` when it writes as fast as it can.
    pub fn pages_per_second(&self) -> Option<u64> {
        match self.rate {
            Rate::PerSecond(pages) => Some(pages),
            Rate::Max => None,
        }
    }

    /// Filled memory, GiB.
    pub fn filled_gib(&self) -> f64 {
        self.area as f64 / 1024.0
    }

    /// How QEMU is started for it, with its RAM in a file of tmpfs.
    ///
    /// # Errors
    /// If its image cannot be built.
    pub fn vm(&self) -> Result<VmConfig> {
        let image = GuestImage::prepare(self.kind, &lab::cache_dir())?;
        let params =
            GuestParams { mib: self.area, rate: self.rate, fill: self.fill, ip: None, disk_read: false };
        // Threads get names by which those that run the guest are told from the others.
        let mut extra = vec!["-name".to_owned(), "debug-threads=on".to_owned()];
        if self.kind == GuestKind::Bare {
            // Where ring 0 is emulated instruction by instruction, SeaBIOS takes seconds to clear memory.
            extra.extend(["-bios", "qboot.rom"].map(str::to_owned));
        }
        Ok(VmConfig {
            accel: if self.kind == GuestKind::Bare { Accel::Kvm } else { Accel::Tcg },
            memory_mib: self.memory,
            kernel: image.kernel.clone(),
            initrd: image.initrd.clone(),
            append: image.cmdline(&params),
            disk: None,
            extra,
        })
    }
}

impl fmt::Display for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, memory, area, .. } = self;
        let fill = match self.fill {
            Fill::None => "written",
            Fill::Random => "random",
            Fill::Records => "records",
        };
        write!(f, "{kind}, {memory} MiB, {area} {fill}, ")?;
        match self.rate {
            Rate::PerSecond(0) => write!(f, "idle")?,
            Rate::PerSecond(pages) => write!(f, "{pages} pages/s")?,
            Rate::Max => write!(f, "flat out")?,
        }
        match self.backing {
            Backing::Tmpfs => Ok(()),
            Backing::HugeTmpfs => write!(f, ", huge tmpfs"),
            Backing::Hugetlbfs => write!(f, ", huge pages"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_differ_by_name() {
        let guest = Guest {
            kind: GuestKind::Bare,
            memory: 1024,
            area: 900,
            rate: Rate::PerSecond(5000),
            fill: Fill::Random,
            backing: Backing::Tmpfs,
        };
        assert_eq!(guest.to_string(), "bare, 1024 MiB, 900 random, 5000 pages/s");
        let huge = Guest { backing: Backing::Hugetlbfs, ..guest.at(Rate::Max) };
        assert_eq!(huge.to_string(), "bare, 1024 MiB, 900 random, flat out, huge pages");
    }
}
