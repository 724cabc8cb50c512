//! VMs that are small enough for a test.

use anyhow::Result;

use crate::guest::{Fill, GuestImage, GuestKind, GuestParams, Rate};
use crate::lab::plan::{PREFIX_LEN, VM_IP};
use crate::lab::{self, Accel, Disk, VmConfig};

/// QEMU's program.
pub(super) const QEMU: &str = "qemu-system-x86_64";
/// RAM of the VMs in MiB.
pub const MEMORY_MIB: u64 = 256;

/// What the guest does to its memory.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// MiB that it writes and verifies.
    pub mib: u64,
    /// Pages that it writes per second.
    pub rate: u64,
}

impl Workload {
    /// Enough to need several rounds, and little enough to be verified in a second.
    pub const USUAL: Self = Self { mib: 64, rate: 5000 };

    fn params(self) -> GuestParams {
        let rate = Rate::PerSecond(self.rate);
        GuestParams { mib: self.mib, rate, fill: Fill::Random, ip: None, disk_read: false }
    }
}

/// The bare-metal guest under KVM: up in a fraction of a second.
///
/// # Errors
/// If its image cannot be built.
pub fn bare(workload: Workload) -> Result<VmConfig> {
    bare_by(&workload.params())
}

/// The same, writing all of `mib` MiB as fast as it goes, with room for it.
///
/// # Errors
/// If its image cannot be built.
pub fn flat_out(mib: u64) -> Result<VmConfig> {
    let params = GuestParams { mib, rate: Rate::Max, fill: Fill::Random, ip: None, disk_read: false };
    Ok(VmConfig { memory_mib: mib + MEMORY_MIB / 2, ..bare_by(&params)? })
}

fn bare_by(params: &GuestParams) -> Result<VmConfig> {
    let image = GuestImage::prepare(GuestKind::Bare, &lab::cache_dir())?;
    // Where ring 0 is emulated instruction by instruction, SeaBIOS takes seconds to clear memory.
    let extra = ["-bios", "qboot.rom"].map(str::to_owned).to_vec();
    Ok(VmConfig { extra, ..config(Accel::Kvm, &image, params, None) })
}

/// The Linux guest, translated, which works everywhere; it has a network, and with a `Direct` disk reads that as
/// hard as it can.
///
/// # Errors
/// If its image cannot be had.
pub fn linux(workload: Workload, disk: Disk) -> Result<VmConfig> {
    let image = GuestImage::prepare(GuestKind::Linux, &lab::cache_dir())?;
    let params = GuestParams {
        ip: Some(format!("{VM_IP}/{PREFIX_LEN}")),
        disk_read: disk == Disk::Direct,
        ..workload.params()
    };
    Ok(config(Accel::Tcg, &image, &params, Some(disk)))
}

fn config(accel: Accel, image: &GuestImage, params: &GuestParams, disk: Option<Disk>) -> VmConfig {
    VmConfig {
        accel,
        memory_mib: MEMORY_MIB,
        kernel: image.kernel.clone(),
        initrd: image.initrd.clone(),
        append: image.cmdline(params),
        disk,
        extra: Vec::new(),
    }
}
