//! The demo's VM: which guest, how it runs, and its boot.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::args::{Args, Guest};
use crate::guest::{self, Fill, GuestImage, GuestParams, Rate, SerialLog};
use crate::lab::plan::{PREFIX_LEN, VM_IP};
use crate::lab::{Accel, Disk, Lab, Side, VmConfig, tail};

/// How long a Linux guest may take to show that it runs under KVM: some hosts offer `/dev/kvm` but
/// execute kernels far too slowly on it.
const KVM_PROBE_LIMIT: Duration = Duration::from_secs(8);
/// How long the guest may take until it works.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// Length of the shared disk.
const DISK_BYTES: u64 = 64 << 20;
/// Pages per second that a translated guest dirties and still answers its network.
const RATE_TCG: u64 = 2000;
const RATE_KVM: u64 = 5000;

/// What the user calls it.
pub(super) fn kind_name(guest: Guest) -> &'static str {
    match guest {
        Guest::Linux => "Linux",
        Guest::Bare => "bare-metal",
    }
}

/// Provides the guest's image and decides how it runs.
pub(super) fn prepare(args: &Args) -> Result<(GuestImage, Accel)> {
    let cache = crate::lab::cache_dir();
    let image = GuestImage::prepare(args.guest.into(), &cache).context("preparing the guest's image")?;
    let accel = match (args.accel.chosen(), args.guest) {
        (Some(accel), _) => accel,
        (None, Guest::Bare) => Accel::Kvm,
        (None, Guest::Linux) => {
            let runs = guest::linux_runs_under_kvm(&image, KVM_PROBE_LIMIT);
            if runs.context("trying the guest under KVM")? { Accel::Kvm } else { Accel::Tcg }
        }
    };
    Ok((image, accel))
}

/// The VM as both hosts start it.
pub(super) fn config(args: &Args, image: &GuestImage, accel: Accel) -> VmConfig {
    let default_rate = if accel == Accel::Tcg { RATE_TCG } else { RATE_KVM };
    let linux = args.guest == Guest::Linux;
    let params = GuestParams {
        mib: args.working_set,
        rate: Rate::PerSecond(args.rate.unwrap_or(default_rate)),
        fill: Fill::Random,
        ip: linux.then(|| format!("{VM_IP}/{PREFIX_LEN}")),
        disk_read: linux && args.disk_load,
    };
    VmConfig {
        accel,
        memory_mib: args.memory,
        kernel: image.kernel.clone(),
        initrd: image.initrd.clone(),
        append: image.cmdline(&params),
        disk: linux.then_some(if args.disk_load { Disk::Direct } else { Disk::Cached }),
        // Its ring 0 may be emulated instruction by instruction, in which SeaBIOS takes seconds to clear memory.
        extra: if linux { Vec::new() } else { vec!["-bios".to_owned(), "qboot.rom".to_owned()] },
    }
}

/// Starts the VM on host-a and waits until the guest works. Returns how long that took.
pub(super) fn boot(lab: &Lab, config: &VmConfig) -> Result<Duration> {
    if config.disk.is_some() {
        guest::write_disk_pattern(lab.layout().disk(), DISK_BYTES).context("writing the shared disk")?;
    }
    let start = Instant::now();
    lab.a.start_vm(config)?;
    serial(lab, Side::A).wait_ready(BOOT_LIMIT).with_context(|| {
        let serial = tail("the guest", &lab.a.vm_paths().serial);
        format!("the guest does not come up\n{serial}\n{}", tail("QEMU", &lab.a.qemu_log()))
    })?;
    Ok(start.elapsed())
}

/// What the guest prints on a host.
pub(super) fn serial(lab: &Lab, side: Side) -> SerialLog {
    SerialLog::new(lab.host(side).vm_paths().serial)
}
