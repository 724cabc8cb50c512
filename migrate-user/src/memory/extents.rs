//! Which parts of a RAM file exist.

use std::{
    fs::File,
    os::{
        fd::AsFd,
        unix::fs::{FileExt, MetadataExt},
    },
    path::Path,
};

use migrate_common::PAGE_SIZE;
use rustix::{fs::SeekFrom, io::Errno};

use super::{Mapping, MemoryError, PageSet, RamLayout, is_zero};

/// Bytes of a huge page that are looked at in one go: what stays in a core's own cache.
const PART: usize = 128 << 10;
/// Unit of a file's `st_blocks`, bytes (stat(3type)).
const BLOCK: u64 = 512;

/// Pages `start..end` of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First page.
    pub start: u64,
    /// One past the last page.
    pub end: u64,
}

/// The parts of `file` that hold data, ascending; what lies between is holes, which read as zero. On tmpfs
/// this is exact to the page and includes what was swapped out. hugetlbfs calls everything data.
///
/// # Errors
/// What `lseek` says.
pub fn data_extents(file: &File, path: &Path) -> Result<Vec<Extent>, MemoryError> {
    let mut extents = Vec::new();
    let mut at = 0;
    loop {
        let start = match rustix::fs::seek(file.as_fd(), SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(extents),
            Err(errno) => return Err(failed(path, errno)),
        };
        at = rustix::fs::seek(file.as_fd(), SeekFrom::Hole(start)).map_err(|errno| failed(path, errno))?;
        let page = PAGE_SIZE as u64;
        extents.push(Extent { start: start / page, end: at.div_ceil(page) });
    }
}

/// The stretches of `chunk` pages of a RAM file that hold data at all, as ranges of stretches `start..end`, ascending. Much quicker
/// than [`existing_pages`]: it looks for the begin of data only, once a stretch.
///
/// # Errors
/// What `lseek` and `read` say.
pub fn data_chunks(mapping: &Mapping, chunk: u64) -> Result<Vec<(u64, u64)>, MemoryError> {
    let (file, path) = (mapping.file(), mapping.path());
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    if mapping.is_hugetlbfs() {
        let extents = filled_extents(file, path, mapping.unit())?.into_iter();
        return Ok(extents.map(|extent| (extent.start / chunk, extent.end.div_ceil(chunk))).collect());
    }
    let mut next = 0;
    loop {
        let at = match rustix::fs::seek(file.as_fd(), SeekFrom::Data(next * chunk * PAGE_SIZE as u64)) {
            Ok(at) => at / PAGE_SIZE as u64 / chunk,
            Err(Errno::NXIO) => return Ok(ranges),
            Err(errno) => return Err(failed(path, errno)),
        };
        match ranges.last_mut() {
            Some((_, end)) if *end == at => *end += 1,
            _ => ranges.push((at, at + 1)),
        }
        next = at + 1;
    }
}

/// The same of a file on hugetlbfs, where `lseek` finds no holes, by huge pages of `unit` bytes: those that hold anything but
/// zeros. They are found by reading the file, because `read` leaves a hole a hole (`hugetlbfs_read_iter` in
/// `fs/hugetlbfs/inode.c`) where a look through a mapping allocates a huge page. What a process has in its page table
/// says nothing: pages that arrived by a migration are in the file and in nobody's table.
fn filled_extents(file: &File, path: &Path, unit: u64) -> Result<Vec<Extent>, MemoryError> {
    let failed = |source| MemoryError::File { operation: "find the data in", path: path.to_owned(), source };
    let metadata = file.metadata().map_err(failed)?;
    let (len, page) = (metadata.len(), PAGE_SIZE as u64);
    if metadata.blocks() * BLOCK >= len {
        return Ok(vec![Extent { start: 0, end: len / page }]);
    }
    let mut extents = Vec::new();
    let mut part = vec![0; PART];
    for start in (0..len).step_by(unit as usize) {
        let end = (start + unit).min(len);
        for at in (start..end).step_by(PART) {
            let part = &mut part[..PART.min((end - at) as usize)];
            file.read_exact_at(part, at).map_err(failed)?;
            if !is_zero(part) {
                extents.push(Extent { start: start / page, end: end / page });
                break;
            }
        }
    }
    Ok(extents)
}

/// Every page of a guest that exists in its RAM files; the others read as zero, and reading holes among them through a mapping
/// would fill them. `mappings` in the layout's order.
///
/// # Errors
/// What `lseek` and `read` say.
pub fn existing_pages(layout: &RamLayout, mappings: &[Mapping]) -> Result<PageSet, MemoryError> {
    let mut pages = PageSet::new(layout.pages());
    for (index, mapping) in mappings.iter().enumerate() {
        let first = layout.first_page(index);
        let limit = layout.first_page(index + 1);
        let extents = match mapping.is_hugetlbfs() {
            true => filled_extents(mapping.file(), mapping.path(), mapping.unit())?,
            false => data_extents(mapping.file(), mapping.path())?,
        };
        for extent in extents {
            pages.insert_range(first + extent.start, (first + extent.end).min(limit));
        }
    }
    Ok(pages)
}

fn failed(path: &Path, errno: Errno) -> MemoryError {
    MemoryError::File { operation: "find the data in", path: path.to_owned(), source: errno.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_holds_anything_is_found_by_reading() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(10 << 20).unwrap();
        let found = |file: &File| filled_extents(file, Path::new("t"), 2 << 20).unwrap();
        assert_eq!(found(&file), []);
        file.write_all_at(&[0; 4096], 0).unwrap();
        file.write_all_at(b"x", (4 << 20) - 1).unwrap();
        file.write_all_at(b"x", 8 << 20).unwrap();
        let before = file.metadata().unwrap().blocks();
        assert_eq!(found(&file), [Extent { start: 512, end: 1024 }, Extent { start: 2048, end: 2560 }]);
        assert_eq!(file.metadata().unwrap().blocks(), before, "nothing was allocated");
    }

    #[test]
    fn holes_are_left_out() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(100 * 4096).unwrap();
        assert_eq!(data_extents(&file, Path::new("t")).unwrap(), []);
        file.write_all_at(b"x", 10 * 4096 + 5).unwrap();
        file.write_all_at(&[1; 8192], 20 * 4096).unwrap();
        assert_eq!(
            data_extents(&file, Path::new("t")).unwrap(),
            [Extent { start: 10, end: 11 }, Extent { start: 20, end: 22 }]
        );
    }

    #[test]
    fn chunks_are_those_with_data() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(100 * 4096).unwrap();
        let mapping =
            Mapping::new(file.try_clone().unwrap(), "t".into(), super::super::Access::Read).unwrap();
        let chunks = || data_chunks(&mapping, 8).unwrap();
        assert_eq!(chunks(), []);
        for page in [0, 7, 8, 31, 99] {
            file.write_all_at(b"x", page * 4096).unwrap();
        }
        assert_eq!(chunks(), [(0, 2), (3, 4), (12, 13)]);
    }
}
