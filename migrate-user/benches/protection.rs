//! What guarding frames costs one core, in memory: `cargo bench -p migrate-user --bench protection`.

use std::time::Instant;

use migrate_common::{
    PAGE_SIZE,
    wire::{DESCRIPTOR_LEN, FrameHeader, FrameKind, Guard, HEADER_LEN, Packing, TAG_LEN},
};
use xferry::datapath::{Cipher, Datagram, FramePath, Opener, Protection, Sealer, Secret};

/// Bytes that each measurement completes, and then checks.
const BYTES: usize = 2 << 30;
/// Pages in a frame at MTU 9000 and 65535.
const PAGES: [usize; 2] = [2, 15];
/// Ways of guarding frames; the first is CRC32C.
const WAYS: [Option<Cipher>; 4] =
    [None, Some(Cipher::Aes128Gcm), Some(Cipher::Aes256Gcm), Some(Cipher::ChaCha20Poly1305)];

fn main() -> anyhow::Result<()> {
    for pages in PAGES {
        println!("frames of {pages} pages, one core, GiB/s of pages:");
        for cipher in WAYS {
            let (completed, checked) = rates(cipher, pages)?;
            let name = cipher.map_or("CRC32C", Cipher::name);
            println!("  {name:<18} completing {completed:>6.2}   checking {checked:>6.2}");
        }
    }
    Ok(())
}

fn rates(cipher: Option<Cipher>, pages: usize) -> anyhow::Result<(f64, f64)> {
    let protection = Protection::agreed(cipher, Some(&Secret::new([7; 32])), 1)?;
    // The guard's cost alone: no headers of the network.
    let path = FramePath::bare([127, 0, 0, 1].into());
    let payload = pages * PAGE_SIZE;
    let mut buffer = vec![0xa5; HEADER_LEN + pages * DESCRIPTOR_LEN + payload + TAG_LEN];
    let header = |sequence| FrameHeader {
        kind: FrameKind::Pages,
        descriptors: pages as u16,
        session: 1,
        epoch: 1,
        lane: 0,
        sequence,
        guard: Guard::Checksum,
        packing: Packing::Plain,
        payload: payload as u32,
        checksum: 0,
    };
    let frames = (BYTES / payload) as u32;
    let gib = f64::from(frames) * payload as f64 / f64::from(1 << 30);
    let mut sealer = Sealer::new(protection.clone());
    let begun = Instant::now();
    let mut len = 0;
    for sequence in 0..frames {
        len = sealer.complete(&mut buffer, &path, header(sequence))?;
    }
    let completed = gib / begun.elapsed().as_secs_f64();
    // As the kernel leaves a frame: in buffers of 4 KiB less 256 bytes.
    let pieces: Vec<&[u8]> = buffer[..len].chunks(4096 - 256).collect();
    let datagram = Datagram::bare(&pieces);
    let mut opener = Opener::new(protection);
    let begun = Instant::now();
    for _ in 0..frames {
        let header = datagram.header()?;
        let opened = opener.open(&datagram, header, |frame| std::hint::black_box(frame.descriptors().len()));
        anyhow::ensure!(opened.is_ok(), "a frame does not hold: {opened:?}");
    }
    Ok((completed, gib / begun.elapsed().as_secs_f64()))
}
