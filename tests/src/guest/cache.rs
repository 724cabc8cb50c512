//! Things that were built once, by name, in a directory.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Beginning of the name of something that is not finished.
const PARTIAL: &str = ".partial-";

/// The directory, locked: of several processes that want the same thing, one builds it.
pub(super) struct Cache {
    dir: PathBuf,
    /// Unlocked when it is closed.
    _lock: File,
}

impl Cache {
    /// Creates the directory if need be, and waits for others that build in it.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let name = dir.display();
        fs::create_dir_all(dir)
            .with_context(|| format!("creating the cache {name}, choose a writable directory"))?;
        // Commands run in other directories than ours.
        let dir = dir.canonicalize().with_context(|| format!("resolving {name}"))?;
        let path = dir.join("lock");
        let lock = File::create(&path)
            .and_then(|file| file.lock().map(|()| file))
            .with_context(|| format!("locking {}, check its permissions", path.display()))?;
        Ok(Self { dir, _lock: lock })
    }

    /// A directory for cargo, which does its own caching.
    pub(super) fn build_dir(&self) -> PathBuf {
        self.dir.join("build")
    }

    /// The directory `name`, made by `build` if it is not there.
    ///
    /// It appears in one piece: `build` works in a directory of another name, which is thrown away if it fails
    /// or never comes back.
    pub(super) fn get_or_build(
        &self,
        name: &str,
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let done = self.dir.join(name);
        if done.exists() {
            return Ok(done);
        }
        let partial = self.dir.join(format!("{PARTIAL}{name}"));
        let shown = partial.display();
        if partial.exists() {
            fs::remove_dir_all(&partial)
                .with_context(|| format!("removing {shown} of an interrupted run"))?;
        }
        fs::create_dir(&partial).with_context(|| format!("creating {shown}"))?;
        let built = build(&partial).and_then(|()| {
            fs::rename(&partial, &done).with_context(|| format!("renaming {shown} to {}", done.display()))
        });
        if built.is_err() {
            // The error that matters is the first one; the next run removes what is left here.
            let _ = fs::remove_dir_all(&partial);
        }
        built.map(|()| done)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn builds_once_and_keeps_no_half_things() {
        let dir = std::env::temp_dir().join(format!("xferry-cache-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        let cache = Cache::open(&dir).unwrap();
        let write = |dir: &Path| Ok(fs::write(dir.join("file"), "x")?);

        let failed = cache.get_or_build("thing", |dir| write(dir).and_then(|()| bail!("interrupted")));
        assert!(failed.is_err() && !dir.join("thing").exists());

        // As after a run that was killed.
        fs::create_dir_all(dir.join(".partial-thing/rest")).unwrap();
        let built = cache.get_or_build("thing", write).unwrap();
        assert!(built.join("file").exists() && !built.join("rest").exists());
        cache.get_or_build("thing", |_| bail!("built twice")).unwrap();
        fs::remove_dir_all(&dir).unwrap();
    }
}
