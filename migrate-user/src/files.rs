//! Reading files whose length others decide, with a bound: a QEMU that has been taken over writes its own log, and
//! decides how much there is to say about its mappings.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::Path,
};

/// Longest text about a process, or about this host's network, bytes. What the kernel lets a process map takes some
/// 15 MiB with usual names.
pub(crate) const MAX_PROC: u64 = 64 << 20;
/// Longest file of an operator's, bytes.
pub(crate) const MAX_CONFIG: u64 = 1 << 20;

/// The whole content.
///
/// # Errors
/// What the file system says, or `InvalidData` when there are more than `most` bytes.
pub(crate) fn read(path: impl AsRef<Path>, most: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    // The length that metadata has says nothing of /proc, and of a file that grows only what was.
    File::open(path)?.take(most + 1).read_to_end(&mut content)?;
    if content.len() as u64 > most {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("it has more than {most} bytes, which are too many"),
        ));
    }
    Ok(content)
}

/// The whole content as text. What is no UTF-8 in it is replaced: a path of somebody's must not hide all others.
///
/// # Errors
/// As [`read`].
pub(crate) fn read_lossy(path: impl AsRef<Path>, most: u64) -> io::Result<String> {
    let content = read(path, most)?;
    Ok(String::from_utf8(content)
        .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
}

/// The whole content, which must be UTF-8.
///
/// # Errors
/// As [`read`], and `InvalidData`.
pub(crate) fn read_text(path: impl AsRef<Path>, most: u64) -> io::Result<String> {
    String::from_utf8(read(path, most)?).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// The last `most` bytes, as text.
///
/// # Errors
/// What the file system says.
pub(crate) fn tail(path: impl AsRef<Path>, most: u64) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(most)))?;
    let mut content = Vec::new();
    file.take(most).read_to_end(&mut content)?;
    Ok(String::from_utf8_lossy(&content).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        file
    }

    #[test]
    fn no_more_is_read_than_may_be() {
        let ten = file(b"0123456789");
        assert_eq!(read(ten.path(), 10).unwrap(), b"0123456789");
        assert_eq!(read(ten.path(), 9).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert!(read_text("/dev/zero", 4096).unwrap_err().to_string().contains("more than 4096"));
        assert!(read("/proc/self/maps", 8).is_err(), "its metadata says 0 bytes");
    }

    #[test]
    fn the_end_of_what_is_long() {
        let ten = file(b"0123456789");
        assert_eq!(tail(ten.path(), 3).unwrap(), "789");
        assert_eq!(tail(ten.path(), 30).unwrap(), "0123456789");
    }

    #[test]
    fn what_is_no_text_hides_nothing() {
        let mixed = file(b"a\xff\nb");
        assert_eq!(read_lossy(mixed.path(), 10).unwrap(), "a\u{fffd}\nb");
        assert!(read_text(mixed.path(), 10).is_err());
    }
}
