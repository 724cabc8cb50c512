//! Buffers that the kernel copies to and from as fast as it can.

use std::ops::{Deref, DerefMut};

use migrate_common::PAGE_SIZE;

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_SIZE]);

/// Bytes that begin where a page does.
///
/// The kernel copies by `rep movsb`. Where the target lies up to some 16 bytes further into its page than the source, that is half as fast,
/// and with 1 byte a fifth (4 KiB aliasing): just where a large allocation puts its bytes, behind its own header of 16, when pages are
/// copied to it.
pub struct PageBuffer(Vec<Page>);

impl PageBuffer {
    /// So many pages, all zero.
    pub fn new(pages: usize) -> Self {
        Self(vec![Page([0; PAGE_SIZE]); pages])
    }
}

impl Deref for PageBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: pages are bytes without padding, one behind the other.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * PAGE_SIZE) }
    }
}

impl DerefMut for PageBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; borrowed as `self` is.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.0.len() * PAGE_SIZE) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn begins_with_a_page_and_holds_what_is_written() {
        let mut buffer = PageBuffer::new(3);
        assert_eq!((buffer.len(), buffer.as_ptr() as usize % PAGE_SIZE), (3 * PAGE_SIZE, 0));
        assert!(buffer.iter().all(|&byte| byte == 0));
        buffer[5000] = 7;
        assert_eq!(buffer.iter().position(|&byte| byte == 7), Some(5000));
        assert!(PageBuffer::new(0).is_empty());
    }
}
