//! How many QEMU processes run the VM. Anything but one is a disaster: none, and it is lost; two, and
//! they ruin its disk.

use std::path::Path;

use anyhow::Result;

use super::vm_watch::VmWatch;
use crate::lab::monitor::Monitor;

/// The run state of the QEMU that listens on `socket`, once; `None` if none does. While a
/// [`VmWatch`] holds the socket, ask that.
///
/// # Errors
/// If it listens but does not answer, perhaps because a watch holds the socket.
pub fn qemu_status(socket: &Path) -> Result<Option<String>> {
    Monitor::open(socket)?.map(|mut qemu| qemu.query_status()).transpose()
}

/// How many of the watched QEMU processes run their VM's processors.
///
/// # Errors
/// If one does not answer.
pub fn owner_count<'a>(watches: impl IntoIterator<Item = &'a VmWatch>) -> Result<u32> {
    let mut owners = 0;
    for watch in watches {
        owners += u32::from(watch.status()?.as_deref() == Some("running"));
    }
    Ok(owners)
}
