//! The memory that the workload dirties.

use std::ptr;

use anyhow::{Context, Result};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

use crate::workload::PAGE_SIZE;

/// How many pages may be used so that the kernel, the disk's buffers and the rest have enough.
pub fn pages_that_fit() -> Result<usize> {
    let path = "/proc/meminfo";
    let text =
        std::fs::read_to_string(path).with_context(|| format!("{path} cannot be read, is /proc mounted?"))?;
    let available: usize = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix("kB")?.trim().parse().ok())
        .with_context(|| format!("{path} has no MemAvailable"))?;
    const RESERVE: usize = 112 << 20;
    Ok((available << 10).saturating_sub(RESERVE) / (PAGE_SIZE + size_of::<u32>()))
}

/// Maps pages, none of which exists before it is written, and their generation table.
pub fn allocate(pages: usize) -> Result<(*mut u64, &'static mut [u32])> {
    let bytes = (pages * PAGE_SIZE).max(PAGE_SIZE);
    // SAFETY: a new anonymous mapping at an address that the kernel chooses touches nothing that exists.
    let base = unsafe {
        mmap_anonymous(ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
    }
    .with_context(|| format!("{bytes} bytes cannot be mapped, lower xferry.mib"))?;
    Ok((base.cast(), vec![0; pages].leak()))
}
