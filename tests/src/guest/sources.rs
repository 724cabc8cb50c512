//! The guests' sources, and keys that change when they do.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The directory of this crate, where the guests' crates are, too.
pub(super) fn tests_dir() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A key over names and contents of files and of all files in directories.
///
/// It need not be the same for ever: a toolchain whose hash differs builds once more.
pub(super) fn key(paths: &[PathBuf]) -> Result<String> {
    let mut hasher = DefaultHasher::new();
    for path in paths {
        hash(path, &mut hasher)?;
    }
    Ok(format!("{:016x}", hasher.finish()))
}

/// A key over texts.
pub(super) fn text_key(texts: &[&str]) -> String {
    let mut hasher = DefaultHasher::new();
    texts.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

fn hash(path: &Path, hasher: &mut DefaultHasher) -> Result<()> {
    let what = || format!("reading the guest's source {}, is the checkout complete?", path.display());
    path.file_name().hash(hasher);
    if !path.is_dir() {
        fs::read(path).with_context(what)?.hash(hasher);
        return Ok(());
    }
    let mut entries = fs::read_dir(path)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>, _>>())
        .with_context(what)?;
    entries.sort();
    for entry in entries {
        // What cargo writes next to the sources is none.
        if !entry.ends_with("target") && !entry.ends_with("Cargo.lock") {
            hash(&entry, hasher)?;
        }
    }
    // Marks the end, so that a file that moves into or out of a directory makes a difference.
    "end".hash(hasher);
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn key_follows_contents_and_names() {
        let dir = std::env::temp_dir().join(format!("xferry-key-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("sub")).unwrap();
        let of = || key(std::slice::from_ref(&dir)).unwrap();
        fs::write(dir.join("sub/a"), "1").unwrap();
        let first = of();
        assert_eq!(first, of());
        fs::write(dir.join("sub/a"), "2").unwrap();
        let second = of();
        assert_ne!(first, second);
        fs::rename(dir.join("sub/a"), dir.join("a")).unwrap();
        assert_ne!(second, of());
        fs::remove_dir_all(&dir).unwrap();
        assert!(key(&[dir]).is_err());
    }
}
