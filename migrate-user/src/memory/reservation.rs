//! Memory at the destination, taken before it is needed.

use std::{
    fs::File,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use migrate_common::PAGE_SIZE;
use rustix::{fs::FallocateFlags, io::Errno};

use super::{Mapping, MemoryError};

/// Unit of reservation in pages (2 MiB).
pub const RESERVE_CHUNK: u64 = 512;

/// Which chunks of one RAM file have memory behind them.
///
/// Writing to a hole of a full tmpfs through a mapping kills the process (SIGBUS). Every chunk is therefore
/// allocated by `fallocate`, which fails cleanly, before its first page is placed.
pub struct Reservation {
    chunks: Vec<AtomicU64>,
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

impl Reservation {
    /// Empties the file behind `mapping` and reserves nothing. What an earlier user left in it must not
    /// shine through where the guest's memory has holes.
    ///
    /// # Errors
    /// What `fallocate` says.
    pub fn clear(mapping: &Mapping) -> Result<Self, MemoryError> {
        empty(mapping.file(), mapping.path())?;
        let chunks = mapping.pages().div_ceil(RESERVE_CHUNK);
        Ok(Self { chunks: (0..chunks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect() })
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
        .map_err(|errno| match errno {
            Errno::NOSPC | Errno::NOMEM => {
                MemoryError::NoRoom { path: mapping.path().to_owned(), source: errno.into() }
            }
            other => MemoryError::File {
                operation: "reserve memory in",
                path: mapping.path().to_owned(),
                source: other.into(),
            },
        })?;
        mapping.populate(start, end)?;
        if let Some(word) = self.chunks.get((chunk / 64) as usize) {
            word.fetch_or(1 << (chunk % 64), Ordering::AcqRel);
        }
        Ok(())
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
}
