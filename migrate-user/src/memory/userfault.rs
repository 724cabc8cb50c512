//! Asynchronous write protection of another process's memory.
//!
//! Kernel: `mm/userfaultfd.c`, `Documentation/admin-guide/mm/userfaultfd.rst` ("Write Protect Notifications").
//! With `UFFD_FEATURE_WP_ASYNC` a write to a protected page does not wait for anybody: the kernel lifts the
//! protection and the page counts as written. When the last descriptor goes, so does the protection.

use std::os::fd::{AsRawFd, OwnedFd};

use super::{Injector, MemoryError, Vma};

const UFFD_USER_MODE_ONLY: u64 = 1;
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

/// `_IOWR(0xaa, number, T)`.
const fn request<T>(number: libc::c_ulong) -> libc::c_ulong {
    (3 << 30) | ((size_of::<T>() as libc::c_ulong) << 16) | (0xaa << 8) | number
}

/// Write protection over a process's RAM. Lifted when dropped, also by the death of this process.
pub(super) struct UserFault {
    fd: OwnedFd,
    pid: u32,
}

impl UserFault {
    /// Creates it inside `pid` and takes it out.
    ///
    /// # Errors
    /// [`MemoryError`] that names the step.
    pub fn inside(pid: u32, injector: &Injector) -> Result<Self, MemoryError> {
        let flags = libc::O_CLOEXEC as u64 | libc::O_NONBLOCK as u64 | UFFD_USER_MODE_ONLY;
        let fd = injector.userfaultfd(pid, flags)?;
        let this = Self { fd, pid };
        let mut api = Api {
            api: UFFD_API,
            features: UFFD_FEATURE_PAGEFAULT_FLAG_WP
                | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
                | UFFD_FEATURE_WP_UNPOPULATED
                | UFFD_FEATURE_WP_ASYNC,
            ioctls: 0,
        };
        this.ioctl("userfaultfd features", request::<Api>(0x3f), &mut api)?;
        Ok(this)
    }

    /// Puts the range under its watch; nothing is protected yet.
    pub fn register(&self, vma: &Vma) -> Result<(), MemoryError> {
        let mut register =
            Register { start: vma.start, len: vma.end - vma.start, mode: UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
        self.ioctl("register the RAM", request::<Register>(0), &mut register)
    }

    /// Protects the whole range.
    pub fn protect(&self, vma: &Vma) -> Result<(), MemoryError> {
        let mut protect =
            WriteProtect { start: vma.start, len: vma.end - vma.start, mode: UFFDIO_WRITEPROTECT_MODE_WP };
        self.ioctl("write-protect the RAM", request::<WriteProtect>(6), &mut protect)
    }

    fn ioctl<T>(
        &self,
        step: &'static str,
        request: libc::c_ulong,
        argument: &mut T,
    ) -> Result<(), MemoryError> {
        // SAFETY: `argument` is the struct that belongs to the request and outlives the call.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), request, std::ptr::from_mut(argument)) };
        if result < 0 {
            return Err(MemoryError::Tracking {
                pid: self.pid,
                step,
                source: std::io::Error::last_os_error(),
            });
        }
        Ok(())
    }
}
