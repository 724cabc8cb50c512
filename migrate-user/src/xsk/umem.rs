//! The memory area that the rings' descriptors point into.

use std::{ptr::NonNull, sync::Arc};

use super::XskError;

/// Size of one chunk, bytes: the kernel's largest (a page), see `xdp_umem_reg()` in `net/xdp/xdp_umem.c`.
pub const CHUNK_SIZE: usize = 4096;

/// Memory that can serve as UMEM.
///
/// # Safety
/// The region must stay mapped, readable and writable, at a page-aligned address, as long as the value lives.
pub unsafe trait UmemMemory: Send + Sync {
    /// Start and length in bytes.
    fn region(&self) -> (NonNull<u8>, usize);
}

/// Private zeroed memory.
pub struct AnonymousMemory {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: an owned mapping without thread affinity.
unsafe impl Send for AnonymousMemory {}
// SAFETY: the type itself gives no access to the bytes.
unsafe impl Sync for AnonymousMemory {}

impl AnonymousMemory {
    /// Maps `len` bytes.
    ///
    /// # Errors
    /// What `mmap` says.
    pub fn new(len: usize) -> rustix::io::Result<Self> {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let start = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::POPULATE,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Self { start, len })
    }
}

impl Drop for AnonymousMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing borrows from it any more. Failure leaks it, no more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

// SAFETY: mapped for as long as the value lives; mmap returns page-aligned addresses.
unsafe impl UmemMemory for AnonymousMemory {
    fn region(&self) -> (NonNull<u8>, usize) {
        (self.start, self.len)
    }
}

/// A UMEM: memory cut into chunks of [`CHUNK_SIZE`].
///
/// Hands out bytes by address; who may touch which chunk when is the business of the queues, which own
/// disjoint parts of it.
#[derive(Clone)]
pub struct Umem {
    memory: Arc<dyn UmemMemory>,
}

impl Umem {
    /// Takes any mapped memory, for example a guest's.
    ///
    /// # Errors
    /// [`XskError::Config`] when the region is not a whole number of chunks.
    pub fn over(memory: Arc<dyn UmemMemory>) -> Result<Self, XskError> {
        let (start, len) = memory.region();
        if len == 0 || !len.is_multiple_of(CHUNK_SIZE) || !start.addr().get().is_multiple_of(CHUNK_SIZE) {
            return Err(XskError::Config(format!(
                "UMEM of {len} bytes is not a whole number of aligned {CHUNK_SIZE}-byte chunks"
            )));
        }
        Ok(Self { memory })
    }

    /// Own memory of `chunks` chunks.
    ///
    /// # Errors
    /// When memory is short.
    pub fn anonymous(chunks: usize) -> Result<Self, XskError> {
        let memory = AnonymousMemory::new(chunks * CHUNK_SIZE).map_err(|errno| {
            XskError::Config(format!("cannot map {} bytes of UMEM: {errno}", chunks * CHUNK_SIZE))
        })?;
        Self::over(Arc::new(memory))
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.memory.region().1
    }

    /// Never: a UMEM has at least one chunk.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn start(&self) -> NonNull<u8> {
        self.memory.region().0
    }

    /// A copy of `len` bytes at `address`, as the kernel would take them.
    #[cfg(test)]
    pub(crate) fn copy(&self, address: u64, len: usize) -> Vec<u8> {
        // SAFETY: the tests' kernel is on the thread of the queue, which lends nothing out meanwhile.
        unsafe { self.bytes_mut(address, len) }.expect("within the UMEM").to_vec()
    }

    /// Bytes at `address`, or `None` where they leave the UMEM.
    ///
    /// # Safety
    /// The caller's queue owns the chunks behind these bytes, and they are borrowed once.
    #[expect(clippy::mut_from_ref, reason = "exclusive by ownership of chunks, see above")]
    pub(super) unsafe fn bytes_mut(&self, address: u64, len: usize) -> Option<&mut [u8]> {
        let (start, total) = self.memory.region();
        let address = usize::try_from(address).ok()?;
        if address.checked_add(len)? > total {
            return None;
        }
        // SAFETY: in bounds; exclusive by the caller's promise.
        Some(unsafe { std::slice::from_raw_parts_mut(start.as_ptr().add(address), len) })
    }
}
