//! The disk whose content a guest can verify.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};

#[path = "../../guest-linux/src/disk/pattern.rs"]
#[allow(dead_code, reason = "the guest verifies, the lab only writes")]
mod pattern;

const SECTOR: u64 = 512;
const CHUNK: usize = 1 << 20;

/// The word at an offset, a multiple of 8, of every such disk.
pub fn disk_word(offset: u64) -> u64 {
    pattern::word_at(offset)
}

/// Writes a disk of so many bytes, a multiple of 512. It replaces what the file held.
///
/// # Errors
/// If the file cannot be written.
pub fn write_disk_pattern(path: impl AsRef<Path>, bytes: u64) -> Result<()> {
    let path = path.as_ref();
    let name = path.display();
    ensure!(
        bytes.is_multiple_of(SECTOR),
        "a disk has whole sectors: make {name} a multiple of {SECTOR} bytes"
    );
    let mut file = File::create(path)
        .with_context(|| format!("creating the disk {name}, does its directory exist and is it writable?"))?;
    let mut chunk = vec![0; CHUNK];
    let mut offset = 0;
    while offset < bytes {
        let length = (bytes - offset).min(CHUNK as u64);
        let chunk = &mut chunk[..length as usize];
        for (word, offset) in chunk.as_chunks_mut().0.iter_mut().zip((offset..).step_by(8)) {
            *word = disk_word(offset).to_le_bytes();
        }
        file.write_all(chunk)
            .with_context(|| format!("writing {bytes} bytes to the disk {name}, is there room?"))?;
        offset += length;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_verifies_everywhere() {
        let path = std::env::temp_dir().join(format!("xferry-disk-{}", std::process::id()));
        let bytes = CHUNK as u64 + 1536;
        write_disk_pattern(&path, bytes).unwrap();
        let mut data = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(data.len() as u64, bytes);
        for start in [0, 8, 4096, CHUNK, CHUNK + 512] {
            assert_eq!(pattern::first_bad_word(&data[start..], start as u64), None);
        }
        // Data from another place of the disk, as a lost page would show it.
        assert!(pattern::first_bad_word(&data[4096..], 8192).is_some());
        data[5003] ^= 1;
        let bad = pattern::first_bad_word(&data[4096..], 4096).unwrap();
        assert_eq!((bad.offset, bad.want), (5000, disk_word(5000)));
    }

    #[test]
    fn refuses_half_sectors() {
        assert!(write_disk_pattern("/nonexistent/disk", 100).is_err());
    }
}
