//! A small file system of its own for what an agent keeps, so that it can be full without anybody else's being so.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount as mount_at, unmount as unmount_from};

use super::command::run;

/// What tmpfs gives a file at a time, bytes.
const PAGE: u64 = 4096;
/// The file that takes the room.
const FILLER: &str = "filler";

/// Mounts a tmpfs of `bytes` on a directory.
pub(super) fn mount(directory: &Path, bytes: u64) -> Result<()> {
    mount_tmpfs(directory, &format!("size={bytes}"))
}

/// Mounts a tmpfs for RAM in huge pages on a directory, as large as the machine's memory.
pub(super) fn mount_huge(directory: &Path) -> Result<()> {
    mount_tmpfs(directory, "size=100%,huge=within_size")
}

fn mount_tmpfs(directory: &Path, options: &str) -> Result<()> {
    let options = std::ffi::CString::new(options).context("a mount option")?;
    mount_at("tmpfs", directory, "tmpfs", MountFlags::empty(), options.as_c_str())
        .with_context(|| format!("mounting a tmpfs on {}", directory.display()))
}

/// Bytes of an image that a file system is made in.
const IMAGE: u64 = 16 << 20;

/// A disk whose writers can be made to wait, as one that has stopped to answer would.
#[derive(Debug)]
pub struct HoldableDisk {
    directory: PathBuf,
}

impl HoldableDisk {
    /// Makes a file system in `image` and mounts it on `directory`.
    pub(super) fn mount(image: &Path, directory: &Path) -> Result<Self> {
        let file = File::create(image).with_context(|| format!("making {}", image.display()))?;
        file.set_len(IMAGE).context("an image's length")?;
        let (image, mounted) = (image.to_string_lossy(), directory.to_string_lossy());
        run("mkfs.ext4", &["-q", "-F", &image])?;
        // The loop device goes with the mount.
        run("mount", &["-o", "loop", &image, &mounted])?;
        Ok(Self { directory: directory.to_owned() })
    }

    /// From here on nobody's write ends, until the returned value is dropped.
    ///
    /// # Errors
    /// If the kernel cannot.
    pub fn hold(&self) -> Result<Held> {
        run("fsfreeze", &["--freeze", &self.directory.to_string_lossy()])?;
        Ok(Held { directory: self.directory.clone() })
    }
}

/// A disk whose writers wait.
#[derive(Debug)]
pub struct Held {
    directory: PathBuf,
}

impl Drop for Held {
    fn drop(&mut self) {
        thaw(&self.directory);
    }
}

/// Lets writers go on; that none was held is as good.
fn thaw(directory: &Path) {
    let mut command = Command::new("fsfreeze");
    command.arg("--unfreeze").arg(directory).stdout(Stdio::null()).stderr(Stdio::null());
    let _ = command.status();
}

/// Unmounts it; that nothing is mounted there is as good.
pub(super) fn unmount(directory: &Path) -> Result<()> {
    // One that is held when its lab is removed would wait for ever.
    thaw(directory);
    match unmount_from(directory, UnmountFlags::DETACH) {
        Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        result => result.with_context(|| format!("unmounting {}", directory.display())),
    }
}

/// Adds a record to a journal, as an agent would.
pub(super) fn append_record(journal: &Path, json: &str) -> Result<()> {
    let line = format!("{:08x} {json}\n", crc32c::crc32c(json.as_bytes()));
    let open = OpenOptions::new().append(true).open(journal);
    let mut file = open.with_context(|| format!("opening {}", journal.display()))?;
    file.write_all(line.as_bytes()).with_context(|| format!("writing to {}", journal.display()))
}

/// Fills a journal's last page up to `left` bytes, less than a record more: a full disk still takes what fits there, which
/// is dozens of records. These are about a session that nobody ever began.
pub(super) fn pad_journal(journal: &Path, left: u64) -> Result<()> {
    const RECORD: &str = r#"{"record":"concluded","session":0,"verdict":"refused"}"#;
    /// A checksum, a space and a line's end.
    const FRAME: u64 = 10;
    loop {
        let length = fs::metadata(journal).context("the journal's length")?.len();
        let room = (PAGE - length % PAGE) % PAGE;
        if room < left + RECORD.len() as u64 + FRAME {
            return Ok(());
        }
        append_record(journal, RECORD)?;
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
