//! Where frames go.

use crate::xsk::TxQueue;

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
}

/// Frames a batch holds before the kernel is called: its own budget per call, `TX_BATCH_SIZE` of net/xdp/xsk.c.
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
}

impl FrameSink for XskSink {
    fn frame(&mut self, fill: impl FnOnce(&mut [u8]) -> usize) -> std::io::Result<bool> {
        let Some(mut slot) = self.queue.slot() else { return Ok(false) };
        let len = fill(self.queue.bytes(&mut slot));
        if len == 0 {
            self.queue.discard(slot);
            return Ok(true);
        }
        let mut unsent = self.queue.send(slot, len);
        // The ring holds the descriptors of every slot, so room comes as soon as the kernel runs.
        while let Err(slot) = unsent {
            self.kick()?;
            std::thread::yield_now();
            unsent = self.queue.send(slot, len);
        }
        self.unkicked += 1;
        if self.unkicked >= BATCH {
            self.kick()?;
        }
        Ok(true)
    }

    fn flush(&mut self) -> std::io::Result<usize> {
        self.kick()?;
        self.queue.reclaim();
        Ok(self.queue.pending() as usize)
    }
}
