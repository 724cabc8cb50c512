//! What one core copies: the upper bound of everything that touches a page once.

use std::fs::File;
use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use xferry::memory::{Access, Mapping};

use crate::bench::figures::MIB;
use crate::bench::results::Rate;

const BYTES: usize = 1 << 30;
const PAGE: usize = 4096;

/// 1 GiB in memory that is there already: in one call, and page by page from private memory into a shared mapping, which is
/// what a receiver does.
pub(in crate::bench) fn measure() -> Result<Vec<Rate>> {
    let from = vec![0x5a_u8; BYTES];
    let mut to = vec![1_u8; BYTES];
    let plain = timed(|| black_box(&mut to).copy_from_slice(black_box(&from)));
    drop(to);
    let file = File::from(memfd_create("xferry-bench", MemfdFlags::CLOEXEC).context("making a memory file")?);
    ftruncate(&file, BYTES as u64).context("setting a memory file's length")?;
    let shared = Mapping::new(file, "memfd".into(), Access::Write)?;
    shared.populate(0, shared.pages())?;
    let by_page = timed(|| {
        for (page, bytes) in (0..).zip(from.chunks_exact(PAGE)) {
            shared.write(page, 0, black_box(bytes));
        }
    });
    Ok(vec![Rate::new("memcpy, 1 GiB", plain), Rate::new("memcpy, by page into shared memory", by_page)])
}

/// MiB/s of work that touches all of it; the better of two, since the first finds cold page tables.
fn timed(mut work: impl FnMut()) -> f64 {
    let mut once = || {
        let begun = Instant::now();
        work();
        BYTES as f64 / MIB / begun.elapsed().as_secs_f64()
    };
    once().max(once())
}
