//! Memory of its own and parts of files, mapped side by side.

use std::{os::fd::BorrowedFd, ptr::NonNull};

use rustix::{
    io::Errno,
    mm::{MapFlags, ProtFlags},
};

use super::umem::{CHUNK_SIZE, UmemMemory};

/// All parts begin at a multiple of this in memory, bytes: what hugetlbfs wants for its 2 MiB pages.
const ALIGNMENT: usize = 2 << 20;

/// A part of a file.
#[derive(Clone, Copy, Debug)]
pub struct FilePart<'a> {
    /// The file, open for reading and writing: the kernel pins UMEM as memory that may be written to.
    pub file: BorrowedFd<'a>,
    /// Where the part begins in the file, bytes.
    pub offset: u64,
    /// Its length, bytes.
    pub len: usize,
}

/// One range of addresses: zeroed memory of its own, then parts of files, mapped shared.
///
/// Being registered as UMEM, every page of it is made to exist and pinned; parts with holes would lose them.
pub struct JoinedMemory {
    /// All of it, alignment included.
    reserved: Reserved,
    start: NonNull<u8>,
    len: usize,
    own: usize,
}

/// A range of addresses, given back when dropped.
struct Reserved {
    start: NonNull<u8>,
    len: usize,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // SAFETY: the range is ours with all that was mapped into it, and nothing borrows from it any more. Failure leaks
        // it, no more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

// SAFETY: an owned mapping without thread affinity.
unsafe impl Send for JoinedMemory {}
// SAFETY: the type itself gives no access to the bytes.
unsafe impl Sync for JoinedMemory {}

impl JoinedMemory {
    /// Maps at least `own` bytes of its own, and behind them `parts`.
    ///
    /// # Errors
    /// What `mmap` says; `EINVAL` for a part that is not a whole number of chunks.
    pub fn new(own: usize, parts: &[FilePart<'_>]) -> rustix::io::Result<Self> {
        let own = own.next_multiple_of(ALIGNMENT);
        let len = own + parts.iter().map(|part| part.len).sum::<usize>();
        if !parts.iter().all(|part| part.len.is_multiple_of(CHUNK_SIZE)) {
            return Err(Errno::INVAL);
        }
        let total = len + ALIGNMENT;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing. It holds the range, no memory.
        let reserved = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                total,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let reserved = NonNull::new(reserved.cast::<u8>()).ok_or(Errno::NOMEM)?;
        let reserved = Reserved { start: reserved, len: total };
        let skip = reserved.start.as_ptr().align_offset(ALIGNMENT);
        // SAFETY: less than ALIGNMENT, and the range has as much to spare.
        let start = unsafe { reserved.start.add(skip) };
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: replaces a part of the range reserved above, which nobody else knows.
        unsafe {
            rustix::mm::mmap_anonymous(
                start.as_ptr().cast(),
                own,
                access,
                MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::POPULATE,
            )
        }?;
        let mut at = own;
        for part in parts {
            // SAFETY: as above: `own` and all parts together are `len` bytes. NORESERVE: on hugetlbfs a mapping would
            // otherwise claim hugepages for its holes.
            unsafe {
                rustix::mm::mmap(
                    start.add(at).as_ptr().cast(),
                    part.len,
                    access,
                    MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE,
                    part.file,
                    part.offset,
                )
            }?;
            at += part.len;
        }
        Ok(Self { reserved, start, len, own })
    }

    /// Where the first part begins, bytes from the start.
    pub fn parts_at(&self) -> u64 {
        self.own as u64
    }
}

// SAFETY: mapped for as long as `reserved` lives, aligned, readable and writable.
unsafe impl UmemMemory for JoinedMemory {
    fn region(&self) -> (NonNull<u8>, usize) {
        debug_assert!(self.len < self.reserved.len);
        (self.start, self.len)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use super::super::Umem;
    use super::*;

    #[test]
    fn parts_lie_side_by_side() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(100 * 4096).unwrap();
        file.write_all_at(b"seventh", 7 * 4096).unwrap();
        file.write_all_at(b"fiftieth", 50 * 4096).unwrap();
        let part =
            |page: u64, pages: usize| FilePart { file: file.as_fd(), offset: page * 4096, len: pages * 4096 };
        let joined = JoinedMemory::new(4096, &[part(50, 1), part(7, 3)]).unwrap();
        let at = joined.parts_at();
        let umem = Umem::over(Arc::new(joined)).unwrap();
        assert_eq!(umem.len() as u64, at + 4 * 4096);
        // SAFETY: nobody else has these chunks.
        let bytes = unsafe { umem.bytes_mut(at, 4 * 4096) }.unwrap();
        assert_eq!((&bytes[..8], &bytes[4096..4103]), (&b"fiftieth"[..], &b"seventh"[..]));
    }

    #[test]
    fn no_part_of_a_chunk() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        let part = FilePart { file: file.as_fd(), offset: 0, len: 100 };
        assert_eq!(JoinedMemory::new(4096, &[part]).err(), Some(Errno::INVAL));
    }
}
