//! Finding the guest's RAM in the VMM's address space.

use std::{
    fs::File,
    ops::Range,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use migrate_common::PAGE_SIZE;

use super::MemoryError;
use crate::files::{self, MAX_PROC};

/// A mapping of part of a RAM file in the VMM's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vma {
    /// First address.
    pub start: u64,
    /// One past the last address.
    pub end: u64,
    /// Page of the file at `start`.
    pub file_page: u64,
}

impl Vma {
    /// The part of it that maps these pages of the file, if any does.
    pub fn cut(&self, pages: &Range<u64>) -> Option<Self> {
        let page = PAGE_SIZE as u64;
        let last = self.file_page + (self.end - self.start) / page;
        let (first, last) = (self.file_page.max(pages.start), last.min(pages.end));
        let address = |number: u64| self.start + (number - self.file_page) * page;
        (first < last).then(|| Self { start: address(first), end: address(last), file_page: first })
    }
}

/// The file behind one memory backend, as the VMM has it mapped.
#[derive(Debug)]
pub struct RamFile {
    /// Path as the VMM's memory map shows it, for messages.
    pub path: PathBuf,
    /// Where it is mapped.
    pub vmas: Vec<Vma>,
    /// The process.
    pub pid: u32,
    /// Size in bytes.
    pub size: u64,
}

impl RamFile {
    /// Opens the mapped file itself, also when its path is gone or lies in another mount namespace.
    ///
    /// # Errors
    /// What opening says; needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE.
    pub fn open(&self, write: bool) -> Result<File, MemoryError> {
        let Some(vma) = self.vmas.first() else {
            return Err(MemoryError::File {
                operation: "open",
                path: self.path.clone(),
                source: std::io::ErrorKind::NotFound.into(),
            });
        };
        let link = format!("/proc/{}/map_files/{:x}-{:x}", self.pid, vma.start, vma.end);
        File::options().read(true).write(write).open(&link).map_err(|source| MemoryError::File {
            operation: "open the mapped file",
            path: self.path.clone(),
            source,
        })
    }
}

struct MapsLine<'a> {
    vma: Vma,
    shared: bool,
    path: &'a str,
}

/// One line of `/proc/PID/maps` (proc_pid_maps(5)).
fn parse_line(line: &str) -> Option<MapsLine<'_>> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    let offset = fields.next()?;
    let (_device, _inode) = (fields.next()?, fields.next()?);
    let path = fields.next().unwrap_or("").trim_start();
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    if start >= end {
        return None;
    }
    Some(MapsLine {
        vma: Vma { start, end, file_page: u64::from_str_radix(offset, 16).ok()? / PAGE_SIZE as u64 },
        shared: permissions.as_bytes().get(3) == Some(&b's'),
        path,
    })
}

/// Whether a mapped path belongs to a backend with this `mem-path`: the file itself, or, where `mem-path` is
/// a directory, the unlinked file that QEMU makes there (`qemu_ram_alloc_from_file` in system/physmem.c).
fn belongs(mapped: &str, mem_path: &str, id: &str) -> bool {
    let mapped = mapped.strip_suffix(" (deleted)").unwrap_or(mapped);
    mapped == mem_path
        || mapped
            .strip_prefix(mem_path.trim_end_matches('/'))
            .and_then(|rest| rest.strip_prefix("/qemu_back_mem."))
            .is_some_and(|rest| rest.strip_prefix(&mangled(id)).is_some_and(|rest| rest.starts_with('.')))
}

fn mangled(id: &str) -> String {
    id.replace('/', "_")
}

/// Whether any process has a file mapped: whether somebody may be using it as RAM.
///
/// # Errors
/// When that cannot be told.
pub fn is_mapped(file: &Path) -> std::io::Result<bool> {
    let Ok(metadata) = file.metadata() else { return Ok(false) };
    let inode = metadata.ino().to_string();
    for process in std::fs::read_dir("/proc")? {
        let name = process?.file_name();
        if !name.to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        // One that has ended meanwhile maps nothing.
        match files::read_lossy(Path::new("/proc").join(name).join("maps"), MAX_PROC) {
            // The number alone: another file with the same one on another file system only keeps this one as it is.
            Ok(maps) if maps.lines().any(|line| line.split_whitespace().nth(4) == Some(inode.as_str())) => {
                return Ok(true);
            }
            Err(error) if error.kind() == std::io::ErrorKind::InvalidData => return Err(error),
            // One that has ended meanwhile maps nothing.
            Ok(_) | Err(_) => {}
        }
    }
    Ok(false)
}

/// The RAM files of `backends` (`(id, mem-path, size in bytes)`) in process `pid`, in the same order.
///
/// # Errors
/// [`MemoryError::NotShared`] when one is mapped privately or not at all.
pub fn find_ram_files(pid: u32, backends: &[(String, String, u64)]) -> Result<Vec<RamFile>, MemoryError> {
    let path = PathBuf::from(format!("/proc/{pid}/maps"));
    let maps = files::read_lossy(&path, MAX_PROC).map_err(|source| MemoryError::File {
        operation: "read",
        path,
        source,
    })?;
    backends.iter().map(|backend| find_in(&maps, pid, backend)).collect()
}

fn find_in(
    maps: &str,
    pid: u32,
    (id, mem_path, size): &(String, String, u64),
) -> Result<RamFile, MemoryError> {
    let not_shared = |found: String| MemoryError::NotShared { backend: id.clone(), pid, found };
    let mine: Vec<MapsLine<'_>> =
        maps.lines().filter_map(parse_line).filter(|line| belongs(line.path, mem_path, id)).collect();
    if mine.iter().any(|line| !line.shared) {
        return Err(not_shared(format!("mapped privately from {mem_path} (share=off)")));
    }
    let vmas: Vec<Vma> = mine.iter().map(|line| line.vma).collect();
    let mapped = vmas.iter().fold(0u64, |sum, vma| sum.saturating_add(vma.end - vma.start));
    if mapped != *size {
        return Err(not_shared(format!("mapped from {mem_path} for {mapped} of its {size} bytes")));
    }
    Ok(RamFile { path: mem_path.into(), vmas, pid, size: *size })
}

/// One input of the fuzz target `maps`: a memory map in which a backend's file is looked for.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(maps: &str) {
    for (path, size) in [("/dev/shm/ram", 0x4000), ("/dev/shm", 0x1000)] {
        if let Ok(file) = find_in(maps, 1, &("ram".into(), path.into(), size)) {
            assert!(file.vmas.iter().all(|vma| vma.start < vma.end && vma.end - vma.start <= size));
            assert_eq!(file.vmas.iter().map(|vma| vma.end - vma.start).sum::<u64>(), size);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_cut_to_pages_of_the_file() {
        let vma = Vma { start: 0x10_000, end: 0x18_000, file_page: 5 };
        assert_eq!(vma.cut(&(0..100)), Some(vma));
        assert_eq!(vma.cut(&(7..9)), Some(Vma { start: 0x12_000, end: 0x14_000, file_page: 7 }));
        assert_eq!(vma.cut(&(0..6)), Some(Vma { start: 0x10_000, end: 0x11_000, file_page: 5 }));
        assert_eq!(vma.cut(&(12..99)), Some(Vma { start: 0x17_000, end: 0x18_000, file_page: 12 }));
        for outside in [0..5, 13..20, 7..7] {
            assert_eq!(vma.cut(&outside), None, "{outside:?}");
        }
    }

    #[test]
    fn a_file_is_in_use_while_it_is_mapped() {
        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        file.as_file().set_len(4096).unwrap();
        assert!(!is_mapped(file.path()).unwrap());
        let mapping =
            super::super::Mapping::new(file.reopen().unwrap(), "t".into(), super::super::Access::Read)
                .unwrap();
        assert!(is_mapped(file.path()).unwrap());
        drop(mapping);
        assert!(!is_mapped(file.path()).unwrap());
        assert!(!is_mapped(Path::new("/nonexistent")).unwrap());
    }

    const MAPS: &str = "\
55d0c0a00000-55d0c0b00000 r-xp 00000000 fe:00 123                        /usr/bin/qemu-system-x86_64
7f0000000000-7f0010000000 rw-s 00000000 00:1a 42                         /dev/shm/vm one/ram
7f0010000000-7f0020000000 rw-s 10000000 00:1a 42                         /dev/shm/vm one/ram
7f1000000000-7f1000001000 rw-s 00000000 00:1a 43                         /dev/shm/dir/qemu_back_mem.mem1.aB3dE (deleted)
7f2000000000-7f2000001000 rw-p 00000000 00:1a 44                         /dev/shm/private
7ffd1b5e4000-7ffd1b605000 rw-p 00000000 00:00 0                          [stack]
";

    fn find(id: &str, path: &str, size: u64) -> Result<RamFile, MemoryError> {
        find_in(MAPS, 1, &(id.into(), path.into(), size))
    }

    #[test]
    fn finds_files_even_in_parts_and_unlinked() {
        let file = find("ram", "/dev/shm/vm one/ram", 0x2000_0000).unwrap();
        assert_eq!(file.vmas.len(), 2);
        assert_eq!(file.vmas[1].file_page, 0x10000);
        assert_eq!(find("mem1", "/dev/shm/dir", 4096).unwrap().vmas.len(), 1);
        assert_eq!(find("mem1", "/dev/shm/dir/", 4096).unwrap().vmas.len(), 1);
    }

    #[test]
    fn lengths_that_cannot_be_do_not_overflow() {
        let find = |maps: &str| find_in(maps, 1, &("ram".into(), "/r".into(), 4096));
        assert!(find("3000-1000 rw-s 00000000 00:1a 42  /r").is_err());
        let all = "0-ffffffffffffffff rw-s 00000000 00:1a 42  /r\n".repeat(2);
        assert!(find(&all).is_err());
    }

    #[test]
    fn says_what_is_wrong_and_what_to_do() {
        let private = find("p", "/dev/shm/private", 4096).unwrap_err().to_string();
        assert!(private.contains("share=off") && private.contains("share=on"), "{private}");
        let part = find("ram", "/dev/shm/vm one/ram", 0x3000_0000).unwrap_err().to_string();
        assert!(part.contains("for 536870912 of its 805306368 bytes"), "{part}");
        assert!(find("mem2", "/dev/shm/dir", 4096).is_err(), "another backend's file");
    }
}
