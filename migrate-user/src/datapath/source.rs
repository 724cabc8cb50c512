//! Where frames come from.

use std::os::fd::OwnedFd;

use super::datagram::Datagram;
use crate::xsk::RxQueue;

/// Gives received datagrams one by one.
pub trait FrameSource: Send {
    /// Gives at most `budget` datagrams to the data port to `take`, `None` for one that cannot be read. Returns how many
    /// there were.
    fn receive(&mut self, budget: usize, take: impl FnMut(Option<&Datagram<'_>>)) -> usize;

    /// Waits until some are there or `timeout_ms` have passed; `wake` may end the wait early.
    ///
    /// # Errors
    /// When the link is broken.
    fn wait(&self, wake: &OwnedFd, timeout_ms: i64) -> std::io::Result<()>;
}

/// An AF_XDP socket's receiving half as source.
pub struct XskSource {
    queue: RxQueue,
    port: u16,
}

impl XskSource {
    /// Takes what comes to UDP port `port`.
    pub fn new(queue: RxQueue, port: u16) -> Self {
        Self { queue, port }
    }
}

impl FrameSource for XskSource {
    fn receive(&mut self, budget: usize, mut take: impl FnMut(Option<&Datagram<'_>>)) -> usize {
        let port = self.port;
        self.queue.receive(budget, |packet| take(Datagram::in_ethernet(&packet, port).as_ref()))
    }

    fn wait(&self, wake: &OwnedFd, timeout_ms: i64) -> std::io::Result<()> {
        Ok(self.queue.wait(wake, timeout_ms)?)
    }
}
