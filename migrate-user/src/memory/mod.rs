//! Guest memory seen from outside the VMM: which files hold it, which pages exist, which were written.
//!
//! A migration numbers all pages of the guest consecutively over its backends ([`RamLayout`]); sets of pages
//! are bitmaps over these numbers ([`PageSet`]). Guest-physical addresses play no part.

mod buffer;
mod copy;
mod digest;
mod extents;
mod inject;
mod layout;
mod mapping;
mod pagemap;
mod pages;
mod reservation;
mod tracker;
mod userfault;
mod vma;
mod zero;

#[cfg(any(test, fuzzing))]
pub(crate) use vma::fuzz as fuzz_maps;

pub use buffer::PageBuffer;
pub use copy::fence;
pub use digest::{Digest, PageHashes};
pub use extents::{Extent, data_chunks, data_extents, existing_pages};
pub use inject::{HELPER_ARGUMENT, Injector, help};
pub use layout::{Backend, BackendPage, RamLayout};
pub use mapping::{Access, HUGETLBFS, Mapping};
pub use pagemap::{Pagemap, supports_scan};
pub use pages::{AtomicPageSet, PageSet};
pub use reservation::{RESERVE_CHUNK, Reservation, empty};
pub use tracker::{DirtyTracker, TrackedRam, WrittenPages};
pub use vma::{RamFile, Vma, find_ram_files, is_mapped};
pub use zero::is_zero;

use std::path::PathBuf;

/// What went wrong with a guest's memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A system call on a file failed.
    #[error("cannot {operation} {}: {source}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// RAM that is not in a shared file.
    #[error(
        "memory backend {backend:?} of process {pid} is {found}, and only RAM in a shared file can be moved: start QEMU with \
         -object memory-backend-file,id={backend},size=…,mem-path=/dev/shm/…,share=on -machine memory-backend={backend}"
    )]
    NotShared {
        /// QEMU's name of the backend.
        backend: String,
        /// The VMM's process.
        pid: u32,
        /// What it is instead.
        found: String,
    },
    /// Dirty tracking could not be set up.
    #[error("cannot track the dirty pages of process {pid}: {step}: {source}{}", hint(.step, .source))]
    Tracking {
        /// The VMM's process.
        pid: u32,
        /// What was tried.
        step: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The VMM is gone: it died, or somebody ended it.
    #[error("QEMU (process {pid}) has ended")]
    Gone {
        /// The VMM's process.
        pid: u32,
    },
    /// The process under trace did not do what was asked of it.
    #[error("cannot run a system call inside process {pid}: {problem}")]
    Inject {
        /// The VMM's process.
        pid: u32,
        /// What happened.
        problem: String,
    },
    /// The file system that holds the guest's RAM is full.
    #[error(
        "no room for the guest's RAM in {}: {source}; free memory on this host or enlarge the file system (mount -o remount,size=…)",
        path.display()
    )]
    NoRoom {
        /// The RAM file.
        path: PathBuf,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

fn hint(step: &str, source: &std::io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => " (the agent needs CAP_SYS_PTRACE; root has it)",
        Some(libc::EINVAL | libc::ENOTTY) if step.contains("PAGEMAP_SCAN") => {
            " (the kernel has no PAGEMAP_SCAN: Linux 6.7 or later is needed)"
        }
        Some(libc::EINVAL) if step.contains("userfaultfd") => {
            " (the kernel lacks asynchronous write protection: Linux 6.7 or later is needed)"
        }
        Some(libc::EBUSY) if step.contains("register") => {
            " (another userfaultfd covers the guest's RAM: is post-copy or another migration of this VM going on?)"
        }
        _ => "",
    }
}
