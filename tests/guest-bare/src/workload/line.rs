//! One line of text in a buffer of its own, so that it goes out in one piece.

use core::fmt;

const CAPACITY: usize = 192;

/// A line under construction; what does not fit is cut off.
pub struct Line {
    bytes: [u8; CAPACITY],
    used: usize,
}

impl Line {
    /// Formats a text and ends it with a newline.
    pub fn new(text: fmt::Arguments) -> Self {
        let mut line = Line { bytes: [0; CAPACITY], used: 0 };
        // An error is a text that was cut off, which is what shall happen to it.
        let _ = fmt::write(&mut line, text);
        line.bytes[line.used] = b'\n';
        line.used += 1;
        line
    }

    /// The text with its newline.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.used]
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // One byte is kept for the newline.
        let fits = text.len().min(CAPACITY - 1 - self.used);
        self.bytes[self.used..self.used + fits].copy_from_slice(&text.as_bytes()[..fits]);
        self.used += fits;
        if fits == text.len() { Ok(()) } else { Err(fmt::Error) }
    }
}
