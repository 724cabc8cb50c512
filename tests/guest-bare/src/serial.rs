//! The first serial port, written without ever waiting for it.
//!
//! A reader that does not drain the port must not stop the workload: text goes to a ring and from there
//! to the port when it has room. A line that does not fit into the ring is dropped as a whole.

use crate::port;
use crate::workload::Line;

const BASE: u16 = 0x3f8;
const LINE_STATUS: u16 = BASE + 5;
const TRANSMITTER_EMPTY: u8 = 0x20;
/// Bytes that a 16550 takes at once when its transmitter is empty.
const FIFO: usize = 16;
const RING: usize = 8192;

/// The port and what still has to go out.
pub struct Serial {
    ring: [u8; RING],
    read: usize,
    used: usize,
}

impl Serial {
    /// Sets up the port: 115200 baud, 8N1, FIFO on, interrupts off.
    pub fn new() -> Self {
        for (register, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 7), (4, 3)] {
            port::write(BASE + register, value);
        }
        Serial { ring: [0; RING], read: 0, used: 0 }
    }

    /// Queues one line, or drops it when there is no room for all of it.
    pub fn line(&mut self, line: &Line) {
        let bytes = line.as_bytes();
        if bytes.len() > RING - self.used {
            return;
        }
        for &byte in bytes {
            self.ring[(self.read + self.used) % RING] = byte;
            self.used += 1;
        }
    }

    /// Is there anything left to send?
    pub fn is_busy(&self) -> bool {
        self.used > 0
    }

    /// Sends what the port takes right now.
    pub fn pump(&mut self) {
        if self.used == 0 || port::read(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {
            return;
        }
        for _ in 0..self.used.min(FIFO) {
            port::write(BASE, self.ring[self.read]);
            self.read = (self.read + 1) % RING;
            self.used -= 1;
        }
    }

    /// Sends everything; only for a guest that ends.
    pub fn flush(&mut self) {
        while self.is_busy() {
            self.pump();
        }
    }
}
