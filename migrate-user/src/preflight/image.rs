//! Whether both hosts see the same image: blocks of it are read on both sides, at the same places.
//!
//! An image of a running VM changes, and a file system between hosts may show the destination a block late. So
//! a few differing blocks prove nothing; hardly any agreeing block proves that it is another image, because a
//! guest does not rewrite its whole disk in a moment.

use std::{
    collections::HashMap,
    fs::File,
    io::{Seek, SeekFrom},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, FileTypeExt, MetadataExt},
    },
    time::Duration,
};

use rustix::fs::{Advice, FileType, Mode, OFlags};
use xxhash_rust::xxh3::xxh3_64;

use super::{ImageFacts, Sample};
use crate::vmm::Disk;

/// Bytes of a sample.
const SAMPLE: usize = 4096;
/// Where file systems, partition tables and image formats keep what seldom changes.
const LANDMARKS: [u64; 4] = [0, 4096, 64 << 10, 1 << 20];
/// Samples spread over the rest.
const SPREAD: u64 = 20;
/// Time for reading all images. A file server that does not answer must not hold up everything.
const LIMIT: Duration = Duration::from_secs(5);

/// The images of QEMU `pid`'s disks; on the destination `like` the source's, which says where to read and that
/// other users of the image count.
pub async fn image_facts(pid: u32, disks: Vec<Disk>, like: Option<Vec<ImageFacts>>) -> Vec<ImageFacts> {
    let count = disks.len();
    if count == 0 {
        return Vec::new();
    }
    let reading = tokio::task::spawn_blocking(move || {
        let facts = disks.iter().enumerate().map(|(index, disk)| {
            let offsets = like.as_ref().map(|images| {
                let samples = images.get(index).map(|image| image.samples.as_slice()).unwrap_or_default();
                samples.iter().map(|sample| sample.offset).collect()
            });
            read(pid, disk, offsets)
        });
        let mut facts: Vec<ImageFacts> = facts.collect();
        if like.is_some() {
            let inodes: Vec<_> = facts.iter().filter_map(|image| image.inode).collect();
            let mut writers = writers(&inodes, pid);
            for (image, _) in facts.iter_mut().zip(&disks).filter(|(_, disk)| !disk.read_only) {
                image.writers = image.inode.and_then(|inode| writers.remove(&inode)).unwrap_or_default();
            }
        }
        facts
    });
    match tokio::time::timeout(LIMIT, reading).await {
        Ok(Ok(facts)) => facts,
        Ok(Err(_)) | Err(_) => {
            let unread = format!("reading took longer than {} s", LIMIT.as_secs());
            vec![ImageFacts { unread: Some(unread), ..ImageFacts::default() }; count]
        }
    }
}

/// One image, in the mount namespace of the QEMU that uses it.
fn read(pid: u32, disk: &Disk, offsets: Option<Vec<u64>>) -> ImageFacts {
    if !disk.image.starts_with('/') {
        return ImageFacts { unread: Some("it is not a file".into()), ..ImageFacts::default() };
    }
    match read_file(&format!("/proc/{pid}/root{}", disk.image), offsets) {
        Ok(facts) => facts,
        Err(error) => ImageFacts { unread: Some(error.to_string()), ..ImageFacts::default() },
    }
}

fn read_file(path: &str, offsets: Option<Vec<u64>>) -> std::io::Result<ImageFacts> {
    let mut file = open(path)?;
    let metadata = file.metadata()?;
    let (inode, size) = if metadata.file_type().is_block_device() {
        // The node may have any inode; the device behind it counts.
        ((metadata.rdev(), u64::MAX), file.seek(SeekFrom::End(0))?)
    } else {
        ((metadata.dev(), metadata.ino()), metadata.len())
    };
    // Without reading ahead. Advice is advice: what it says when it fails does not matter.
    let _ = rustix::fs::fadvise(&file, 0, None, Advice::Random);
    let offsets = offsets.unwrap_or_else(|| places(size));
    let samples = offsets.into_iter().map(|offset| sample(&file, offset)).collect::<Result<_, _>>()?;
    // Nothing of it is to stay in this host's page cache: the other host goes on writing.
    let _ = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
    Ok(ImageFacts { inode: Some(inode), samples, unread: None, writers: Vec::new() })
}

/// Opens an image, and nothing else: opening a pipe waits for its other end, and opening a device may do something.
/// QEMU says what it is called, and a QEMU that its guest has taken over says what it likes.
fn open(path: &str) -> std::io::Result<File> {
    let looked_at = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&looked_at)?.st_mode);
    if !matches!(kind, FileType::RegularFile | FileType::BlockDevice) {
        return Err(std::io::Error::other("neither a file nor a block device"));
    }
    // The very file that was looked at.
    File::open(format!("/proc/self/fd/{}", looked_at.as_raw_fd()))
}

/// Where to read in an image of `size` bytes.
fn places(size: u64) -> Vec<u64> {
    let spread = (1..=SPREAD).map(|n| size / SPREAD * n / SAMPLE as u64 * SAMPLE as u64);
    let mut places: Vec<u64> = LANDMARKS.into_iter().chain(spread).filter(|&place| place < size).collect();
    places.sort_unstable();
    places.dedup();
    places
}

fn sample(file: &File, offset: u64) -> std::io::Result<Sample> {
    let mut block = [0; SAMPLE];
    let mut filled = 0;
    while filled < SAMPLE {
        match file.read_at(&mut block[filled..], offset.saturating_add(filled as u64)) {
            // Beyond its end: as good as zeros.
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let hash = block.iter().any(|&byte| byte != 0).then(|| xxh3_64(&block));
    Ok(Sample { offset, hash })
}

/// Processes other than `but` that have one of these files open for writing.
///
/// Locks do not tell: QEMU's are there as long as the source runs the VM, and the kernel does not say whose they
/// are (`OFDLCK` with process -1 in /proc/locks).
fn writers(inodes: &[(u64, u64)], but: u32) -> HashMap<(u64, u64), Vec<(u32, String)>> {
    let mut found: HashMap<(u64, u64), Vec<(u32, String)>> = HashMap::new();
    if inodes.is_empty() {
        return found;
    }
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    for pid in pids.filter(|&pid| pid != but && pid != std::process::id()) {
        // Processes end, and some do not let us look.
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            let Ok(metadata) = std::fs::metadata(entry.path()) else { continue };
            let inode = if metadata.file_type().is_block_device() {
                (metadata.rdev(), u64::MAX)
            } else {
                (metadata.dev(), metadata.ino())
            };
            if inodes.contains(&inode) && opened_for_writing(pid, &entry.file_name().to_string_lossy()) {
                let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                let users = found.entry(inode).or_default();
                if users.iter().all(|(other, _)| *other != pid) {
                    users.push((pid, name.trim().to_owned()));
                }
            }
        }
    }
    found
}

/// The access mode of an open file (`flags` of proc_pid_fdinfo(5), octal).
fn opened_for_writing(pid: u32, fd: &str) -> bool {
    let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
    let flags =
        info.lines().find_map(|line| u32::from_str_radix(line.strip_prefix("flags:")?.trim(), 8).ok());
    flags.is_some_and(|flags| flags & 0o3 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_show_content_and_holes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let file = File::create(&path).unwrap();
        file.set_len(10 << 20).unwrap();
        file.write_all_at(b"boot", 510).unwrap();
        let facts = read_file(path.to_str().unwrap(), None).unwrap();
        assert!(facts.samples.len() > 20 && facts.samples[0].hash.is_some());
        assert!(facts.samples[1..].iter().all(|sample| sample.hash.is_none()));
        // Elsewhere the same places are read.
        let again = read_file(path.to_str().unwrap(), Some(vec![0, 1 << 30])).unwrap();
        assert_eq!(again.samples[0], facts.samples[0]);
        assert_eq!(again.samples[1], Sample { offset: 1 << 30, hash: None });
    }

    #[test]
    fn only_images_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, FileType::Fifo, Mode::RWXU, 0).unwrap();
        // Nobody is at its other end.
        for path in [pipe.to_str().unwrap(), "/dev/zero", "/proc/self"] {
            let error = read_file(path, None).err().unwrap().to_string();
            assert!(error.contains("neither a file"), "{path}: {error}");
        }
        assert!(read_file("/nonexistent", None).is_err());
    }

    #[test]
    fn places_lie_within() {
        assert!(places(0).is_empty());
        assert_eq!(places(512), [0]);
        assert!(places(100 << 30).windows(2).all(|pair| pair[0] < pair[1] && pair[1] < 100 << 30));
    }

    #[test]
    fn writers_are_seen_and_readers_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, "x").unwrap();
        let inode = read_file(path.to_str().unwrap(), None).unwrap().inode.unwrap();
        let hold = |redirect: &str| {
            let script = format!("exec {redirect}{}; read never", path.display());
            let mut child = std::process::Command::new("sh");
            child.args(["-c", &script]).stdin(std::process::Stdio::piped()).spawn().unwrap()
        };
        let mut reader = hold("3<");
        let mut writer = hold("3>>");
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        let mut seen = writers(&[inode], 0);
        while seen.is_empty() && std::time::Instant::now() < deadline {
            seen = writers(&[inode], 0);
        }
        let pids: Vec<u32> = seen.remove(&inode).unwrap_or_default().iter().map(|(pid, _)| *pid).collect();
        assert_eq!(pids, [writer.id()]);
        assert!(writers(&[inode], writer.id()).is_empty());
        for child in [&mut reader, &mut writer] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    #[tokio::test]
    async fn what_is_no_file_is_said_to_be_none() {
        let disk = Disk { image: "nbd://10.0.0.1/x".into(), ..Disk::default() };
        let facts = image_facts(std::process::id(), vec![disk], None).await;
        assert!(facts[0].unread.as_ref().unwrap().contains("not a file"));
        assert!(image_facts(1, vec![], None).await.is_empty());
    }
}
