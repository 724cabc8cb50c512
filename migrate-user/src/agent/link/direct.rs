//! A queue of the migration NIC for one migration alone, with the guest's RAM in its UMEM.

use std::{
    os::fd::BorrowedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::io::Errno;

use crate::{
    datapath::{DirectSink, FrameLayout, LaidOut},
    network::Nic,
    xsk::{BindMode, Binding, CHUNK_SIZE, FilePart, JoinedMemory, Socket, SocketConfig, Umem, XskError},
};

/// Frames that can wait to be sent: of 64 KiB as many as a window has at most (`MAX_WINDOW`), and some.
const SLOTS: u32 = 256;
/// How long a queue is waited for that its last user has just left: the kernel takes the UMEM off in the background
/// (`xp_release_deferred()`, net/xdp/xsk_buff_pool.c).
const LATE_RELEASE: Duration = Duration::from_millis(500);

/// Why pages are not sent from where they lie.
#[derive(Debug, thiserror::Error)]
pub(in crate::agent) enum NotDirect {
    /// Frames are sealed.
    #[error("pages are encrypted, and are copied for it (`encryption = \"off\"` would do without)")]
    Encrypted,
    /// No AF_XDP.
    #[error("UDP sockets cannot do it")]
    Udp,
    /// No second buffer in a frame.
    #[error("{0} sends frames of one buffer only, which has no room for headers and a page apart")]
    SingleBuffer(String),
    /// Fragments.
    #[error("at this MTU ({0} bytes) a page takes several frames")]
    SmallMtu(usize),
    /// The agent receives on every queue.
    #[error(
        "{interface} has no queue to spare: the agent receives on {used} of {queues}; set `queues` under [migration] lower, and keep \
         received frames off the others (`ethtool -X {interface} equal {fewer}`)",
        fewer = queues.saturating_sub(1)
    )]
    NoQueue {
        /// The migration NIC.
        interface: String,
        /// Queues that the agent receives on.
        used: u32,
        /// Queues that there are.
        queues: u32,
    },
    /// Nothing to lay out.
    #[error("no 2 MiB of the guest's RAM are without holes")]
    Sparse,
    /// Holes are not known.
    #[error("the guest's RAM is on hugetlbfs, which does not tell its holes: they would be filled")]
    Huge,
    /// What exists of the RAM is not known.
    #[error(transparent)]
    Memory(#[from] crate::memory::MemoryError),
    /// A mapping failed.
    #[error("the guest's RAM cannot be mapped side by side: {0}")]
    Map(Errno),
    /// The socket failed.
    #[error(transparent)]
    Xsk(#[from] XskError),
}

/// Takes the first queue of `nic` from number `used` on that is free, for `pages` of a guest whose RAM files are `files`, in the layout's
/// order. The kernel pins them meanwhile, until the sink is dropped.
///
/// # Errors
/// [`NotDirect`]; nothing has changed then.
pub(super) fn open(
    nic: &Nic,
    used: u32,
    binding: Binding,
    frames: &FrameLayout,
    pages: LaidOut,
    files: &[BorrowedFd<'_>],
) -> Result<DirectSink, NotDirect> {
    let tx_slot_chunks = frames.frame_len.div_ceil(CHUNK_SIZE).max(1 + frames.pages_per_frame) as u32;
    let parts: Vec<FilePart<'_>> = pages
        .stretches()
        .iter()
        .filter_map(|stretch| {
            Some(FilePart {
                file: *files.get(usize::from(stretch.backend))?,
                offset: stretch.page * CHUNK_SIZE as u64,
                len: stretch.pages as usize * CHUNK_SIZE,
            })
        })
        .collect();
    let slots_len = SLOTS as usize * tx_slot_chunks as usize * CHUNK_SIZE;
    let memory = JoinedMemory::new(slots_len, &parts).map_err(NotDirect::Map)?;
    let pages_at = memory.parts_at();
    let umem = Umem::over(Arc::new(memory))?;
    let mode = if binding.zero_copy { BindMode::ZeroCopyMultiBuffer } else { BindMode::CopyMultiBuffer };
    let mut busy =
        NotDirect::NoQueue { interface: nic.name.clone(), used: used.min(nic.queues), queues: nic.queues };
    for queue in used..nic.queues {
        let config = SocketConfig {
            interface: nic.name.clone(),
            ifindex: nic.index,
            queue,
            rx_chunks: 0,
            tx_slots: SLOTS,
            tx_slot_chunks,
        };
        match patiently(|| Socket::open_to_send(&config, mode, &umem)) {
            // The queue's own handle keeps the socket.
            Ok((_, tx)) => return Ok(DirectSink::new(tx, pages, pages_at)),
            Err(error) if is_busy(&error) => busy = error.into(),
            Err(error) => return Err(error.into()),
        }
    }
    Err(busy)
}

fn is_busy(error: &XskError) -> bool {
    matches!(error, XskError::System { source: Errno::BUSY, .. })
}

/// Tries for a while what fails because a queue is busy.
fn patiently<T>(mut open: impl FnMut() -> Result<T, XskError>) -> Result<T, XskError> {
    let begun = Instant::now();
    loop {
        match open() {
            Err(error) if is_busy(&error) && begun.elapsed() < LATE_RELEASE => {
                std::thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}
