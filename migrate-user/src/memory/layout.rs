//! How a guest's pages are numbered.

use migrate_common::PAGE_SIZE;
use serde::{Deserialize, Serialize};

/// One memory backend of the VM, as both hosts must agree on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Backend {
    /// The VMM's name of it (QEMU: the object's id).
    pub id: String,
    /// Size in bytes, a multiple of [`PAGE_SIZE`].
    pub size: u64,
}

/// A page within its backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendPage {
    /// Index of the backend.
    pub backend: u16,
    /// Page within the backend's file.
    pub page: u64,
}

/// All backends in their agreed order, and the numbering of pages over them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamLayout {
    backends: Vec<Backend>,
    /// Number of each backend's first page, and the total as last element.
    first: Vec<u64>,
}

impl RamLayout {
    /// Numbers the pages of `backends` consecutively.
    pub fn new(backends: Vec<Backend>) -> Self {
        let mut first = vec![0];
        let mut total = 0;
        for backend in &backends {
            total += backend.size / PAGE_SIZE as u64;
            first.push(total);
        }
        Self { backends, first }
    }

    /// The backends in order.
    pub fn backends(&self) -> &[Backend] {
        &self.backends
    }

    /// Number of pages of the guest.
    pub fn pages(&self) -> u64 {
        self.first.last().copied().unwrap_or(0)
    }

    /// Size of the guest's RAM, bytes.
    pub fn bytes(&self) -> u64 {
        self.pages() * PAGE_SIZE as u64
    }

    /// Number of the first page of a backend.
    pub fn first_page(&self, backend: usize) -> u64 {
        self.first[backend]
    }

    /// Where page number `page` lies. `page` must be below [`pages`](Self::pages).
    pub fn locate(&self, page: u64) -> BackendPage {
        let backend = self.first.partition_point(|&first| first <= page).saturating_sub(1);
        let backend = backend.min(self.backends.len().saturating_sub(1));
        BackendPage { backend: backend as u16, page: page - self.first[backend] }
    }

    /// The number of a backend's page, or `None` where there is no such page.
    pub fn number(&self, at: BackendPage) -> Option<u64> {
        let backend = usize::from(at.backend);
        let first = *self.first.get(backend)?;
        let end = *self.first.get(backend + 1)?;
        first.checked_add(at.page).filter(|&page| page < end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_places_agree() {
        let backend = |id: &str, pages: u64| Backend { id: id.into(), size: pages * 4096 };
        let layout = RamLayout::new(vec![backend("a", 3), backend("b", 2)]);
        assert_eq!(layout.pages(), 5);
        for page in 0..5 {
            assert_eq!(layout.number(layout.locate(page)), Some(page));
        }
        assert_eq!(layout.locate(3), BackendPage { backend: 1, page: 0 });
        assert_eq!(layout.number(BackendPage { backend: 0, page: 3 }), None);
        assert_eq!(layout.number(BackendPage { backend: 2, page: 0 }), None);
        assert_eq!(layout.number(BackendPage { backend: 1, page: u64::MAX }), None);
    }
}
