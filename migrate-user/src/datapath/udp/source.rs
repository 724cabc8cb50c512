//! Receiving: batches of datagrams, each of which may be several that the kernel joined.

use std::{io::IoSliceMut, os::fd::OwnedFd, sync::Arc};

use quinn_udp::RecvMeta;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{
    gate::{Gate, Watch},
    socket::UdpEnd,
};
use crate::datapath::{Datagram, FrameSource};

/// Datagrams, or several joined, taken by one call of the kernel.
const BATCH: usize = 16;
/// Room for one of them, bytes: joined ones are no longer than the longest single one.
const BUFFER: usize = 1 << 16;

/// A UDP socket as source. What the gate does not let in is counted there and given to nobody.
pub struct UdpSource {
    end: Arc<UdpEnd>,
    watch: Watch,
    buffers: Vec<u8>,
    metas: [RecvMeta; BATCH],
    /// Buffers that hold something.
    filled: usize,
    /// The first that is not used up, and where its next datagram begins.
    at: (usize, usize),
}

impl UdpSource {
    /// Takes what comes to `end` and is let in by `gate`.
    pub fn new(end: Arc<UdpEnd>, gate: Arc<Gate>) -> Self {
        Self {
            end,
            watch: Watch::new(gate),
            buffers: vec![0; BATCH * BUFFER],
            metas: [RecvMeta::default(); BATCH],
            filled: 0,
            at: (0, 0),
        }
    }

    /// Whether there is something in the buffers, from now on if need be.
    fn fill(&mut self) -> bool {
        if self.at.0 < self.filled {
            return true;
        }
        (self.filled, self.at) = (0, (0, 0));
        let mut slices = self.buffers.chunks_mut(BUFFER).map(IoSliceMut::new);
        let mut slices: [IoSliceMut<'_>; BATCH] =
            std::array::from_fn(|_| slices.next().unwrap_or_else(|| IoSliceMut::new(&mut [])));
        // Nothing there; or an error that the network reported of an answer, which this socket never gives.
        if let Ok(count) = self.end.state.recv((&self.end.socket).into(), &mut slices, &mut self.metas) {
            self.filled = count;
        }
        self.filled > 0
    }
}

impl FrameSource for UdpSource {
    fn receive(&mut self, budget: usize, mut take: impl FnMut(Option<&Datagram<'_>>)) -> usize {
        self.watch.renew();
        let (mut looked_at, mut let_in) = (0, 0);
        while looked_at < budget && self.fill() {
            let (index, start) = self.at;
            let meta = &self.metas[index];
            let len = meta.len.min(BUFFER);
            // One of no length is looked at too, and counted.
            let end = len.min(start + meta.stride.max(1));
            let pieces = [&self.buffers[index * BUFFER..][start..end]];
            let datagram = Datagram::bare(&pieces);
            looked_at += 1;
            if self.watch.lets_in(&datagram, meta.addr.ip()) {
                let_in += 1;
                take(Some(&datagram));
            }
            self.at = if end < len { (index, end) } else { (index + 1, 0) };
        }
        // Whoever is not let in keeps nobody from telling the others how far they got.
        let_in
    }

    fn wait(&self, wake: &OwnedFd, timeout_ms: i64) -> std::io::Result<()> {
        if self.at.0 < self.filled {
            return Ok(());
        }
        let timeout = Timespec { tv_sec: timeout_ms / 1000, tv_nsec: (timeout_ms % 1000) * 1_000_000 };
        let mut fds = [PollFd::new(&self.end.socket, PollFlags::IN), PollFd::new(wake, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(other) => Err(other.into()),
        }
    }
}
