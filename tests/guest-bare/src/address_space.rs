//! Maps what lies beyond the first GiB, which is all that the boot code maps.

use core::ops::Range;

const GIB: usize = 1 << 30;
const TABLES: usize = 64;
const ENTRIES: usize = 512;
/// Present, writable, for ring 3.
const TABLE_FLAGS: u64 = 0x7;
/// The same, for a 2 MiB page.
const LARGE_PAGE_FLAGS: u64 = 0x87;

/// End of what can be mapped.
pub const LIMIT: usize = TABLES * GIB;

unsafe extern "C" {
    static mut page_directory_pointers: [u64; ENTRIES];
    static mut page_directories: [[u64; ENTRIES]; TABLES];
}

/// Maps the range, as far as there are tables for it, each address to itself.
pub fn map(range: Range<usize>) {
    for gib in (range.start / GIB).max(1)..range.end.div_ceil(GIB).min(TABLES) {
        // SAFETY: one CPU, no other reference to the tables. The processor reads them, so the writes must
        // happen: the directory first, then the entry that makes it visible. Entries go from not present
        // to present or stay as they are, which needs no flush.
        unsafe {
            let directory = &raw mut page_directories[gib];
            for entry in 0..ENTRIES {
                let address = (gib * GIB + entry * (GIB / ENTRIES)) as u64;
                (&raw mut (*directory)[entry]).write_volatile(address | LARGE_PAGE_FLAGS);
            }
            (&raw mut page_directory_pointers[gib]).write_volatile(directory as u64 | TABLE_FLAGS);
        }
    }
}
