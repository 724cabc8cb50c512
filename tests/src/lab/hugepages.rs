//! Huge pages for guests: taken from this machine, and given back with the lab, however that ends.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::layout::Layout;

/// The number of huge pages of 2 MiB in the kernel's pool (`Documentation/admin-guide/mm/hugetlbpage.rst`).
const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Adds `pages` huge pages of 2 MiB to the kernel's pool and mounts a file system over them; `None` if this machine
/// does not have so many to give.
pub(super) fn take(layout: &Layout, pages: u64) -> Result<Option<PathBuf>> {
    let directory = layout.huge_dir();
    fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
    // Before the pool grows: whoever removes the lab has to know, also when we are killed between the two.
    let note = note(layout);
    fs::write(&note, pages.to_string()).with_context(|| format!("writing {}", note.display()))?;
    let before = pool()?;
    set_pool(before + pages)?;
    let got = pool()?.saturating_sub(before);
    if got < pages {
        fs::write(&note, got.to_string()).with_context(|| format!("writing {}", note.display()))?;
        give_back(layout)?;
        return Ok(None);
    }
    mount("hugetlbfs", &directory, "hugetlbfs", MountFlags::empty(), c"pagesize=2M")
        .with_context(|| format!("mounting hugetlbfs on {}", directory.display()))?;
    Ok(Some(directory))
}

/// Takes the file system down, whose files nobody has open any more, and makes the pool smaller by what was taken.
/// Nothing to do for a lab that took none.
pub(super) fn give_back(layout: &Layout) -> Result<()> {
    let note = note(layout);
    let Some(pages) = read_note(&note)? else { return Ok(()) };
    match unmount(layout.huge_dir(), UnmountFlags::DETACH) {
        // It was not mounted.
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(error).context("unmounting hugetlbfs"),
    }
    // Others may have changed the pool meanwhile; only our part goes.
    set_pool(pool()?.saturating_sub(pages))?;
    fs::remove_file(&note).with_context(|| format!("removing {}", note.display()))
}

fn note(layout: &Layout) -> PathBuf {
    layout.run_dir().join("huge-pages")
}

fn read_note(path: &Path) -> Result<Option<u64>> {
    match fs::read_to_string(path) {
        Ok(text) => text.trim().parse().map(Some).with_context(|| format!("{} is no number", path.display())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

fn pool() -> Result<u64> {
    let text = fs::read_to_string(POOL).with_context(|| format!("reading {POOL}"))?;
    text.trim().parse().with_context(|| format!("{POOL} is {text:?}, no number"))
}

fn set_pool(pages: u64) -> Result<()> {
    fs::write(POOL, pages.to_string()).with_context(|| format!("writing {POOL}"))
}
