//! A RAM file mapped into this process.

use std::{
    fs::File,
    os::unix::fs::{FileExt, MetadataExt},
    path::PathBuf,
    ptr::NonNull,
};

use migrate_common::PAGE_SIZE;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::{MemoryError, copy::past_the_cache, is_zero};
use crate::checksum::Crc32c;

/// `f_type` of hugetlbfs in statfs(2): `HUGETLBFS_MAGIC` of `include/uapi/linux/magic.h`.
pub const HUGETLBFS: i64 = 0x9584_58f6;
/// The same of tmpfs: `TMPFS_MAGIC`.
const TMPFS: i64 = 0x0102_1994;

/// What a mapping is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading a running guest's pages.
    Read,
    /// Placing pages into a waiting guest.
    Write,
}

/// One memory backend's file, mapped shared.
///
/// The VMM's process writes to the bytes at any time. So they are copied in and out, or lent to what takes any bytes for any
/// bytes; a torn copy is harmless, since the write that tore it marks the page dirty again.
///
/// Copies of 4 KiB pages are read from the file, not from the mapping: the kernel copies in one pass what it would otherwise enter into
/// this process's page table first, page by page, and take out of it at the end (docs/performance.md). Huge pages, of hugetlbfs or of
/// tmpfs, cost one entry for 512 of them, and are read where they are mapped.
pub struct Mapping {
    start: NonNull<u8>,
    pages: u64,
    /// [`unit`](Self::unit).
    unit: u64,
    huge: bool,
    access: Access,
    path: PathBuf,
    file: File,
}

// SAFETY: an owned mapping without thread affinity.
unsafe impl Send for Mapping {}
// SAFETY: all access is by copies and sums of bytes that other processes change at any time anyway.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps all of `file`. `path` is for messages.
    ///
    /// # Errors
    /// What `fstat` and `mmap` say.
    pub fn new(file: File, path: PathBuf, access: Access) -> Result<Self, MemoryError> {
        let failed = |operation| {
            let path = path.clone();
            move |source| MemoryError::File { operation, path, source }
        };
        let metadata = file.metadata().map_err(failed("read the size of"))?;
        let len = metadata.len();
        let kind = file_system(&file);
        // Both tell the size of their pages so: `init_hugetlbfs_fs`, fs/hugetlbfs/inode.c, and `shmem_getattr`, mm/shmem.c.
        let huge = [HUGETLBFS, TMPFS].contains(&kind) && metadata.blksize() > PAGE_SIZE as u64;
        let unit = if kind == HUGETLBFS { metadata.blksize() } else { PAGE_SIZE as u64 };
        let pages = len / PAGE_SIZE as u64;
        let protection = match access {
            Access::Read => ProtFlags::READ,
            Access::Write => ProtFlags::READ | ProtFlags::WRITE,
        };
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing. NORESERVE: on
        // hugetlbfs a mapping would otherwise claim the whole file's hugepages.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len as usize,
                protection,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &file,
                0,
            )
        }
        .map_err(|errno| failed("map")(errno.into()))?;
        let start = NonNull::new(start.cast())
            .ok_or_else(|| failed("map")(std::io::ErrorKind::OutOfMemory.into()))?;
        Ok(Self { start, pages, unit, huge, access, path, file })
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Unit in which the kernel finds the file's memory dirty, bytes: the huge page of hugetlbfs (`hugetlbfs_get_inode` in
    /// `fs/hugetlbfs/inode.c`), else 4 KiB: protecting huge pages of tmpfs splits their mappings (`pgtable_split_needed`, `mm/mprotect.c`).
    pub fn unit(&self) -> u64 {
        self.unit
    }

    /// Whether that is more than a page: RAM on hugetlbfs.
    pub fn is_hugetlbfs(&self) -> bool {
        self.unit > PAGE_SIZE as u64
    }

    /// Whether memory comes in huge pages, from hugetlbfs, or from tmpfs mounted with `huge=`, as far as there are any.
    pub fn is_huge(&self) -> bool {
        self.huge
    }

    /// The file's path, for messages; the file itself may have been unlinked.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// The mapped file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The same mapping, taken for one of huge pages: they cannot be had without privilege.
    #[cfg(test)]
    pub(crate) fn taken_for_huge(self, huge: bool) -> Self {
        let mut mapping = self;
        mapping.huge = huge;
        mapping
    }

    fn at(&self, page: u64, offset: usize, len: usize) -> NonNull<u8> {
        let room = self.pages.checked_sub(page).map_or(0, |pages| pages as usize * PAGE_SIZE);
        assert!(offset.checked_add(len).is_some_and(|end| end <= room), "page {page} of {}", self.pages);
        // SAFETY: in bounds of the mapping, just checked.
        unsafe { self.start.add(page as usize * PAGE_SIZE + offset) }
    }

    /// Copies bytes out, from `offset` of a page on; they may reach into the pages behind it. Reading a hole of a file in
    /// huge pages allocates it: read only pages that exist.
    ///
    /// # Errors
    /// What `pread` says, and when the file has become shorter since it was mapped.
    ///
    /// # Panics
    /// When the bytes lie outside the file as it was mapped: callers' page numbers come from this guest's own layout.
    pub fn read(&self, page: u64, offset: usize, to: &mut [u8]) -> Result<(), MemoryError> {
        let from = self.at(page, offset, to.len());
        if !self.is_huge() {
            return self
                .file
                .read_exact_at(to, page * PAGE_SIZE as u64 + offset as u64)
                .map_err(|source| MemoryError::File { operation: "read", path: self.path.clone(), source });
        }
        // SAFETY: both ranges are valid for to.len() bytes and do not overlap: `to` is not of the mapping.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    /// Whether a page holds nothing but zeros, as far as anybody can tell while the guest writes. Looking at a hole of any
    /// file allocates it: the page must exist.
    ///
    /// # Panics
    /// As [`read`](Self::read).
    pub fn is_zero(&self, page: u64) -> bool {
        is_zero(self.looked_at(page, 1))
    }

    /// Goes on with `sum` over a page. While the guest writes the page, the sum may be of content that never was.
    ///
    /// # Panics
    /// As [`read`](Self::read).
    pub(crate) fn checksum(&self, page: u64, sum: &mut Crc32c) {
        sum.update(self.looked_at(page, 1));
    }

    /// Lends `pages` pages from `page` on to `user`, which looks at every byte once and takes it for whatever it is then: a cipher. As with
    /// [`read`](Self::read), a hole is filled by it.
    ///
    /// # Panics
    /// As [`read`](Self::read).
    pub(crate) fn lend<T>(&self, page: u64, pages: usize, user: impl FnOnce(&[u8]) -> T) -> T {
        user(self.looked_at(page, pages))
    }

    /// The bytes of pages, for functions whose result depends on them and nothing else: they may change between two looks.
    fn looked_at(&self, page: u64, pages: usize) -> &[u8] {
        let from = self.at(page, 0, pages * PAGE_SIZE);
        // SAFETY: in bounds, mapped as long as self. Other processes may write to it; this one does not while it reads
        // (only receivers write, into a mapping of their own), and all users above take any bytes for any bytes.
        unsafe { std::slice::from_raw_parts(from.as_ptr(), pages * PAGE_SIZE) }
    }

    /// Copies bytes in, from `offset` of a page on; they may reach into the pages behind it. This thread sees them at once, others
    /// are sure to after a [`fence`](super::fence).
    ///
    /// # Panics
    /// When they do not lie within the file (the receiver checks what comes from the wire first) or the
    /// mapping is for reading.
    pub fn write(&self, page: u64, offset: usize, from: &[u8]) {
        self.write_pieces(page, offset, from.len(), std::iter::once(from));
    }

    /// The same with bytes in pieces, `len` in all, one behind the other.
    ///
    /// # Panics
    /// As [`write`](Self::write), and when they are more.
    pub fn write_pieces<'a>(
        &self,
        page: u64,
        offset: usize,
        len: usize,
        pieces: impl Iterator<Item = &'a [u8]>,
    ) {
        assert_eq!(self.access, Access::Write);
        let to = self.at(page, offset, len);
        // SAFETY: `to` is valid for `len` bytes, and no piece is of the mapping.
        unsafe { past_the_cache(pieces, to.as_ptr(), len) };
    }

    /// Fills a page with zeros.
    ///
    /// # Panics
    /// As [`write`](Self::write).
    pub fn zero(&self, page: u64) {
        assert_eq!(self.access, Access::Write);
        let to = self.at(page, 0, PAGE_SIZE);
        // SAFETY: in bounds, writable.
        unsafe { std::ptr::write_bytes(to.as_ptr(), 0, PAGE_SIZE) };
    }

    /// Brings the page-table entries of `start..end` in, so that touching these pages faults no more.
    ///
    /// # Errors
    /// What `madvise` says; `ENOMEM`/`EFAULT` for lack of memory.
    pub fn populate(&self, start: u64, end: u64) -> Result<(), MemoryError> {
        let end = end.min(self.pages);
        if start >= end {
            return Ok(());
        }
        let advice = match self.access {
            Access::Read => Advice::LinuxPopulateRead,
            Access::Write => Advice::LinuxPopulateWrite,
        };
        let from = self.at(start, 0, 0);
        // SAFETY: the range lies within our mapping, and populating changes no content.
        unsafe { rustix::mm::madvise(from.as_ptr().cast(), ((end - start) as usize) * PAGE_SIZE, advice) }
            .map_err(|errno| MemoryError::File {
                operation: "populate",
                path: self.path.clone(),
                source: errno.into(),
            })
    }
}

/// `f_type` in statfs(2); 0, which is nobody's, when that fails.
fn file_system(file: &File) -> i64 {
    // `f_type` has another width on other architectures.
    #[allow(clippy::unnecessary_cast, clippy::useless_conversion, reason = "see above")]
    rustix::fs::fstatfs(file).map_or(0, |system| system.f_type as i64)
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing borrows from it. Failure leaks it, no more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.pages as usize * PAGE_SIZE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_looked_at_where_it_lies() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(2 * PAGE_SIZE as u64).unwrap();
        file.write_all_at(b"x", 2 * PAGE_SIZE as u64 - 1).unwrap();
        let mapping = Mapping::new(file, "test".into(), Access::Read).unwrap();
        assert!(mapping.is_zero(0) && !mapping.is_zero(1));
        let mut copy = [0; PAGE_SIZE];
        mapping.read(1, 0, &mut copy).unwrap();
        let mut sum = Crc32c::new();
        mapping.checksum(1, &mut sum);
        assert_eq!(sum.value(), crate::checksum::crc32c(&copy));
    }
}
