//! Reads the disk past the page cache, as hard as it can, and verifies what came.
//!
//! The device writes the data straight into this program's memory, a write that dirty tracking may miss. So
//! it is not enough to verify a buffer once: it stays in memory, together with many others, and is verified
//! again and again until it is read over. A page that a migration lost shows older data there.

mod pattern;

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::thread;

use anyhow::{Context, Result, ensure};

use crate::console::Board;
use crate::workload::{Mismatch, mix};

const DEVICE: &str = "/dev/vda";
const O_DIRECT: i32 = 0o40000;
const THREADS: u64 = 2;
/// Buffers of each thread: 32 MiB.
const SLOTS: usize = 64;
const SLOT: usize = 512 << 10;
const SMALLEST: usize = 128 << 10;
/// What addresses, offsets and lengths are aligned to.
const ALIGNMENT: usize = 4096;
/// Buffers that are verified again after each read.
const REVISITS: u64 = 2;

/// Starts the threads.
pub fn verify(board: &Board) -> Result<()> {
    for number in 0..THREADS {
        let mut reader = Reader::open(number, board.clone())?;
        thread::spawn(move || {
            loop {
                reader.step();
            }
        });
    }
    Ok(())
}

struct Reader {
    disk: File,
    size: u64,
    memory: Vec<u8>,
    /// Where in `memory` the first buffer begins, so that it is aligned.
    start: usize,
    /// What each buffer holds: offset on the disk and length.
    held: [(u64, usize); SLOTS],
    next: usize,
    random: u64,
    board: Board,
}

impl Reader {
    fn open(number: u64, board: Board) -> Result<Self> {
        let mut disk = OpenOptions::new()
            .read(true)
            .custom_flags(O_DIRECT)
            .open(DEVICE)
            .with_context(|| format!("{DEVICE} cannot be opened, give the VM a virtio-blk disk"))?;
        let size = disk.seek(SeekFrom::End(0)).with_context(|| format!("{DEVICE} has no size"))?;
        ensure!(size >= SLOT as u64 * 2, "{DEVICE} has {size} bytes, give the VM a disk of 1 MiB or more");
        let memory = vec![0_u8; SLOTS * SLOT + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        Ok(Reader { disk, size, memory, start, held: [(0, 0); SLOTS], next: 0, random: number << 56, board })
    }

    /// Reads into the oldest buffer and verifies it and some others.
    fn step(&mut self) {
        let slot = self.next;
        self.next = (slot + 1) % SLOTS;
        self.check(slot);

        let length =
            SMALLEST + self.below((SLOT - SMALLEST + ALIGNMENT) as u64) as usize / ALIGNMENT * ALIGNMENT;
        let offset = self.below(self.size - length as u64) / ALIGNMENT as u64 * ALIGNMENT as u64;
        self.held[slot] = (offset, 0);
        let begin = self.start + slot * SLOT;
        let buffer = &mut self.memory[begin..begin + length];
        if self.disk.read_exact_at(buffer, offset).is_err() {
            self.board.error(&Mismatch::Disk { offset, want: 0, got: 0 });
            return;
        }
        self.held[slot].1 = length;
        self.check(slot);
        self.board.disk_read();
        for _ in 0..REVISITS {
            let other = self.below(SLOTS as u64) as usize;
            self.check(other);
        }
    }

    /// Verifies what a buffer holds, and forgets it when it is wrong, so that it counts once.
    fn check(&mut self, slot: usize) {
        let (offset, length) = self.held[slot];
        let begin = self.start + slot * SLOT;
        if let Some(bad) = pattern::first_bad_word(&self.memory[begin..begin + length], offset) {
            self.held[slot].1 = 0;
            self.board.error(&Mismatch::Disk { offset: bad.offset, want: bad.want, got: bad.got });
        }
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.random += 1;
        mix(self.random) % limit.max(1)
    }
}
