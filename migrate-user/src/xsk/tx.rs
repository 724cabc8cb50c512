//! The sending half of a socket.

use std::{collections::VecDeque, os::fd::OwnedFd, sync::Arc};

use rustix::net::xdp::{XdpDesc, XdpDescOptions};

use super::{
    ring::{Consumer, Producer},
    umem::{CHUNK_SIZE, Umem},
};

/// Descriptors that one call of the kernel sends in copy mode where nothing else is agreed: net/xdp/xsk.c.
pub(super) const TX_BATCH_SIZE: u32 = 32;

/// A place for one frame: contiguous chunks of the UMEM, ours until it is sent.
#[derive(Debug)]
pub struct TxSlot {
    index: u32,
}

/// A whole chunk of the UMEM within a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainChunk {
    /// One of the frame's slot, by its number in it.
    OfSlot(u8),
    /// One outside all slots, by its address in the UMEM, bytes.
    At(u64),
}

fn descriptor(addr: u64, len: usize, last: bool) -> XdpDesc {
    let options = if last { XdpDescOptions::empty() } else { XdpDescOptions::XDP_PKT_CONTD };
    XdpDesc { addr, len: len as u32, options }
}

/// The sending half of a socket: TX ring, completion ring and its own part of the UMEM, cut into slots that
/// hold one frame each.
pub struct TxQueue {
    tx: Producer<XdpDesc>,
    completion: Consumer<u64>,
    /// Before the UMEM, so that it is closed when that is unmapped. `None` when the other end of the rings is in this process
    /// (tests).
    socket: Option<Arc<OwnedFd>>,
    umem: Umem,
    /// Address of slot 0 in the UMEM, bytes.
    base: u64,
    slot_chunks: u32,
    free: VecDeque<u32>,
    /// Per slot: chunks of it that the kernel still holds.
    outstanding: Vec<u8>,
    /// Descriptors that one call of the kernel sends.
    budget: u32,
    /// Descriptors queued since the last call.
    unkicked: u32,
}

impl TxQueue {
    /// A queue over rings and the part of `umem` that begins at `base` and has `slots` slots of `slot_chunks` chunks.
    pub fn new(
        tx: Producer<XdpDesc>,
        completion: Consumer<u64>,
        umem: Umem,
        base: u64,
        slots: u32,
        slot_chunks: u32,
        socket: Option<Arc<OwnedFd>>,
    ) -> Self {
        Self {
            tx,
            completion,
            umem,
            base,
            slot_chunks,
            free: (0..slots).collect(),
            outstanding: vec![0; slots as usize],
            budget: TX_BATCH_SIZE,
            unkicked: 0,
            socket,
        }
    }

    /// The same where one call of the kernel sends so many descriptors.
    pub(super) fn with_budget(self, budget: u32) -> Self {
        Self { budget, ..self }
    }

    /// Whether another frame could be more than the next [`kick`](Self::kick) sends: what it leaves behind waits for one after it.
    pub fn is_full_call(&self) -> bool {
        self.unkicked + self.slot_chunks > self.budget
    }

    /// Longest frame a slot holds, bytes.
    pub fn slot_len(&self) -> usize {
        self.slot_chunks as usize * CHUNK_SIZE
    }

    /// A free slot, or `None` while the kernel holds them all.
    pub fn slot(&mut self) -> Option<TxSlot> {
        if self.free.is_empty() {
            self.reclaim();
        }
        self.free.pop_front().map(|index| TxSlot { index })
    }

    /// The slot's bytes.
    pub fn bytes<'a>(&'a mut self, slot: &'a mut TxSlot) -> &'a mut [u8] {
        let address = self.address(slot.index);
        // SAFETY: the token `slot` is the only one for its chunks, and the kernel has given them back.
        let bytes = unsafe { self.umem.bytes_mut(address, self.slot_len()) };
        // The constructor's slots lie within the UMEM.
        bytes.unwrap_or_default()
    }

    /// Puts a slot back unused.
    pub fn discard(&mut self, slot: TxSlot) {
        self.free.push_front(slot.index);
    }

    fn address(&self, index: u32) -> u64 {
        self.base + u64::from(index) * self.slot_len() as u64
    }

    /// Queues the first `len` bytes of the slot as one frame: all of its descriptors or none.
    ///
    /// # Errors
    /// Gives the slot back when the ring has no room; [`kick`](Self::kick) and try again.
    pub fn send(&mut self, slot: TxSlot, len: usize) -> Result<(), TxSlot> {
        debug_assert!(0 < len && len <= self.slot_len());
        let chunks = len.div_ceil(CHUNK_SIZE);
        let base = self.address(slot.index);
        let descriptors = (0..chunks).map(|chunk| {
            let at = chunk * CHUNK_SIZE;
            descriptor(base + at as u64, (len - at).min(CHUNK_SIZE), chunk + 1 == chunks)
        });
        self.queue(slot, chunks as u8, descriptors)
    }

    /// Queues a frame that is the first `head` bytes of the slot, at most a chunk, and behind them the chunks of `rest`: all of
    /// its descriptors or none.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn send_chain(&mut self, slot: TxSlot, head: usize, rest: &[ChainChunk]) -> Result<(), TxSlot> {
        debug_assert!(0 < head && head <= CHUNK_SIZE && rest.len() < self.slot_chunks as usize);
        let base = self.address(slot.index);
        let own = rest.iter().filter(|chunk| matches!(chunk, ChainChunk::OfSlot(_))).count();
        let descriptors = (0..rest.len() + 1).map(|at| {
            let last = at == rest.len();
            match at.checked_sub(1).map(|behind| rest[behind]) {
                None => descriptor(base, head, last),
                Some(ChainChunk::OfSlot(index)) => {
                    descriptor(base + u64::from(index) * CHUNK_SIZE as u64, CHUNK_SIZE, last)
                }
                Some(ChainChunk::At(address)) => descriptor(address, CHUNK_SIZE, last),
            }
        });
        self.queue(slot, own as u8 + 1, descriptors)
    }

    /// Queues descriptors of which `own` are of the slot's chunks. Only these are waited for before the slot is free again: the
    /// others are nobody's to write to.
    fn queue(
        &mut self,
        slot: TxSlot,
        own: u8,
        descriptors: impl ExactSizeIterator<Item = XdpDesc>,
    ) -> Result<(), TxSlot> {
        let count = descriptors.len() as u32;
        if !self.tx.stage(descriptors) {
            return Err(slot);
        }
        self.unkicked += count;
        self.outstanding[slot.index as usize] = own;
        self.tx.publish();
        Ok(())
    }

    /// Lets the kernel send what is queued. Cheap when it needs no waking.
    ///
    /// # Errors
    /// What the kernel says of the socket; "busy" and "try again" are not errors.
    pub fn kick(&mut self) -> rustix::io::Result<()> {
        use rustix::{io::Errno, net::SendFlags};
        self.unkicked = 0;
        let Some(socket) = &self.socket else { return Ok(()) };
        if !self.tx.needs_wakeup() {
            return Ok(());
        }
        match rustix::net::send(socket, &[], SendFlags::DONTWAIT) {
            Ok(_) => Ok(()),
            // The kernel's budget for one call is spent, a lock is held, or the completion ring is full:
            // net/xdp/xsk.c, __xsk_generic_xmit(). The next kick goes on.
            Err(Errno::AGAIN | Errno::BUSY | Errno::NOBUFS) => Ok(()),
            Err(other) => Err(other),
        }
    }

    /// Descriptors that the kernel has not taken from the ring yet.
    pub fn pending(&mut self) -> u32 {
        self.tx.pending()
    }

    /// Takes back the slots of frames that have left.
    pub fn reclaim(&mut self) {
        while let Some(address) = self.completion.take() {
            let slot_len = self.slot_len() as u64;
            let Some(index) = address.checked_sub(self.base).map(|offset| offset / slot_len) else {
                continue;
            };
            let Some(left) = self.outstanding.get_mut(index as usize) else { continue };
            *left = left.saturating_sub(1);
            if *left == 0 {
                self.free.push_back(index as u32);
            }
        }
        self.completion.release();
    }

    /// Slots that are free now.
    pub fn free_slots(&mut self) -> usize {
        self.reclaim();
        self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::super::ring::ring_pair;
    use super::*;

    fn descriptor() -> XdpDesc {
        XdpDesc { addr: 0, len: 0, options: XdpDescOptions::empty() }
    }

    fn queue(ring: u32, slots: u32) -> (TxQueue, Consumer<XdpDesc>, Producer<u64>) {
        let (tx, kernel_tx) = ring_pair(ring, descriptor());
        let (kernel_completion, completion) = ring_pair(64, 0u64);
        let umem = Umem::anonymous(64).unwrap();
        (TxQueue::new(tx, completion, umem, 4096 * 4, slots, 3, None), kernel_tx, kernel_completion)
    }

    #[test]
    fn frame_becomes_a_chain_and_comes_back() {
        let (mut queue, mut kernel_tx, mut kernel_completion) = queue(8, 2);
        let mut slot = queue.slot().unwrap();
        queue.bytes(&mut slot)[..9000].fill(7);
        queue.send(slot, 9000).unwrap();
        let chain: Vec<XdpDesc> = std::iter::from_fn(|| kernel_tx.take()).collect();
        assert_eq!(chain.iter().map(|d| d.len).collect::<Vec<_>>(), [4096, 4096, 808]);
        assert_eq!(
            chain.iter().map(|d| d.options.contains(XdpDescOptions::XDP_PKT_CONTD)).collect::<Vec<_>>(),
            [true, true, false]
        );
        assert_eq!(chain[0].addr, 4096 * 4);
        assert_eq!(queue.free_slots(), 1);
        for (n, desc) in chain.iter().enumerate() {
            assert_eq!(queue.free_slots(), 1, "a slot is free when its last chunk ({n}) is back");
            assert!(kernel_completion.stage([desc.addr].into_iter()));
            kernel_completion.publish();
        }
        assert_eq!(queue.free_slots(), 2);
    }

    #[test]
    fn chain_takes_chunks_from_elsewhere_and_waits_for_its_own() {
        let (mut queue, mut kernel_tx, mut kernel_completion) = queue(8, 1);
        let slot = queue.slot().unwrap();
        let elsewhere = 4096 * 100;
        queue.send_chain(slot, 130, &[ChainChunk::At(elsewhere), ChainChunk::OfSlot(2)]).unwrap();
        let chain: Vec<XdpDesc> = std::iter::from_fn(|| kernel_tx.take()).collect();
        let seen: Vec<_> = chain.iter().map(|d| (d.addr, d.len, !d.options.is_empty())).collect();
        assert_eq!(seen, [(4096 * 4, 130, true), (elsewhere, 4096, true), (4096 * 6, 4096, false)]);
        for (address, free) in [(elsewhere, 0), (4096 * 4, 0), (4096 * 6, 1)] {
            assert!(kernel_completion.stage([address].into_iter()));
            kernel_completion.publish();
            assert_eq!(queue.free_slots(), free);
        }
    }

    #[test]
    fn full_ring_gives_the_slot_back_whole() {
        let (mut queue, mut kernel_tx, _completion) = queue(4, 4);
        let slot = queue.slot().unwrap();
        queue.send(slot, 9000).unwrap();
        let slot = queue.slot().unwrap();
        let slot = queue.send(slot, 9000).unwrap_err();
        assert_eq!(std::iter::from_fn(|| kernel_tx.take()).count(), 3, "no half a frame on the ring");
        kernel_tx.release();
        queue.send(slot, 9000).unwrap();
    }

    #[test]
    fn calls_are_no_larger_than_the_kernel_takes() {
        let frames_a_call = |budget| {
            let (queue, _kernel_tx, _kernel_completion) = queue(64, 32);
            let mut queue = queue.with_budget(budget);
            let mut frames = 0;
            while !queue.is_full_call() {
                let slot = queue.slot().unwrap();
                queue.send(slot, 9000).unwrap();
                frames += 1;
            }
            queue.kick().unwrap();
            assert!(!queue.is_full_call());
            frames
        };
        assert_eq!((frames_a_call(TX_BATCH_SIZE), frames_a_call(60)), (10, 20));
    }

    #[test]
    fn nonsense_completions_are_ignored() {
        let (mut queue, _kernel_tx, mut kernel_completion) = queue(8, 2);
        assert!(kernel_completion.stage([0, 4096, u64::MAX].into_iter()));
        kernel_completion.publish();
        assert_eq!(queue.free_slots(), 2);
    }
}
