//! The files that are a VM's RAM, to give their memory back when the VM is gone.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd},
    path::PathBuf,
};

use crate::{
    memory::{self, MemoryError, RamFile},
    vmm::{Qmp, inspect},
};

/// RAM files, open for writing.
#[derive(Default)]
pub(super) struct RamFiles(Vec<(PathBuf, File)>);

impl RamFiles {
    /// Opens `files`.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub fn open(files: &[RamFile]) -> Result<Self, MemoryError> {
        files.iter().map(|file| Ok((file.path.clone(), file.open(true)?))).collect::<Result<_, _>>().map(Self)
    }

    /// Those of the VM behind a monitor; none when they cannot be found, which only keeps their memory in use.
    pub async fn of(qmp: &Qmp) -> Self {
        let opened = match inspect(qmp).await {
            Ok(facts) => facts.files.and_then(|files| Self::open(&files)),
            Err(error) => {
                tracing::warn!(%error, "the VM's RAM files are not known and not emptied");
                return Self::default();
            }
        };
        opened.unwrap_or_else(|error| {
            tracing::warn!(%error, "the VM's RAM files are not emptied");
            Self::default()
        })
    }

    /// Those of a VM whose VMM has ended, unless somebody has mapped them since.
    pub fn abandoned(paths: &[PathBuf]) -> Self {
        let free = |path: &&PathBuf| match memory::is_mapped(path) {
            Ok(mapped) => !mapped,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "not known whether the VM's RAM is in use: not given back");
                false
            }
        };
        let open = |path: &PathBuf| Some((path.clone(), File::options().write(true).open(path).ok()?));
        Self(paths.iter().filter(free).filter_map(open).collect())
    }

    /// The files.
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.0.iter().map(|(_, file)| file.as_fd()).collect()
    }

    /// Gives all their memory back. Only when nobody uses them any more.
    ///
    /// # Errors
    /// When one cannot be emptied.
    pub fn try_empty(&self) -> Result<(), MemoryError> {
        self.0.iter().try_for_each(|(path, file)| memory::empty(file, path))
    }

    /// The same; what cannot be done is logged.
    pub fn empty(&self) {
        if let Err(error) = self.try_empty() {
            tracing::warn!(%error, "the VM's RAM is not given back");
        }
    }
}
