//! Sending: frames of equal length become one batch, which the kernel cuts.

use std::{
    io::{Error, ErrorKind},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use quinn_udp::Transmit;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use super::{LONGEST, UdpError, socket::UdpEnd};
use crate::datapath::FrameSink;

/// Longest batch, bytes: the kernel makes one packet of it first, and an IPv6 header takes 20 bytes more than IPv4's.
const BATCH: usize = LONGEST - 20;
/// How long a flush waits for room in the socket.
const ROOM_WAIT: Duration = Duration::from_millis(1);

/// A UDP socket as sink, of one lane.
pub struct UdpSink {
    end: UdpEnd,
    to: SocketAddr,
    batch: Batch,
    /// Frames that the kernel takes at once; 1 where it, or the NIC, cannot cut.
    most: usize,
}

/// Frames that wait, one behind the other: first those that leave as one, then at most one that does not fit them.
struct Batch {
    buffer: Vec<u8>,
    /// Where the frames that have not left begin, bytes.
    start: usize,
    /// Where they end.
    end: usize,
    /// Length of each of them but the last, which may be shorter.
    segment: usize,
    frames: usize,
    /// Length of the frame behind them, 0 for none.
    next: usize,
    /// Whether no other frame can join.
    complete: bool,
}

impl Batch {
    fn new() -> Self {
        let buffer = vec![0; BATCH + LONGEST];
        Self { buffer, start: 0, end: 0, segment: 0, frames: 0, next: 0, complete: false }
    }

    /// Takes in the frame of `len` bytes that was written behind the others.
    fn add(&mut self, len: usize, most: usize) {
        if self.frames == 0 {
            self.segment = len;
        } else if len > self.segment || self.end + len > BATCH {
            self.next = len;
            self.complete = true;
            return;
        }
        self.frames += 1;
        self.end += len;
        let full = self.frames >= most || self.end + self.segment > BATCH;
        self.complete = full || len < self.segment;
    }

    /// The frames have left.
    fn clear(&mut self, most: usize) {
        let (next, at) = (self.next, self.end);
        (self.start, self.end, self.segment, self.frames, self.next) = (0, 0, 0, 0, 0);
        self.complete = false;
        if next > 0 {
            self.buffer.copy_within(at..at + next, 0);
            self.add(next, most);
        }
    }
}

impl UdpSink {
    /// Sends to `to` by way of `interface`: from port `port` of address `from`, or from any when that is taken.
    ///
    /// # Errors
    /// [`UdpError`].
    pub fn open(interface: &str, from: IpAddr, port: u16, to: SocketAddr) -> Result<Self, UdpError> {
        let end = UdpEnd::sender(interface, from, port, to)?;
        Ok(Self { most: end.state.max_gso_segments(), end, to, batch: Batch::new() })
    }

    /// Sends every frame by itself, as where the kernel cannot cut batches.
    #[must_use]
    pub fn without_batches(mut self) -> Self {
        self.most = 1;
        self
    }

    /// Sends what waits. Returns whether all of it has left.
    fn send(&mut self) -> std::io::Result<bool> {
        while self.batch.frames > 0 {
            let Batch { start, end, segment, .. } = self.batch;
            let whole = self.most > 1;
            let until = if whole { end } else { end.min(start + segment) };
            let transmit = Transmit {
                destination: self.to,
                ecn: None,
                contents: &self.batch.buffer[start..until],
                segment_size: (until - start > segment).then_some(segment),
                src_ip: None,
            };
            match self.end.state.try_send((&self.end.socket).into(), &transmit) {
                Ok(()) if until == end => self.batch.clear(self.most),
                Ok(()) => self.batch.start = until,
                Err(error) if is_full(&error) => return Ok(false),
                // An earlier frame found nobody there. This one may: whether anybody is there, feedback tells.
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                Err(error) if whole && transmit.segment_size.is_some() && cannot_cut(&error) => {
                    tracing::info!(%error, "the kernel does not cut batches of frames here: they are sent one by one");
                    self.most = 1;
                }
                // As any frame that finds no way: lost.
                Err(error) if error.raw_os_error() == Some(libc::EHOSTUNREACH) => self.skip(until),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Leaves what lies before `until` unsent.
    fn skip(&mut self, until: usize) {
        if until == self.batch.end {
            self.batch.clear(self.most);
        } else {
            self.batch.start = until;
        }
    }
}

/// Whether there is no room now: in the socket, or in the NIC's queue.
fn is_full(error: &Error) -> bool {
    error.kind() == ErrorKind::WouldBlock || error.raw_os_error() == Some(libc::ENOBUFS)
}

/// Whether a batch was refused because it is one (`udp_send_skb`, net/ipv4/udp.c): no checksum offload, or IPsec.
fn cannot_cut(error: &Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL))
}

impl FrameSink for UdpSink {
    fn frame(&mut self, fill: impl FnOnce(&mut [u8]) -> usize) -> std::io::Result<bool> {
        if self.batch.complete && !self.send()? {
            return Ok(false);
        }
        let at = self.batch.end;
        let len = fill(&mut self.batch.buffer[at..at + LONGEST]);
        if len > 0 {
            self.batch.add(len, self.most);
            if self.batch.complete {
                // Without room it stays complete, and is tried again before the next one.
                self.send()?;
            }
        }
        Ok(true)
    }

    fn flush(&mut self) -> std::io::Result<usize> {
        if !self.send()? {
            let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(ROOM_WAIT.subsec_nanos()) };
            match poll(&mut [PollFd::new(&self.end.socket, PollFlags::OUT)], Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(other) => return Err(other.into()),
            }
        }
        Ok(self.batch.frames + usize::from(self.batch.next > 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lengths of the frames that leave together, when so many are given.
    fn batches(lengths: &[usize], most: usize) -> Vec<Vec<usize>> {
        let mut batch = Batch::new();
        let mut all = Vec::new();
        let mut left = |batch: &mut Batch| {
            while batch.complete {
                let bytes = batch.end;
                let whole = batch.frames - 1;
                let last = bytes - whole * batch.segment;
                assert!(0 < last && last <= batch.segment && bytes <= BATCH.max(last));
                all.push(vec![batch.segment; whole].into_iter().chain([last]).collect());
                batch.clear(most);
            }
        };
        for &len in lengths {
            batch.add(len, most);
            left(&mut batch);
        }
        batch.complete = batch.frames > 0;
        left(&mut batch);
        all
    }

    #[test]
    fn equal_frames_leave_together() {
        assert_eq!(batches(&[8000; 20], 64), [vec![8000; 8], vec![8000; 8], vec![8000; 4]]);
        assert_eq!(batches(&[100; 130], 64), [vec![100; 64], vec![100; 64], vec![100; 2]]);
        assert_eq!(batches(&[60_000; 3], 64), [[60_000], [60_000], [60_000]]);
        assert_eq!(batches(&[8000; 3], 1), [[8000], [8000], [8000]]);
        assert_eq!(batches(&[LONGEST, 1], 64), [[LONGEST], [1]]);
    }

    #[test]
    fn a_shorter_frame_ends_a_batch_and_a_longer_one_begins_the_next() {
        assert_eq!(batches(&[8000, 8000, 50, 50], 64), [vec![8000, 8000, 50], vec![50]]);
        assert_eq!(batches(&[50, 8000, 8000], 64), [vec![50], vec![8000, 8000]]);
        assert_eq!(batches(&[50, 60_000, 60_000], 64), [[50], [60_000], [60_000]]);
        // A short one that is too much for what is left of the batch.
        assert_eq!(
            batches(&[9000, 9000, 40_000, 30_000], 64),
            [vec![9000, 9000], vec![40_000], vec![30_000]]
        );
    }
}
