//! Does a whole operating system run under this host's KVM?

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::image::GuestImage;
use super::params::{Fill, GuestParams, Rate};
use super::serial::SerialLog;
use super::sources::text_key;

const QEMU: &str = "qemu-system-x86_64";

/// Boots the Linux guest under KVM and looks whether it becomes ready in time.
///
/// Some hosts have a `/dev/kvm` that runs the bare-metal guest but is too slow for the kernel of an operating
/// system, or lacks what it needs. The answer is kept in the image's cache, for this host kernel and QEMU; to
/// ask again, remove the file `kvm-linux-…` there.
///
/// # Errors
/// If QEMU cannot be started, or the cache cannot be written.
pub fn linux_runs_under_kvm(image: &GuestImage, timeout: Duration) -> Result<bool> {
    if File::options().read(true).write(true).open("/dev/kvm").is_err() {
        return Ok(false);
    }
    let cache = image
        .kernel
        .ancestors()
        .nth(2)
        .with_context(|| format!("{} is not in a cache, prepare the image", image.kernel.display()))?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("reading the kernel's release")?;
    let answer = cache.join(format!("kvm-linux-{}", text_key(&[&release, &qemu_version()?])));
    if let Ok(text) = fs::read_to_string(&answer) {
        return Ok(text.trim() == "yes");
    }
    let runs = boots(image, cache, timeout)?;
    keep(&answer, if runs { "yes\n" } else { "no\n" })?;
    Ok(runs)
}

fn qemu_version() -> Result<String> {
    let output = Command::new(QEMU)
        .arg("--version")
        .output()
        .with_context(|| format!("running {QEMU}, install the package qemu-system-x86"))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn boots(image: &GuestImage, cache: &Path, timeout: Duration) -> Result<bool> {
    let serial = Removed(cache.join(format!("kvm-probe-{}.log", std::process::id())));
    let params =
        GuestParams { mib: 1, rate: Rate::PerSecond(0), fill: Fill::None, ip: None, disk_read: false };
    let mut command = Command::new(QEMU);
    command
        .args(["-machine", "q35", "-accel", "kvm", "-cpu", "host,-arch-capabilities", "-m", "256"])
        .args(["-nodefaults", "-vga", "none", "-display", "none", "-no-reboot"])
        .args(["-serial".to_owned(), format!("file:{}", serial.0.display())])
        .args(["-append".to_owned(), image.cmdline(&params)])
        .arg("-kernel")
        .arg(&image.kernel)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if let Some(initrd) = &image.initrd {
        command.arg("-initrd").arg(initrd);
    }
    let mut qemu = Killed(
        command.spawn().with_context(|| format!("starting {QEMU}, install the package qemu-system-x86"))?,
    );

    let mut log = SerialLog::new(&serial.0);
    let start = Instant::now();
    const STEP: Duration = Duration::from_millis(100);
    while start.elapsed() < timeout {
        if log.wait_ready(STEP.min(timeout)).is_ok() {
            return Ok(true);
        }
        // The guest gave up, or QEMU did.
        if qemu.0.try_wait().context("asking after QEMU")?.is_some() {
            return Ok(false);
        }
    }
    Ok(false)
}

/// Writes a file in one piece.
fn keep(path: &Path, text: &str) -> Result<()> {
    let partial = path.with_extension(format!("partial-{}", std::process::id()));
    fs::write(&partial, text)
        .and_then(|()| fs::rename(&partial, path))
        .with_context(|| format!("writing {}, is the cache writable?", path.display()))
}

/// A process that is over when this is.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Errors mean that it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A file that is gone when this is.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
