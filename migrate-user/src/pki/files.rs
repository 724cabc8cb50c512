//! Reading and writing the files of a CA or a host.

use std::{
    fs::OpenOptions,
    io::Write,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
};

use rustls::pki_types::pem::PemObject;

use super::PkiError;
use crate::files::{self, MAX_CONFIG};

/// The content of a file that must be there.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, PkiError> {
    let failed = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::NotFound => PkiError::Missing { path: path.to_owned() },
        _ => PkiError::File { operation: "read", path: path.to_owned(), source },
    };
    files::read(path, MAX_CONFIG).map_err(failed)
}

/// The content of a file that need not be there.
pub(super) fn read_optional(path: &Path) -> Result<Option<Vec<u8>>, PkiError> {
    match read(path) {
        Err(PkiError::Missing { .. }) => Ok(None),
        other => other.map(Some),
    }
}

/// The content of a key's file, which nobody but its owner may read.
pub(super) fn read_key(path: &Path) -> Result<Vec<u8>, PkiError> {
    let content = read(path)?;
    let metadata = std::fs::metadata(path).map_err(|source| PkiError::File {
        operation: "look at",
        path: path.to_owned(),
        source,
    })?;
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(PkiError::Exposed { path: path.to_owned(), mode });
    }
    Ok(content)
}

/// What a PEM file holds of one kind, which `what` names; at least one.
pub(super) fn pem<T: PemObject>(path: &Path, content: &[u8], what: &str) -> Result<Vec<T>, PkiError> {
    let invalid = |problem| PkiError::Invalid { path: path.to_owned(), problem };
    let found: Result<Vec<T>, _> = T::pem_slice_iter(content).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(invalid(format!("it holds no {what} (PEM)"))),
        Err(error) => Err(invalid(error.to_string())),
    }
}

/// That none of `paths` exists, unless it is to be replaced.
pub(super) fn free(paths: &[&Path], force: bool) -> Result<(), PkiError> {
    match paths.iter().find(|path| !force && path.exists()) {
        Some(path) => Err(PkiError::Exists { path: path.to_path_buf() }),
        None => Ok(()),
    }
}

/// A directory that only its owner enters.
pub(super) fn make_dir(path: &Path) -> Result<(), PkiError> {
    let made = std::os::unix::fs::DirBuilderExt::mode(std::fs::DirBuilder::new().recursive(true), 0o700)
        .create(path);
    made.map_err(|source| PkiError::File { operation: "make", path: path.to_owned(), source })
}

/// Writes a file that has its mode from the first byte on, and all of its content or none.
pub(super) fn write(path: &Path, content: &str, mode: u32, force: bool) -> Result<(), PkiError> {
    let failed = |operation, source| PkiError::File { operation, path: path.to_owned(), source };
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = path.with_file_name(name);
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed("replace", error)),
        _ => {}
    }
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)
        .and_then(|mut file| file.write_all(content.as_bytes()).and_then(|()| file.sync_all()));
    // A link never replaces what is there; a renaming does.
    let placed = written.and_then(|()| {
        if force {
            std::fs::rename(&temporary, path)
        } else {
            std::fs::hard_link(&temporary, path).and_then(|()| std::fs::remove_file(&temporary))
        }
    });
    placed.map_err(|source| {
        // What is left of it is of no use.
        let _ = std::fs::remove_file(&temporary);
        match source.kind() {
            std::io::ErrorKind::AlreadyExists => PkiError::Exists { path: path.to_owned() },
            _ => failed("write", source),
        }
    })
}
