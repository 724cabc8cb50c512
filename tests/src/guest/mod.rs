//! The guests of the lab: they dirty and verify their own memory all the time, and report on the serial line.
//!
//! * [`GuestImage::prepare`] builds what a guest is started from: nothing of it is kept in the repository.
//! * [`GuestParams`] says what the guest shall do; [`GuestImage::cmdline`] makes a kernel command line of it.
//! * [`SerialLog`] reads what the guest prints.
//!
//! There are two kinds. The *bare-metal* one is a program without an operating system: it runs natively under
//! every KVM and dirties millions of pages per second. The *Linux* one is a Debian kernel with one program; it
//! has a network and a disk besides. Both count the pages that did not hold what was written to them last:
//! as long as `errors` is 0, nothing was lost.

mod build;
mod cache;
mod debian;
mod disk;
mod image;
mod initrd;
mod modules;
mod params;
mod probe;
mod report;
mod serial;
mod sources;

pub use disk::{disk_word, write_disk_pattern};
pub use image::{GuestImage, GuestKind};
pub use params::{Fill, GuestParams, Rate};
pub use probe::linux_runs_under_kvm;
pub use report::GuestReport;
pub use serial::SerialLog;
