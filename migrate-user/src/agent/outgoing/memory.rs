//! The RAM of a VM that leaves, and its tracker.

use std::sync::{Arc, OnceLock};

use migrate_common::PAGE_SIZE;

use crate::{
    agent::ram::RamFiles,
    datapath::SentHashes,
    memory::{
        Access, AtomicPageSet, Digest, DirtyTracker, Injector, Mapping, MemoryError, PageSet, RESERVE_CHUNK,
        RamFile, RamLayout, TrackedRam, data_chunks, existing_pages,
    },
    migration::{MigrationError, SourceMemory},
    vmm::MachineFacts,
};

/// The leaving VM's RAM and its tracker.
pub(super) struct GuestMemory {
    pid: u32,
    pub(super) layout: Arc<RamLayout>,
    pub(super) mappings: Arc<Vec<Mapping>>,
    pub(super) sent: Arc<AtomicPageSet>,
    files: Option<Vec<RamFile>>,
    /// The same files, open for writing: to send out of them, and to empty them when the VM has left.
    pub(super) writable: Arc<RamFiles>,
    tracker: Option<DirtyTracker>,
    /// What the tracker protects, from when it does.
    pub(super) tracked: Arc<OnceLock<TrackedRam>>,
}

impl GuestMemory {
    pub(super) fn open(
        pid: u32,
        machine: &MachineFacts,
        files: Vec<RamFile>,
    ) -> Result<Self, MigrationError> {
        let layout = RamLayout::new(machine.backends.clone());
        let mappings = files
            .iter()
            .map(|file| Mapping::new(file.open(false)?, file.path.clone(), Access::Read))
            .collect::<Result<Vec<_>, _>>()?;
        for (mapping, backend) in mappings.iter().zip(layout.backends()) {
            if mapping.pages() * (PAGE_SIZE as u64) < backend.size {
                return Err(MigrationError::Host(format!(
                    "{} is smaller than memory backend {}: was it truncated under the running VM?",
                    mapping.path().display(),
                    backend.id
                )));
            }
        }
        let writable = Arc::new(RamFiles::open(&files)?);
        Ok(Self {
            pid,
            sent: Arc::new(AtomicPageSet::new(layout.pages())),
            layout: Arc::new(layout),
            mappings: Arc::new(mappings),
            files: Some(files),
            writable,
            tracker: None,
            tracked: Arc::default(),
        })
    }

    /// For a VM that stays: no memory at all.
    pub(super) fn none(pid: u32) -> Self {
        let layout = RamLayout::new(Vec::new());
        Self {
            pid,
            sent: Arc::new(AtomicPageSet::new(0)),
            layout: Arc::new(layout),
            mappings: Arc::default(),
            files: None,
            writable: Arc::default(),
            tracker: None,
            tracked: Arc::default(),
        }
    }

    /// Room for hashes of what is sent, where a backend is tracked by pages of more than 4 KiB; else none.
    pub(super) fn hashes(&self) -> Option<SentHashes> {
        let huge = |index: &usize| self.mappings[*index].is_hugetlbfs();
        let backends: Vec<usize> = (0..self.mappings.len()).filter(huge).collect();
        (!backends.is_empty()).then(|| SentHashes::new(&self.layout, backends.into_iter()))
    }

    /// Ranges of reservation chunks that hold pages, so that the destination can take memory for them early.
    pub(super) fn populated_chunks(&self) -> Result<Vec<(u64, u64)>, MemoryError> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for (index, mapping) in self.mappings.iter().enumerate() {
            let (first, limit) = (self.layout.first_page(index), self.layout.first_page(index + 1));
            for (start, end) in data_chunks(mapping, RESERVE_CHUNK)? {
                let (start, end) = (first + start * RESERVE_CHUNK, (first + end * RESERVE_CHUNK).min(limit));
                let (start, end) = (start / RESERVE_CHUNK, end.div_ceil(RESERVE_CHUNK));
                match ranges.last_mut() {
                    Some((_, last)) if start <= *last => *last = end.max(*last),
                    _ => ranges.push((start, end)),
                }
            }
        }
        Ok(ranges)
    }
}

impl SourceMemory for GuestMemory {
    async fn begin(&mut self) -> Result<PageSet, MemoryError> {
        tokio::task::block_in_place(|| {
            let files = self.files.take().unwrap_or_default();
            // Our own program, also when its file was replaced since we started.
            let injector = Injector::Helper("/proc/self/exe".into());
            let tracker = DirtyTracker::install(self.pid, &injector, &self.layout, files)?;
            self.tracked.get_or_init(|| tracker.ram().clone());
            self.tracker = Some(tracker);
            // After protecting: a page that comes to be from here on is a page that was written.
            existing_pages(&self.layout, &self.mappings)
        })
    }

    async fn take_written(&mut self) -> Result<PageSet, MemoryError> {
        match &mut self.tracker {
            Some(tracker) => tokio::task::block_in_place(|| tracker.take_written()),
            None => Ok(PageSet::new(self.layout.pages())),
        }
    }

    async fn digest(&mut self) -> Result<Digest, MemoryError> {
        tokio::task::block_in_place(|| Digest::of(&self.layout, &self.mappings))
    }

    fn discard(&mut self) -> Result<(), MemoryError> {
        self.writable.try_empty()
    }

    fn release(&mut self) {
        self.tracker = None;
    }
}
