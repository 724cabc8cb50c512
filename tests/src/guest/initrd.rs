//! The Linux guest's initial RAM disk: a cpio archive of the format "newc", not compressed.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::cache::Cache;
use super::debian::Debian;
use super::sources::{key, tests_dir};

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const PLAIN: u32 = 0o100_644;
const CHARACTER_DEVICE: u32 = 0o020_600;
/// Numbers of /dev/console, which the kernel opens for the first process before that could mount /dev.
const CONSOLE: (u32, u32) = (5, 1);

/// Packs the program, busybox and modules. Returns the archive.
pub(super) fn pack(cache: &Cache, program: &Path, debian: &Debian) -> Result<PathBuf> {
    let init = tests_dir().join("guest-linux").join("init");
    let key = key(&[init.clone(), program.to_owned(), debian.busybox.clone(), debian.modules.clone()])?;
    let built = cache.get_or_build(&format!("initrd-{key}"), |dir| {
        let mut archive = Archive::default();
        for name in ["bin", "dev", "modules"] {
            archive.add(name, DIRECTORY, (0, 0), &[]);
        }
        archive.add("dev/console", CHARACTER_DEVICE, CONSOLE, &[]);
        archive.add_file("init", EXECUTABLE, &init)?;
        archive.add_file("guest-linux", EXECUTABLE, program)?;
        archive.add_file("bin/busybox", EXECUTABLE, &debian.busybox)?;
        for module in entries(&debian.modules)? {
            let name = module.file_name().unwrap_or_default().to_string_lossy();
            archive.add_file(&format!("modules/{name}"), PLAIN, &module)?;
        }
        let path = dir.join("initrd");
        File::create(&path)
            .and_then(|mut file| file.write_all(&archive.finish()))
            .with_context(|| format!("writing {}, is there room?", path.display()))
    })?;
    Ok(built.join("initrd"))
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut entries = fs::read_dir(dir)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>, _>>())
        .with_context(|| format!("listing {}", dir.display()))?;
    entries.sort();
    Ok(entries)
}

/// An archive under construction.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add_file(&mut self, name: &str, mode: u32, path: &Path) -> Result<()> {
        let content = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        self.add(name, mode, (0, 0), &content);
        Ok(())
    }

    fn add(&mut self, name: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        self.entries += 1;
        // Magic; inode, mode, owner, group, links, time, size, device of the file (two), device that it is
        // (two), length of the name with its zero byte, checksum.
        let (inode, size, name_size) = (self.entries, content.len(), name.len() + 1);
        let header = format!(
            "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{size:08x}{0:08x}{0:08x}\
             {major:08x}{minor:08x}{name_size:08x}{0:08x}",
            0, 1,
        );
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_headers_names_and_contents_aligned() {
        let mut archive = Archive::default();
        archive.add("a", PLAIN, (0, 0), b"hello");
        let bytes = archive.finish();
        let header = "07070100000001000081a40000000000000000000000010000000000000005\
                      00000000000000000000000000000000000000020000000000000000";
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(&text[..110], &header[..110]);
        assert_eq!(&bytes[110..120], b"a\0hello\0\0\0");
        assert!(text[120..].starts_with("070701") && text.contains("TRAILER!!!"));
        assert_eq!(bytes.len() % 4, 0);
    }
}
