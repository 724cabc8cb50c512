//! Neighbouring frames' bytes, brought into the guest's memory together.

use migrate_common::PAGE_SIZE;

use crate::memory::PageBuffer;

/// Bytes that are worth a call of the kernel: its cost is small beside that of copying them.
const ENOUGH: usize = 64 << 10;
/// Bytes that are gathered at most, while the file is being written to by somebody else: they are still in the cache then.
const ROOM: usize = 256 << 10;

/// Bytes that follow each other in one backend and are not yet in its memory.
pub(super) struct Behind {
    backend: usize,
    start: u64,
    buffer: PageBuffer,
    /// Bytes in it.
    len: usize,
}

/// What was gathered.
pub(super) struct Gathered<'a> {
    /// Index of the backend.
    pub backend: usize,
    /// Where it belongs in the backend's file, bytes.
    pub start: u64,
    /// At least one.
    pub bytes: &'a [u8],
}

impl Behind {
    /// Nothing yet.
    pub fn new() -> Self {
        Self { backend: 0, start: 0, buffer: PageBuffer::new(ROOM / PAGE_SIZE), len: 0 }
    }

    /// Whether so many bytes are worth being gathered.
    pub fn takes(len: usize) -> bool {
        len <= ENOUGH / 2
    }

    /// Whether there is enough here.
    pub fn is_enough(&self) -> bool {
        self.len >= ENOUGH
    }

    /// Whether `len` bytes for `start` of a backend follow what is here, and there is room.
    pub fn is_followed_by(&self, backend: usize, start: u64, len: usize) -> bool {
        let end = self.start + self.len as u64;
        self.len == 0 || (backend == self.backend && start == end && self.len + len <= ROOM)
    }

    /// Adds `pieces`, for `start` of a backend; they [follow](Self::is_followed_by) what is here.
    pub fn add<'a>(&mut self, backend: usize, start: u64, pieces: impl Iterator<Item = &'a [u8]>) {
        if self.len == 0 {
            (self.backend, self.start) = (backend, start);
        }
        for piece in pieces {
            self.buffer[self.len..self.len + piece.len()].copy_from_slice(piece);
            self.len += piece.len();
        }
    }

    /// What is here, if anything.
    pub fn gathered(&self) -> Option<Gathered<'_>> {
        let bytes = &self.buffer[..self.len];
        (!bytes.is_empty()).then_some(Gathered { backend: self.backend, start: self.start, bytes })
    }

    /// Forgets it.
    pub fn clear(&mut self) {
        self.len = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_follows_in_the_same_backend_and_has_room_joins() {
        let mut behind = Behind::new();
        assert!(behind.gathered().is_none() && behind.is_followed_by(3, 77, ROOM));
        behind.add(1, 4096, [&[1; 100][..], &[2; 50]].into_iter());
        assert!(behind.is_followed_by(1, 4246, 4096));
        assert!(!behind.is_followed_by(1, 4096, 4096) && !behind.is_followed_by(1, 4247, 4096));
        assert!(!behind.is_followed_by(0, 4246, 4096));
        assert!(behind.is_followed_by(1, 4246, ROOM - 150) && !behind.is_followed_by(1, 4246, ROOM - 149));
        behind.add(1, 4246, std::iter::once(&[3; 10][..]));
        let Gathered { backend, start, bytes } = behind.gathered().unwrap();
        assert_eq!((backend, start, bytes), (1, 4096, &[&[1; 100][..], &[2; 50], &[3; 10]].concat()[..]));
        behind.clear();
        assert!(behind.gathered().is_none() && behind.is_followed_by(0, 0, 1));
    }
}
