//! Which pages a running guest has written since we last asked.

use super::{Injector, MemoryError, PageSet, Pagemap, RamFile, RamLayout, userfault::UserFault};

/// Dirty tracking of one VMM process from outside. Ends without a trace when dropped.
///
/// Sees every write through the VMM's own mapping by CPU: vCPUs, device emulation, system calls. Does not
/// see DMA into pages that the kernel holds pinned while a scan runs (O_DIRECT): scan those VMs only while
/// they are stopped and their I/O is drained.
pub struct DirtyTracker {
    pagemap: Pagemap,
    files: Vec<(u64, RamFile)>,
    pages: u64,
    /// Holds the protection; never asked again.
    _userfault: UserFault,
}

impl DirtyTracker {
    /// Protects all RAM of process `pid`: from here on every write counts. `files` in the layout's order.
    ///
    /// # Errors
    /// [`MemoryError`] that names the step; nothing of it stays in the process.
    pub fn install(
        pid: u32,
        injector: &Injector,
        layout: &RamLayout,
        files: Vec<RamFile>,
    ) -> Result<Self, MemoryError> {
        let userfault = UserFault::inside(pid, injector)?;
        let vmas = || files.iter().flat_map(|file| &file.vmas);
        for vma in vmas() {
            userfault.register(vma)?;
        }
        for vma in vmas() {
            userfault.protect(vma)?;
        }
        let files = files.into_iter().enumerate().map(|(n, file)| (layout.first_page(n), file)).collect();
        Ok(Self { pagemap: Pagemap::open(pid)?, files, pages: layout.pages(), _userfault: userfault })
    }

    /// The pages written since the last call (or since [`install`](Self::install)), and protects them again.
    ///
    /// # Errors
    /// [`MemoryError::Tracking`], for example when the process is gone.
    pub fn take_written(&mut self) -> Result<PageSet, MemoryError> {
        let mut written = PageSet::new(self.pages);
        for (first, file) in &self.files {
            for vma in &file.vmas {
                self.pagemap
                    .take_written(vma, |start, end| written.insert_range(first + start, first + end))?;
            }
        }
        Ok(written)
    }
}
