//! The receiving half of a socket.

use std::{os::fd::OwnedFd, sync::Arc};

use rustix::net::xdp::{XdpDesc, XdpDescOptions};

use super::{
    ring::{Consumer, Producer},
    umem::{CHUNK_SIZE, Umem},
};

/// Most buffers one frame may span: one linear part and `MAX_SKB_FRAGS` (17) fragments, `include/linux/skbuff.h`.
const MAX_BUFFERS: usize = 18;

/// One received frame, in the pieces the kernel left it in.
pub struct Packet<'a> {
    pieces: &'a [&'a [u8]],
}

impl<'a> Packet<'a> {
    /// A packet made of `pieces` (tests and other links make them too).
    pub fn new(pieces: &'a [&'a [u8]]) -> Self {
        Self { pieces }
    }

    /// The pieces in order.
    pub fn pieces(&self) -> &'a [&'a [u8]] {
        self.pieces
    }
}

/// The receiving half of a socket: RX ring, fill ring and its own part of the UMEM.
pub struct RxQueue {
    rx: Consumer<XdpDesc>,
    fill: Producer<u64>,
    umem: Umem,
    socket: Option<Arc<OwnedFd>>,
    /// Buffers of a frame whose end has not come yet.
    chain: Vec<XdpDesc>,
    /// Set while a frame of more than [`MAX_BUFFERS`] is being thrown away.
    skipping: bool,
}

impl RxQueue {
    /// A queue over rings whose fill side already owns its chunks of `umem`.
    pub fn new(rx: Consumer<XdpDesc>, fill: Producer<u64>, umem: Umem, socket: Option<Arc<OwnedFd>>) -> Self {
        Self { rx, fill, umem, socket, chain: Vec::with_capacity(MAX_BUFFERS), skipping: false }
    }

    /// Gives at most `budget` received frames to `handle`, then their buffers back to the kernel. Returns
    /// how many frames there were.
    pub fn receive(&mut self, budget: usize, mut handle: impl FnMut(Packet<'_>)) -> usize {
        let mut frames = 0;
        let mut pieces: [&[u8]; MAX_BUFFERS] = [&[]; MAX_BUFFERS];
        while frames < budget {
            let Some(desc) = self.rx.take() else { break };
            let more = desc.options.contains(XdpDescOptions::XDP_PKT_CONTD);
            if self.chain.len() == MAX_BUFFERS {
                self.skipping = true;
                self.give_back();
            }
            self.chain.push(desc);
            if more {
                continue;
            }
            if !self.skipping {
                let mut count = 0;
                for (piece, desc) in pieces.iter_mut().zip(&self.chain) {
                    // SAFETY: the kernel has handed these chunks over through the RX ring and gets them
                    // back only in give_back() below, after `handle` is done.
                    let bytes = unsafe { self.umem.bytes_mut(desc.addr, desc.len as usize) };
                    *piece = bytes.map_or(&[][..], |bytes| &*bytes);
                    count += 1;
                }
                handle(Packet { pieces: &pieces[..count] });
                frames += 1;
            }
            self.skipping = false;
            pieces = [&[]; MAX_BUFFERS];
            self.give_back();
        }
        self.rx.release();
        self.fill.publish();
        frames
    }

    /// Returns the chain's chunks to the fill ring.
    fn give_back(&mut self) {
        let chunks = self.chain.drain(..).map(|desc| desc.addr & !(CHUNK_SIZE as u64 - 1));
        // The fill ring is at least as large as the number of chunks, so there is always room.
        let staged = self.fill.stage(chunks);
        debug_assert!(staged);
    }

    /// Waits until frames are there or `timeout` ms have passed; `wake` may end the wait early.
    ///
    /// # Errors
    /// What `poll` says.
    pub fn wait(&self, wake: &OwnedFd, timeout_ms: i64) -> rustix::io::Result<()> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let Some(socket) = &self.socket else {
            std::thread::yield_now();
            return Ok(());
        };
        let timeout = Timespec { tv_sec: timeout_ms / 1000, tv_nsec: (timeout_ms % 1000) * 1_000_000 };
        let mut fds = [PollFd::new(socket, PollFlags::IN), PollFd::new(wake, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(other) => Err(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::ring::ring_pair;
    use super::*;

    fn desc(chunk: u64, len: u32, more: bool) -> XdpDesc {
        let options = if more { XdpDescOptions::XDP_PKT_CONTD } else { XdpDescOptions::empty() };
        XdpDesc { addr: chunk * CHUNK_SIZE as u64 + 256, len, options }
    }

    fn queue() -> (RxQueue, Producer<XdpDesc>, Consumer<u64>) {
        let (kernel_rx, rx) = ring_pair(64, desc(0, 0, false));
        let (fill, kernel_fill) = ring_pair(64, 0u64);
        (RxQueue::new(rx, fill, Umem::anonymous(64).unwrap(), None), kernel_rx, kernel_fill)
    }

    fn lens(queue: &mut RxQueue) -> Vec<Vec<usize>> {
        let mut seen = Vec::new();
        queue.receive(64, |packet| seen.push(packet.pieces().iter().map(|p| p.len()).collect()));
        seen
    }

    #[test]
    fn chains_are_joined_even_across_calls() {
        let (mut queue, mut rx, mut fill) = queue();
        assert!(rx.stage([desc(1, 3840, true), desc(2, 100, false), desc(3, 3840, true)].into_iter()));
        rx.publish();
        assert_eq!(lens(&mut queue), [vec![3840, 100]]);
        assert_eq!(std::iter::from_fn(|| fill.take()).collect::<Vec<_>>(), [4096, 8192]);
        assert!(rx.stage([desc(4, 7, false)].into_iter()));
        rx.publish();
        assert_eq!(lens(&mut queue), [vec![3840, 7]]);
        assert_eq!(std::iter::from_fn(|| fill.take()).collect::<Vec<_>>(), [3 * 4096, 4 * 4096]);
    }

    #[test]
    fn overlong_chain_is_dropped_and_its_buffers_return() {
        let (mut queue, mut rx, mut fill) = queue();
        let chain = (0..20).map(|n| desc(n, 10, n != 19)).chain([desc(20, 5, false)]);
        assert!(rx.stage(chain.collect::<Vec<_>>().into_iter()));
        rx.publish();
        assert_eq!(lens(&mut queue), [vec![5]]);
        assert_eq!(std::iter::from_fn(|| fill.take()).count(), 21);
    }

    #[test]
    fn descriptor_outside_the_umem_yields_no_bytes() {
        let (mut queue, mut rx, _fill) = queue();
        assert!(rx.stage([desc(1_000_000, 10, false)].into_iter()));
        rx.publish();
        assert_eq!(lens(&mut queue), [vec![0]]);
    }
}
