//! Kernel and busybox of the Linux guest, from Debian's packages.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::cache::Cache;
use super::modules;
use super::sources::text_key;

/// Depends on the newest kernel without drivers for real hardware.
const KERNEL: &str = "linux-image-cloud-amd64";
const BUSYBOX: &str = "busybox-static";
/// What the guest's devices need, and what those modules need.
const MODULES: [&str; 3] = ["virtio_pci", "virtio_net", "virtio_blk"];

/// What was taken out of the packages.
pub(super) struct Debian {
    /// The kernel's image.
    pub(super) kernel: PathBuf,
    /// A shell and all commands in one.
    pub(super) busybox: PathBuf,
    /// A directory of modules, numbered in the order in which they must be loaded.
    pub(super) modules: PathBuf,
}

impl Debian {
    /// Downloads and unpacks what is not in the cache; what is there is not updated.
    pub(super) fn get(cache: &Cache) -> Result<Self> {
        let name = format!("debian-{}", text_key(&MODULES));
        let dir = cache.get_or_build(&name, |dir| {
            download(dir)?;
            unpack(dir)
        })?;
        Ok(Self { kernel: dir.join("vmlinuz"), busybox: dir.join("busybox"), modules: dir.join("modules") })
    }
}

/// Fetches the packages, with fresh package lists if those at hand are missing or too old.
fn download(dir: &Path) -> Result<()> {
    if try_download(dir).is_ok() {
        return Ok(());
    }
    run(Command::new("apt-get").args(["--quiet", "update"])).context("updating the package lists")?;
    try_download(dir)
}

fn try_download(dir: &Path) -> Result<()> {
    let depends = run(Command::new("apt-cache").args(["depends", KERNEL]))?;
    let kernel = kernel_package(&depends).with_context(|| {
        format!("the package lists have no {KERNEL}: add a source of Debian packages for amd64")
    })?;
    run(Command::new("apt-get").args(["--quiet", "download", kernel, BUSYBOX]).current_dir(dir))?;
    Ok(())
}

/// The package that the metapackage stands for, from the answer of `apt-cache depends`.
fn kernel_package(depends: &str) -> Option<&str> {
    depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .map(str::trim)
        .find(|package| package.starts_with("linux-image-"))
}

fn unpack(dir: &Path) -> Result<()> {
    let tree = dir.join("tree");
    for package in files(dir)?.iter().filter(|path| path.extension().is_some_and(|kind| kind == "deb")) {
        run(Command::new("dpkg").arg("-x").arg(package).arg(&tree))?;
        fs::remove_file(package).with_context(|| format!("removing {}", package.display()))?;
    }
    let kernel = files(&tree.join("boot"))?
        .into_iter()
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz")))
        .with_context(|| format!("the package behind {KERNEL} has no vmlinuz"))?;
    copy(&kernel, &dir.join("vmlinuz"))?;
    // Where it is depends on whether /bin is a link to /usr/bin in that release.
    let busybox =
        ["bin/busybox", "usr/bin/busybox"].map(|path| tree.join(path)).into_iter().find(|path| path.exists());
    copy(&busybox.with_context(|| format!("{BUSYBOX} has no busybox"))?, &dir.join("busybox"))?;

    let into = dir.join("modules");
    fs::create_dir(&into).with_context(|| format!("creating {}", into.display()))?;
    for (number, module) in modules::in_load_order(&tree, &MODULES)?.iter().enumerate() {
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        copy(module, &into.join(format!("{number:02}-{name}")))?;
    }
    fs::remove_dir_all(&tree).with_context(|| format!("removing {}", tree.display()))
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    fs::read_dir(dir)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
        .with_context(|| format!("listing {}", dir.display()))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map(drop).with_context(|| format!("copying {} to {}", from.display(), to.display()))
}

/// Runs a command and returns what it printed.
fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    // Answers are parsed.
    let output = match command.env("LC_ALL", "C").output() {
        Ok(output) => output,
        Err(error) => {
            bail!("running {name}: {error}; the Linux guest can only be made on Debian and its relatives")
        }
    };
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{name} failed, is the network up? {}", errors.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_kernel_behind_the_metapackage() {
        let depends = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n";
        assert_eq!(kernel_package(depends), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(kernel_package("linux-image-cloud-amd64\n"), None);
        assert_eq!(kernel_package(""), None);
    }
}
