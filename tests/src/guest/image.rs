//! What a guest is started from.

use std::fmt::{self, Display};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use super::cache::Cache;
use super::debian::Debian;
use super::params::GuestParams;
use super::{build, initrd};

/// The guests that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestKind {
    /// A Debian kernel and one program: memory, network, disk.
    Linux,
    /// A program without an operating system: memory only, but natively under every KVM.
    Bare,
}

impl Display for GuestKind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(match self {
            Self::Linux => "linux",
            Self::Bare => "bare",
        })
    }
}

impl FromStr for GuestKind {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "linux" => Ok(Self::Linux),
            "bare" => Ok(Self::Bare),
            _ => bail!("there is no guest {name:?}, take \"linux\" or \"bare\""),
        }
    }
}

/// Makes the kernel quick to start, quiet, and its end visible: QEMU's `-no-reboot` then ends QEMU, too.
///
/// The clock's and timer's checks go wrong when the host is busy, there are neither speculation to mitigate
/// nor PS/2 devices or disks of old to probe.
const LINUX_CMDLINE: &str = "console=ttyS0 quiet loglevel=1 panic=-1 reboot=t tsc=reliable no_timer_check \
    mitigations=off i8042.noaux i8042.nokbd 8250.nr_uarts=1 rcupdate.rcu_expedited=1";

/// Files that QEMU starts a guest from: `-kernel`, `-initrd`, and [`GuestImage::cmdline`] as `-append`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestImage {
    /// Which guest it is.
    pub kind: GuestKind,
    /// The kernel, or the program without one (a PVH ELF file).
    pub kernel: PathBuf,
    /// The initial RAM disk, for a guest that has one.
    pub initrd: Option<PathBuf>,
}

impl GuestImage {
    /// Builds what is not in the cache: the guest's program with cargo, for Linux also kernel and busybox from
    /// Debian's packages. The program is built again when its sources changed; the packages stay.
    ///
    /// # Errors
    /// If cargo fails, or packages cannot be had.
    pub fn prepare(kind: GuestKind, cache_dir: &Path) -> Result<Self> {
        Self::build(kind, cache_dir)
            .with_context(|| format!("preparing the {kind} guest in {}", cache_dir.display()))
    }

    fn build(kind: GuestKind, cache_dir: &Path) -> Result<Self> {
        let cache = Cache::open(cache_dir)?;
        let (kernel, initrd) = match kind {
            GuestKind::Bare => (build::bare(&cache)?, None),
            GuestKind::Linux => {
                let program = build::linux(&cache)?;
                let debian = Debian::get(&cache)?;
                let initrd = initrd::pack(&cache, &program, &debian)?;
                (debian.kernel, Some(initrd))
            }
        };
        Ok(Self { kind, kernel, initrd })
    }

    /// The kernel command line that makes the guest do what the parameters say.
    pub fn cmdline(&self, params: &GuestParams) -> String {
        match self.kind {
            GuestKind::Bare => params.to_string(),
            GuestKind::Linux => format!("{LINUX_CMDLINE} {params}"),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::guest::{Fill, Rate};

    #[test]
    fn kinds_have_names() {
        for kind in [GuestKind::Linux, GuestKind::Bare] {
            assert_eq!(kind.to_string().parse::<GuestKind>().unwrap(), kind);
        }
        assert!("windows".parse::<GuestKind>().is_err());
    }

    #[test]
    fn command_line_is_one_line() {
        let params = GuestParams { mib: 1, rate: Rate::Max, fill: Fill::None, ip: None, disk_read: false };
        let image = GuestImage { kind: GuestKind::Linux, kernel: "k".into(), initrd: None };
        let line = image.cmdline(&params);
        assert!(line.starts_with("console=ttyS0 ") && line.ends_with(&params.to_string()));
        assert!(!line.contains("  ") && !line.contains('\n'));
    }
}
