//! A small file system of its own for what an agent keeps, so that it can be full without anybody else's being so.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount as mount_at, unmount as unmount_from};

/// The file that takes the room.
const FILLER: &str = "filler";

/// Mounts a tmpfs of `bytes` on a directory.
pub(super) fn mount(directory: &Path, bytes: u64) -> Result<()> {
    let options = std::ffi::CString::new(format!("size={bytes}")).context("a mount option")?;
    mount_at("tmpfs", directory, "tmpfs", MountFlags::empty(), options.as_c_str())
        .with_context(|| format!("mounting a tmpfs on {}", directory.display()))
}

/// Unmounts it; that nothing is mounted there is as good.
pub(super) fn unmount(directory: &Path) -> Result<()> {
    match unmount_from(directory, UnmountFlags::DETACH) {
        Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        result => result.with_context(|| format!("unmounting {}", directory.display())),
    }
}

/// What makes a disk full. Dropping it frees the room.
#[derive(Debug)]
pub struct Filler {
    path: PathBuf,
    file: File,
}

impl Filler {
    /// Takes all room in `directory` but `left` bytes.
    pub(super) fn new(directory: &Path, left: u64) -> Result<Self> {
        let path = directory.join(FILLER);
        let file = File::create(&path).with_context(|| format!("making {}", path.display()))?;
        let this = Self { path, file };
        let room = statvfs(directory).context("looking for free room")?;
        let taken = (room.f_bavail * room.f_frsize).saturating_sub(left);
        if taken > 0 {
            fallocate(&this.file, FallocateFlags::empty(), 0, taken)
                .with_context(|| format!("filling {}", directory.display()))?;
        }
        Ok(this)
    }

    /// Takes what is left, to the last page.
    ///
    /// # Errors
    /// If that fails for another reason than that nothing is left.
    pub fn fill_up(&mut self) -> Result<()> {
        let end = self.file.metadata().context("the filler's length")?.len();
        std::io::Seek::seek(&mut self.file, std::io::SeekFrom::Start(end)).context("the filler's end")?;
        loop {
            match self.file.write(&[0; 4096]) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::StorageFull => return Ok(()),
                Err(error) => return Err(error).context("filling a disk"),
            }
        }
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        // Gone already only if the lab is.
        let _ = fs::remove_file(&self.path);
    }
}
