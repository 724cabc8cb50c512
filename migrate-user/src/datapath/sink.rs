//! Where frames go.

use super::direct::DirectSink;
use crate::xsk::{ChainChunk, TxQueue, TxSlot};

/// Takes frames one by one.
pub trait FrameSink: Send {
    /// Lets `fill` write one frame and queues it. `fill` gets room for a frame as long as the path takes, of unknown
    /// content and returns the frame's length, 0 for none. Returns `false` without calling `fill` while there is
    /// no room; [`flush`](Self::flush) and try again.
    ///
    /// # Errors
    /// When the link is broken.
    fn frame(&mut self, fill: impl FnOnce(&mut [u8]) -> usize) -> std::io::Result<bool>;

    /// Pushes queued frames on their way. Returns how many are still queued.
    ///
    /// # Errors
    /// When the link is broken.
    fn flush(&mut self) -> std::io::Result<usize>;

    /// The sink itself, where it takes pages from where they lie.
    fn direct(&mut self) -> Option<&mut DirectSink> {
        None
    }
}

/// Frames a batch holds before the kernel is called, where one call sends as many.
const BATCH: u32 = 32;

/// An AF_XDP socket's sending half as sink: pages are staged in its UMEM.
pub struct XskSink {
    queue: TxQueue,
    unkicked: u32,
}

impl XskSink {
    /// Takes the queue over; [`into_inner`](Self::into_inner) gives it back.
    pub fn new(queue: TxQueue) -> Self {
        Self { queue, unkicked: 0 }
    }

    /// The queue.
    pub fn into_inner(self) -> TxQueue {
        self.queue
    }

    fn kick(&mut self) -> std::io::Result<()> {
        self.unkicked = 0;
        Ok(self.queue.kick()?)
    }

    /// A frame of its slot's first `head` bytes, at most a chunk, and of whole chunks: `fill` gets the slot's bytes, and room for
    /// the chunks' places in order, and returns `head`, 0 for none. `false` as with [`FrameSink::frame`].
    pub(super) fn chain(
        &mut self,
        rest: &mut Vec<ChainChunk>,
        fill: impl FnOnce(&mut [u8], &mut Vec<ChainChunk>) -> usize,
    ) -> std::io::Result<bool> {
        let Some(mut slot) = self.queue.slot() else { return Ok(false) };
        rest.clear();
        let head = fill(self.queue.bytes(&mut slot), rest);
        if head == 0 {
            self.queue.discard(slot);
            return Ok(true);
        }
        self.send(slot, |queue, slot| queue.send_chain(slot, head, rest))?;
        Ok(true)
    }

    fn send(
        &mut self,
        slot: TxSlot,
        mut send: impl FnMut(&mut TxQueue, TxSlot) -> Result<(), TxSlot>,
    ) -> std::io::Result<()> {
        let mut unsent = send(&mut self.queue, slot);
        // The ring holds the descriptors of every slot, so room comes as soon as the kernel runs.
        while let Err(slot) = unsent {
            self.kick()?;
            std::thread::yield_now();
            unsent = send(&mut self.queue, slot);
        }
        self.unkicked += 1;
        if self.unkicked >= BATCH || self.queue.is_full_call() {
            self.kick()?;
        }
        Ok(())
    }
}

impl FrameSink for XskSink {
    fn frame(&mut self, fill: impl FnOnce(&mut [u8]) -> usize) -> std::io::Result<bool> {
        let Some(mut slot) = self.queue.slot() else { return Ok(false) };
        let len = fill(self.queue.bytes(&mut slot));
        if len == 0 {
            self.queue.discard(slot);
            return Ok(true);
        }
        self.send(slot, |queue, slot| queue.send(slot, len))?;
        Ok(true)
    }

    fn flush(&mut self) -> std::io::Result<usize> {
        self.kick()?;
        self.queue.reclaim();
        Ok(self.queue.pending() as usize)
    }
}
