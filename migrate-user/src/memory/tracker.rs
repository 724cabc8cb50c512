//! Which pages a running guest has written since we last asked.

use std::{ops::Range, sync::Arc};

use super::{Injector, MemoryError, PageSet, Pagemap, RamFile, RamLayout, userfault::UserFault};

/// Dirty tracking of one VMM process from outside. Ends without a trace when dropped.
///
/// Sees every write through the VMM's own mapping by CPU: vCPUs, device emulation, system calls. Does not
/// see DMA into pages that the kernel holds pinned while a scan runs (O_DIRECT): scan those VMs only while
/// they are stopped and their I/O is drained.
pub struct DirtyTracker {
    pagemap: Pagemap,
    ram: TrackedRam,
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
        let ram = TrackedRam { pid, files: Arc::new(files) };
        Ok(Self { pagemap: Pagemap::open(pid)?, ram, pages: layout.pages(), _userfault: userfault })
    }

    /// What is tracked, to be asked by parts as well.
    pub fn ram(&self) -> &TrackedRam {
        &self.ram
    }

    /// The pages written since the last call (or since [`install`](Self::install)), and protects them again.
    ///
    /// # Errors
    /// [`MemoryError::Tracking`], [`MemoryError::Gone`].
    pub fn take_written(&mut self) -> Result<PageSet, MemoryError> {
        let mut written = PageSet::new(self.pages);
        self.ram
            .take_written(&mut self.pagemap, 0..self.pages, |start, end| written.insert_range(start, end))?;
        Ok(written)
    }
}

/// RAM that a [`DirtyTracker`] has protected. Nothing is tracked any more when that is gone.
#[derive(Clone, Debug)]
pub struct TrackedRam {
    pid: u32,
    /// The number of each file's first page, and the file.
    files: Arc<Vec<(u64, RamFile)>>,
}

/// One thread's way to ask which pages of a part of RAM were written.
pub struct WrittenPages {
    ram: TrackedRam,
    pagemap: Pagemap,
}

impl TrackedRam {
    /// For a thread that asks.
    ///
    /// # Errors
    /// [`MemoryError`], [`MemoryError::Gone`] among them.
    pub fn ask(&self) -> Result<WrittenPages, MemoryError> {
        Ok(WrittenPages { ram: self.clone(), pagemap: Pagemap::open(self.pid)? })
    }

    fn take_written(
        &self,
        pagemap: &mut Pagemap,
        pages: Range<u64>,
        mut written: impl FnMut(u64, u64),
    ) -> Result<(), MemoryError> {
        for (first, file) in self.files.iter() {
            let of_file = pages.start.saturating_sub(*first)..pages.end.saturating_sub(*first);
            for vma in file.vmas.iter().filter_map(|vma| vma.cut(&of_file)) {
                pagemap.take_written(&vma, |start, end| written(first + start, first + end))?;
            }
        }
        Ok(())
    }
}

impl WrittenPages {
    /// Calls `written(first, end)` with those of `pages` that were written since anybody asked, and protects them again.
    ///
    /// # Errors
    /// [`MemoryError::Tracking`]; what was written may have been forgotten then.
    pub fn take(&mut self, pages: Range<u64>, written: impl FnMut(u64, u64)) -> Result<(), MemoryError> {
        self.ram.take_written(&mut self.pagemap, pages, written)
    }
}
