//! Facts of this host, read when they are asked for.

use std::{fs::File, os::unix::fs::MetadataExt, path::Path};

use super::{Backing, HostFacts, HugePool, NicFacts, Room};
use crate::{
    files::{self, MAX_PROC},
    memory::{HUGETLBFS, MemoryError, RamFile},
};

/// statfs(2), `f_type`.
const TMPFS: i64 = 0x0102_1994;
/// Unit of `st_blocks` (stat(2)), bytes.
const BLOCK: u64 = 512;

/// This host as it is now. What cannot be read is left out, and judged as not told.
pub fn host_facts(name: &str, nic: NicFacts) -> HostFacts {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    HostFacts {
        name: name.to_owned(),
        software: env!("CARGO_PKG_VERSION").into(),
        boot_id: read("/proc/sys/kernel/random/boot_id").trim().to_owned(),
        tsc_scaling: tsc_scaling(&read("/proc/cpuinfo")),
        available: available(&read("/proc/meminfo")),
        huge_pools: huge_pools(Path::new("/sys/kernel/mm/hugepages")),
        nic,
    }
}

/// This host's wall clock, µs since 1970.
pub fn wall_clock() -> Option<u64> {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).ok()?;
    u64::try_from(since.as_micros()).ok()
}

/// Whether the processor scales a guest's TSC: AMD says it among its flags, Intel among those of VMX.
fn tsc_scaling(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().filter(|line| line.starts_with("flags") || line.starts_with("vmx flags"));
    flags.take(2).flat_map(str::split_whitespace).any(|flag| matches!(flag, "tsc_scale" | "tsc_scaling"))
}

/// `MemAvailable` in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find(|line| line.starts_with("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib << 10)
}

fn huge_pools(directory: &Path) -> Vec<HugePool> {
    let pool = |entry: std::fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
        let number = |file: &str| std::fs::read_to_string(entry.path().join(file)).ok()?.trim().parse().ok();
        Some(HugePool {
            page_size: kib << 10,
            free: number("free_hugepages")?,
            promised: number("resv_hugepages")?,
        })
    };
    let mut pools: Vec<HugePool> =
        std::fs::read_dir(directory).into_iter().flatten().flatten().filter_map(pool).collect();
    pools.sort_by_key(|pool| pool.page_size);
    pools
}

/// What each of a VM's RAM files lies in, or why it has none that can be used.
///
/// # Errors
/// A sentence for the operator.
pub fn backings(files: &Result<Vec<RamFile>, MemoryError>) -> Result<Vec<Backing>, String> {
    let files = files.as_ref().map_err(ToString::to_string)?;
    files.iter().map(backing).collect::<Result<_, _>>().map_err(|error| error.to_string())
}

fn backing(file: &RamFile) -> Result<Backing, MemoryError> {
    let failed = |source| MemoryError::File { operation: "look at", path: file.path.clone(), source };
    let opened = file.open(false)?;
    let system = rustix::fs::fstatfs(&opened).map_err(|errno| failed(errno.into()))?;
    let mounts = files::read_lossy(format!("/proc/{}/mountinfo", file.pid), MAX_PROC).unwrap_or_default();
    let room = room(&opened).map_err(failed)?;
    // `f_type` has another width on other architectures.
    #[allow(clippy::unnecessary_cast, clippy::useless_conversion, reason = "see above")]
    let kind = system.f_type as i64;
    Ok(Backing {
        path: file.path.display().to_string(),
        file_system: match kind {
            TMPFS => "tmpfs".into(),
            HUGETLBFS => "hugetlbfs".into(),
            other => format!("a file system of type {other:#x}"),
        },
        page_size: if kind == HUGETLBFS { system.f_bsize as u64 } else { migrate_common::PAGE_SIZE as u64 },
        transparent_huge: transparent_huge(&mounts, room.device),
        room,
    })
}

/// Room in the file system of `file`.
fn room(file: &File) -> std::io::Result<Room> {
    let metadata = file.metadata()?;
    let system = rustix::fs::fstatvfs(file)?;
    Ok(Room {
        device: metadata.dev(),
        // A tmpfs without a limit says 0 blocks in all.
        free: (system.f_blocks > 0).then_some(system.f_bavail * system.f_frsize),
        taken: metadata.blocks() * BLOCK,
    })
}

/// The `huge=` option of the mount with this device number, unless it is off (proc_pid_mountinfo(5)).
fn transparent_huge(mountinfo: &str, device: u64) -> String {
    let number = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let mount = mountinfo.lines().find(|line| line.split(' ').nth(2) == Some(&number));
    let option = mount
        .and_then(|line| line.rsplit(' ').next())
        .and_then(|options| options.split(',').find_map(|option| option.strip_prefix("huge=")));
    option.filter(|&option| option != "never").unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_is_read() {
        assert_eq!(available("MemTotal: 5 kB\nMemAvailable:    1024 kB\n"), Some(1 << 20));
        assert_eq!(available("MemTotal: 5 kB\n"), None);
        assert!(tsc_scaling("flags\t\t: fpu tsc tsc_scale svm\n"));
        assert!(tsc_scaling("flags\t\t: fpu vmx\nvmx flags\t: vnmi tsc_scaling\n"));
        assert!(!tsc_scaling("flags\t\t: fpu tsc\nmodel name: tsc_scale\n"));
    }

    #[test]
    fn mount_options_of_the_right_mount() {
        let mounts = "25 30 0:23 / /dev/shm rw - tmpfs tmpfs rw,size=1024k\n26 30 0:24 / /ram rw shared:1 - tmpfs none rw,huge=always,size=9k\n";
        let device = |minor| rustix::fs::makedev(0, minor);
        assert_eq!(transparent_huge(mounts, device(24)), "always");
        assert_eq!(transparent_huge(mounts, device(23)), "");
        assert_eq!(transparent_huge(&mounts.replace("always", "never"), device(24)), "");
    }

    #[test]
    fn pools_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let pool = dir.path().join("hugepages-2048kB");
        std::fs::create_dir(&pool).unwrap();
        std::fs::write(pool.join("free_hugepages"), "7\n").unwrap();
        std::fs::write(pool.join("resv_hugepages"), "3\n").unwrap();
        assert_eq!(huge_pools(dir.path()), [HugePool { page_size: 2 << 20, free: 7, promised: 3 }]);
        assert!(huge_pools(Path::new("/nonexistent")).is_empty());
    }

    #[test]
    fn this_host_says_something() {
        let facts = host_facts("here", NicFacts::default());
        assert!(facts.available.is_some() && !facts.boot_id.is_empty());
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(1 << 20).unwrap();
        let empty = room(&file).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[1; 8192], 0).unwrap();
        assert_eq!((empty.taken, room(&file).unwrap().taken), (0, 8192));
    }
}
