//! A wire in memory that drops, repeats, reorders and corrupts.

use std::sync::{Arc, Mutex, atomic::Ordering::Relaxed};

use super::PORT;
use crate::{
    datapath::{Datagram, Demux, FrameSink},
    xsk::Packet,
};

/// What the wire does to a frame, drawn from a seed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Faults {
    pub lose: u8,
    pub duplicate: u8,
    pub swap: u8,
    pub corrupt: u8,
}

pub(super) struct Wire {
    pub receiver: Arc<Mutex<Demux>>,
    pub faults: Arc<Mutex<Faults>>,
    pub seed: u64,
    pub held: Option<Vec<u8>>,
    pub lost: u64,
}

impl Wire {
    fn chance(&mut self, percent: u8) -> bool {
        // xorshift64: any source of varied numbers will do.
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed % 100 < u64::from(percent)
    }

    fn deliver(&mut self, frame: &[u8]) {
        let cut = frame.len().min(3840);
        let pieces: Vec<&[u8]> =
            if cut < frame.len() { vec![&frame[..cut], &frame[cut..]] } else { vec![frame] };
        let mut receiver = self.receiver.lock().unwrap();
        let damaged = receiver.damaged().load(Relaxed);
        receiver.take(Datagram::in_ethernet(&Packet::new(&pieces), PORT).as_ref());
        receiver.feedback(true);
        self.lost += receiver.damaged().load(Relaxed) - damaged;
    }

    fn push(&mut self, mut frame: Vec<u8>) {
        let faults = *self.faults.lock().unwrap();
        if self.chance(faults.lose) {
            self.lost += 1;
            return;
        }
        if self.chance(faults.corrupt) {
            let at = 42 + (self.seed as usize) % (frame.len() - 42);
            frame[at] ^= 0x10;
        }
        if self.chance(faults.duplicate) {
            self.deliver(&frame);
        }
        if self.held.is_none() && self.chance(faults.swap) {
            self.held = Some(frame);
            return;
        }
        self.deliver(&frame);
        if let Some(held) = self.held.take() {
            self.deliver(&held);
        }
    }
}

pub(super) struct WireSink {
    pub wire: Wire,
    pub capacity: usize,
}

impl FrameSink for WireSink {
    fn frame(&mut self, fill: impl FnOnce(&mut [u8]) -> usize) -> std::io::Result<bool> {
        // Old content, as in a reused slot: nothing may depend on zeroes.
        let mut buffer = vec![0xa5; self.capacity];
        let len = fill(&mut buffer);
        if len > 0 {
            buffer.truncate(len);
            self.wire.push(buffer);
        }
        Ok(true)
    }
    fn flush(&mut self) -> std::io::Result<usize> {
        Ok(0)
    }
}
