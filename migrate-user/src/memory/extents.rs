//! Which parts of a RAM file exist.

use std::{fs::File, os::fd::AsFd, path::Path};

use migrate_common::PAGE_SIZE;
use rustix::{fs::SeekFrom, io::Errno};

use super::{Mapping, MemoryError, PageSet, RamLayout};

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

/// The stretches of `chunk` pages of `file` that hold data at all, as ranges of stretches `start..end`, ascending. Much quicker than
/// [`data_extents`]: it looks for the begin of data only, once a stretch.
///
/// # Errors
/// What `lseek` says.
pub fn data_chunks(file: &File, path: &Path, chunk: u64) -> Result<Vec<(u64, u64)>, MemoryError> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
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

/// Every page of a guest that exists in its RAM files; the others are holes, which read as zero, and which reading through
/// a mapping would fill. `mappings` in the layout's order.
///
/// # Errors
/// What `lseek` says.
pub fn existing_pages(layout: &RamLayout, mappings: &[Mapping]) -> Result<PageSet, MemoryError> {
    let mut pages = PageSet::new(layout.pages());
    for (index, mapping) in mappings.iter().enumerate() {
        let first = layout.first_page(index);
        let limit = layout.first_page(index + 1);
        for extent in data_extents(mapping.file(), mapping.path())? {
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
    use std::os::unix::fs::FileExt;

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
        let chunks = || data_chunks(&file, Path::new("t"), 8).unwrap();
        assert_eq!(chunks(), []);
        for page in [0, 7, 8, 31, 99] {
            file.write_all_at(b"x", page * 4096).unwrap();
        }
        assert_eq!(chunks(), [(0, 2), (3, 4), (12, 13)]);
    }
}
