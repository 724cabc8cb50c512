//! Memory at the destination: taken cleanly, before or as pages are placed.

use std::{
    fs::File,
    io::IoSlice,
    path::Path,
    sync::{
        Mutex, TryLockError,
        atomic::{AtomicU64, Ordering},
    },
};

use migrate_common::PAGE_SIZE;
use rustix::{fs::FallocateFlags, io::Errno};

use super::{Mapping, MemoryError};
use crate::sync::lock;

/// Unit of reservation in pages (2 MiB).
pub const RESERVE_CHUNK: u64 = 512;

/// Pieces that one call writes at most: 15 pages in receive buffers of 3840 bytes are 17.
const PIECES: usize = 18;

/// Which chunks of one RAM file have memory behind them and in front of it, in the mapping.
///
/// Writing to a hole of a full tmpfs through a mapping kills the process (SIGBUS). So pages are written to the file as any
/// file's (`pwritev`), which fails cleanly. Or a chunk is **covered** first: allocated by `fallocate`, which fails cleanly too, and
/// faulted in. Then placing is a copy and no more; in all it costs more, because every page is looked up once more, mapped, and
/// taken out of the page table at the end (docs/performance.md). To allocate and not to map is no gain: allocating and
/// writing take turns (`inode_lock` in `shmem_fallocate` and `shmem_file_write_iter`, mm/shmem.c). In huge pages, where one look-up and one
/// entry are for 512 pages, covering costs least, and hugetlbfs knows no writing: there every chunk is covered.
pub struct Reservation {
    chunks: Vec<AtomicU64>,
    /// Whether pages may be written to the file.
    by_file: bool,
    /// Held while pages are written to the file. The kernel lets one thread at a time write to a file (`inode_lock`), and the others spin
    /// for as long as it runs; here they sleep, or have better to do ([`is_written_to`](Self::is_written_to)).
    writing: Mutex<()>,
}

/// Makes all of `file` a hole: it keeps its size and gives its memory back.
///
/// # Errors
/// What `fallocate` says. `path` is for the message.
pub fn empty(file: &File, path: &Path) -> Result<(), MemoryError> {
    let failed = |source| MemoryError::File { operation: "empty", path: path.to_owned(), source };
    let len = file.metadata().map_err(failed)?.len();
    rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, len)
        .map_err(|errno| failed(errno.into()))
}

/// The first and the last page of `len` bytes from byte `start` on.
fn spanned(start: u64, len: usize) -> [u64; 2] {
    [start, start + len.saturating_sub(1) as u64].map(|byte| byte / PAGE_SIZE as u64)
}

impl Reservation {
    /// Empties the file behind `mapping` and reserves nothing. What an earlier user left in it must not
    /// shine through where the guest's memory has holes.
    ///
    /// # Errors
    /// What `fallocate` says.
    pub fn clear(mapping: &Mapping) -> Result<Self, MemoryError> {
        empty(mapping.file(), mapping.path())?;
        let chunks = mapping.pages().div_ceil(RESERVE_CHUNK);
        Ok(Self {
            chunks: (0..chunks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            by_file: !mapping.is_huge(),
            writing: Mutex::new(()),
        })
    }

    /// Whether chunks must be covered before anything is placed in them.
    pub fn must_cover(&self) -> bool {
        !self.by_file
    }

    /// Whether another thread is writing to the file right now.
    pub fn is_written_to(&self) -> bool {
        matches!(self.writing.try_lock(), Err(TryLockError::WouldBlock))
    }

    /// Whether `len` bytes from byte `start` on would be placed by writing to the file, as far as can be told now.
    pub fn by_write(&self, start: u64, len: usize) -> bool {
        self.by_file && !spanned(start, len).into_iter().all(|page| self.covers(page))
    }

    /// Places `pieces`, one behind the other, `len` bytes in all, from byte `start` on; in two chunks at most. Safe to call from
    /// several threads, which are sure to see each other's bytes after a [`fence`](super::fence).
    ///
    /// # Errors
    /// [`MemoryError::NoRoom`] when the file system is full.
    ///
    /// # Panics
    /// As [`Mapping::write`].
    pub fn place<'a>(
        &self,
        mapping: &Mapping,
        start: u64,
        len: usize,
        pieces: impl Iterator<Item = &'a [u8]>,
    ) -> Result<(), MemoryError> {
        if self.by_write(start, len) {
            let _turn = lock(&self.writing);
            return write(mapping, start, pieces);
        }
        for page in spanned(start, len) {
            self.cover(mapping, page)?;
        }
        mapping.write_pieces(start / PAGE_SIZE as u64, (start % PAGE_SIZE as u64) as usize, len, pieces);
        Ok(())
    }

    /// Makes a page zero. Safe to call from several threads.
    ///
    /// # Errors
    /// [`MemoryError::NoRoom`] when the file system is full.
    pub fn zero(&self, mapping: &Mapping, page: u64) -> Result<(), MemoryError> {
        if self.covers(page) {
            mapping.zero(page);
        } else if self.by_file {
            let _turn = lock(&self.writing);
            return write(mapping, page * PAGE_SIZE as u64, std::iter::once(&[0; PAGE_SIZE][..]));
        }
        // What else was never covered is a hole, and reads as zero already.
        Ok(())
    }

    /// Whether the chunk of `page` is reserved.
    pub fn covers(&self, page: u64) -> bool {
        let chunk = page / RESERVE_CHUNK;
        self.chunks
            .get((chunk / 64) as usize)
            .is_some_and(|word| word.load(Ordering::Acquire) & (1 << (chunk % 64)) != 0)
    }

    /// Reserves the chunk of `page` and faults it into `mapping`. Safe to call from several threads.
    ///
    /// # Errors
    /// [`MemoryError::NoRoom`] when the file system is full.
    pub fn cover(&self, mapping: &Mapping, page: u64) -> Result<(), MemoryError> {
        if self.covers(page) {
            return Ok(());
        }
        let chunk = page / RESERVE_CHUNK;
        let start = chunk * RESERVE_CHUNK;
        let end = (start + RESERVE_CHUNK).min(mapping.pages());
        rustix::fs::fallocate(
            mapping.file(),
            FallocateFlags::KEEP_SIZE,
            start * PAGE_SIZE as u64,
            (end - start) * PAGE_SIZE as u64,
        )
        .map_err(|errno| failure(mapping, "reserve memory in", errno))?;
        mapping.populate(start, end)?;
        if let Some(word) = self.chunks.get((chunk / 64) as usize) {
            word.fetch_or(1 << (chunk % 64), Ordering::AcqRel);
        }
        Ok(())
    }
}

fn failure(mapping: &Mapping, operation: &'static str, errno: Errno) -> MemoryError {
    let path = mapping.path().to_owned();
    match errno {
        Errno::NOSPC | Errno::NOMEM => MemoryError::NoRoom { path, source: errno.into() },
        other => MemoryError::File { operation, path, source: other.into() },
    }
}

/// Writes pieces, one behind the other, at byte `at` of the file.
fn write<'a>(
    mapping: &Mapping,
    mut at: u64,
    mut pieces: impl Iterator<Item = &'a [u8]>,
) -> Result<(), MemoryError> {
    loop {
        let mut slices = [IoSlice::new(&[]); PIECES];
        let mut count = 0;
        for (slice, piece) in slices.iter_mut().zip(&mut pieces) {
            *slice = IoSlice::new(piece);
            count += 1;
        }
        let mut rest = &mut slices[..count];
        while !rest.is_empty() {
            match rustix::io::pwritev(mapping.file(), rest, at) {
                Ok(written) => {
                    at += written as u64;
                    IoSlice::advance_slices(&mut rest, written);
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(failure(mapping, "write to", errno)),
            }
        }
        if count < PIECES {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Access;
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn old_content_is_gone_and_only_asked_chunks_are_taken() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(b"stale", 4096).unwrap();
        let mapping = Mapping::new(file, "t".into(), Access::Write).unwrap();
        let reservation = Reservation::clear(&mapping).unwrap();
        assert!(super::super::data_extents(mapping.file(), mapping.path()).unwrap().is_empty());
        assert!(!reservation.covers(600));
        reservation.cover(&mapping, 600).unwrap();
        assert!(reservation.covers(512) && reservation.covers(1023));
        assert!(!reservation.covers(511) && !reservation.covers(1024));
        let extents = super::super::data_extents(mapping.file(), mapping.path()).unwrap();
        assert_eq!(extents, [super::super::Extent { start: 512, end: 1024 }]);
    }

    /// Through the file where nothing is covered, through the mapping where all is, and across the border.
    #[test]
    fn both_ways_of_placing_arrive_in_the_same_memory() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(4 << 20).unwrap();
        let mapping = Mapping::new(file, "t".into(), Access::Write).unwrap();
        let reservation = Reservation::clear(&mapping).unwrap();
        reservation.cover(&mapping, 512).unwrap();
        // More pieces than one call takes.
        let bytes: Vec<u8> = (0..2 * PAGE_SIZE).map(|at| (at / 7) as u8).collect();
        for page in [3, 511, 600] {
            let start = page * PAGE_SIZE as u64 + 100;
            reservation.place(&mapping, start, 2 * PAGE_SIZE - 100, bytes[100..].chunks(300)).unwrap();
            let mut came = vec![0; PAGE_SIZE];
            mapping.read(page, 0, &mut came).unwrap();
            assert!(
                came[..100].iter().all(|&byte| byte == 0) && came[100..] == bytes[100..PAGE_SIZE],
                "{page}"
            );
            mapping.read(page + 1, 0, &mut came).unwrap();
            assert_eq!(came, bytes[PAGE_SIZE..], "{page}");
            reservation.zero(&mapping, page + 1).unwrap();
            mapping.read(page + 1, 0, &mut came).unwrap();
            assert!(came.iter().all(|&byte| byte == 0), "{page}");
        }
        assert!(!reservation.covers(3) && !reservation.covers(511));
    }
}
