//! What the data path costs one core, in memory, with no kernel at the other end of the rings:
//! `cargo bench -p migrate-user --bench datapath`. Rates are of pages' bytes.
//!
//! The guest has [`GUEST_PAGES`], more than a cache holds, so that memory is paid for as in a migration.
#![allow(clippy::unwrap_used, reason = "a bench fails by panicking")]

mod bitmap;
mod receiving;
mod sending;

use criterion::{criterion_group, criterion_main};
use migrate_common::PAGE_SIZE;
use xferry::{
    datapath::{Cipher, Endpoint, FrameLayout, FramePath, Protection, Secret},
    memory::{Access, Backend, Mapping, RamLayout},
};

/// Pages of the guest: 256 MiB.
const GUEST_PAGES: u64 = 65_536;
/// MTUs of the frames: two pages in each, and fifteen.
const MTUS: [usize; 2] = [9000, 65_535];
/// Number of the migration.
const SESSION: u64 = 77;
/// UDP port of the frames.
const PORT: u16 = 4791;

fn layout() -> RamLayout {
    RamLayout::new(vec![Backend { id: "ram".into(), size: GUEST_PAGES * PAGE_SIZE as u64 }])
}

fn ram() -> Mapping {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(GUEST_PAGES * PAGE_SIZE as u64).unwrap();
    let ram = Mapping::new(file, "bench".into(), Access::Write).unwrap();
    ram.populate(0, GUEST_PAGES).unwrap();
    ram
}

/// RAM whose every page has content of its own.
fn filled_ram() -> Mapping {
    let ram = ram();
    let mut page = [0xa5; PAGE_SIZE];
    for number in 0..GUEST_PAGES {
        page[..8].copy_from_slice(&number.to_ne_bytes());
        ram.write(number, 0, &page);
    }
    ram
}

fn frames(mtu: usize) -> FrameLayout {
    FrameLayout::new(mtu, false, false).unwrap()
}

fn path() -> FramePath {
    let end = |n: u8| Endpoint { mac: [2, 0, 0, 0, 0, n], ip: [10, 0, 0, n].into() };
    FramePath::new(end(1), end(2), 50_000, PORT)
}

fn protection(cipher: Option<Cipher>) -> Protection {
    Protection::agreed(cipher, Some(&Secret::new([7; 32])), SESSION).unwrap()
}

criterion_group!(datapath, sending::bench, receiving::bench, bitmap::bench);
criterion_main!(datapath);
