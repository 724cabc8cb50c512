//! `PAGEMAP_SCAN`: which pages of another process were written, and protecting them again in one step.
//!
//! Kernel: `fs/proc/task_mmu.c`, documented in `Documentation/admin-guide/mm/pagemap.rst`; since Linux 6.7.

use std::{
    fs::File,
    io::{Error, ErrorKind},
    os::fd::AsRawFd,
};

use migrate_common::PAGE_SIZE;

use super::{MemoryError, Vma};

const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// `struct pm_scan_arg` of `include/uapi/linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region` of the same file.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong =
    (3 << 30) | ((size_of::<ScanArgument>() as libc::c_ulong) << 16) | ((b'f' as libc::c_ulong) << 8) | 16;

/// Regions one call returns at most.
const REGIONS: usize = 4096;

/// The page map of one process, open for scanning.
pub struct Pagemap {
    file: File,
    pid: u32,
    regions: Vec<Region>,
}

/// Whether this kernel can scan: asked of our own process, changes nothing.
pub fn supports_scan() -> bool {
    let Ok(mut pagemap) = Pagemap::open(std::process::id()) else { return false };
    let vma = Vma { start: 0, end: PAGE_SIZE as u64, file_page: 0 };
    pagemap.scan(&vma, 0, 0, PAGE_IS_PRESENT, |_, _| {}).is_ok()
}

impl Pagemap {
    /// Opens `/proc/PID/pagemap`.
    ///
    /// # Errors
    /// Without CAP_SYS_PTRACE over the process; [`MemoryError::Gone`].
    pub fn open(pid: u32) -> Result<Self, MemoryError> {
        let path = format!("/proc/{pid}/pagemap");
        let file = File::open(&path).map_err(|source| match source.kind() {
            ErrorKind::NotFound => MemoryError::Gone { pid },
            _ => MemoryError::File { operation: "open", path: path.into(), source },
        })?;
        Ok(Self { file, pid, regions: vec![Region::default(); REGIONS] })
    }

    /// Calls `written(first, end)` with file pages that were written since they were last protected, and
    /// protects them again: get and clear in one step, so that no write falls between.
    ///
    /// # Errors
    /// [`MemoryError::Tracking`]; `EPERM` when the range is not registered for asynchronous protection. [`MemoryError::Gone`].
    pub fn take_written(&mut self, vma: &Vma, written: impl FnMut(u64, u64)) -> Result<(), MemoryError> {
        self.scan(vma, PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, PAGE_IS_WRITTEN, 0, written)
    }

    /// Calls `present(first, end)` with file pages that the process has in memory or swapped out.
    ///
    /// # Errors
    /// [`MemoryError::Tracking`], [`MemoryError::Gone`].
    pub fn present(&mut self, vma: &Vma, present: impl FnMut(u64, u64)) -> Result<(), MemoryError> {
        self.scan(vma, 0, 0, PAGE_IS_PRESENT | PAGE_IS_SWAPPED, present)
    }

    fn scan(
        &mut self,
        vma: &Vma,
        flags: u64,
        all_of: u64,
        any_of: u64,
        mut found: impl FnMut(u64, u64),
    ) -> Result<(), MemoryError> {
        let page = PAGE_SIZE as u64;
        let mut start = vma.start;
        while start < vma.end {
            let mut argument = ScanArgument {
                size: size_of::<ScanArgument>() as u64,
                flags,
                start,
                end: vma.end,
                vec: self.regions.as_mut_ptr() as u64,
                vec_len: REGIONS as u64,
                category_mask: all_of,
                category_anyof_mask: any_of,
                return_mask: all_of | any_of,
                ..ScanArgument::default()
            };
            // SAFETY: the argument has the layout and size the kernel expects, and `vec` points to vec_len
            // regions that are ours for the duration of the call.
            let count = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
            let Ok(count) = usize::try_from(count) else {
                let (pid, source) = (self.pid, Error::last_os_error());
                return Err(match source.raw_os_error() {
                    // Its address space is gone, though its page map is still open here.
                    Some(libc::ESRCH) => MemoryError::Gone { pid },
                    _ => MemoryError::Tracking { pid, step: "PAGEMAP_SCAN", source },
                });
            };
            for region in self.regions.iter().take(count) {
                let offset = |address: u64| vma.file_page + (address.saturating_sub(vma.start)) / page;
                found(offset(region.start), offset(region.end));
            }
            // Only a full vector means that there may be more: `walk_end` stops short of `end` also when
            // nothing more matches.
            if count < REGIONS {
                break;
            }
            start = argument.walk_end.max(start + page);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sees_its_own_pages() {
        if !supports_scan() {
            println!("skipped: no PAGEMAP_SCAN here");
            return;
        }
        let memory = vec![1u8; 64 * PAGE_SIZE];
        let start = (memory.as_ptr() as u64).next_multiple_of(PAGE_SIZE as u64);
        let vma = Vma { start, end: start + 32 * PAGE_SIZE as u64, file_page: 7 };
        let mut seen = 0;
        Pagemap::open(std::process::id())
            .unwrap()
            .present(&vma, |first, end| {
                assert!(first >= 7 && end <= 39);
                seen += end - first;
            })
            .unwrap();
        assert_eq!(seen, 32);
    }

    #[test]
    fn a_process_that_has_ended_is_said_to_be_gone() {
        if !supports_scan() {
            println!("skipped: no PAGEMAP_SCAN here");
            return;
        }
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pagemap = Pagemap::open(child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        let vma = Vma { start: 0, end: PAGE_SIZE as u64, file_page: 0 };
        let scanned = pagemap.unwrap().present(&vma, |_, _| {});
        for failed in [scanned, Pagemap::open(child.id()).map(drop)] {
            let error = failed.unwrap_err();
            assert!(matches!(error, MemoryError::Gone { pid } if pid == child.id()), "{error}");
            assert_eq!(error.to_string(), format!("QEMU (process {}) has ended", child.id()));
        }
    }
}
