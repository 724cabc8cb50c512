//! Where in RAM the workload lives.

use core::ops::Range;

use crate::start_info::StartInfo;
use crate::workload::PAGE_SIZE;

unsafe extern "C" {
    static image_end: u8;
}

/// The largest range of RAM behind the image, in whole pages.
pub fn largest_free(info: &StartInfo) -> Range<usize> {
    let first = &raw const image_end as usize;
    info.ram()
        .map(|(start, end)| start.max(first).next_multiple_of(PAGE_SIZE)..end / PAGE_SIZE * PAGE_SIZE)
        .filter(|range| range.start < range.end)
        .max_by_key(|range| range.end - range.start)
        .unwrap_or(0..0)
}

/// How many pages fit into the region together with their entries in the generation table.
pub fn pages_that_fit(region: &Range<usize>) -> usize {
    let bytes = region.end - region.start;
    // One page more for rounding the table up to whole pages.
    (bytes / (PAGE_SIZE + size_of::<u32>())).saturating_sub(1)
}

/// Lays the generation table, then the pages, into the region.
///
/// The table starts out as zeroes even when the RAM does not.
pub fn place(region: &Range<usize>, pages: usize) -> (*mut u64, &'static mut [u32]) {
    let table_bytes = (pages * size_of::<u32>()).next_multiple_of(PAGE_SIZE);
    let table = region.start as *mut u32;
    // SAFETY: `pages_that_fit` made sure that the table lies in free RAM, page-aligned; it is mapped, and
    // nothing else uses it.
    let generations = unsafe {
        table.write_bytes(0, pages);
        core::slice::from_raw_parts_mut(table, pages)
    };
    ((region.start + table_bytes) as *mut u64, generations)
}
