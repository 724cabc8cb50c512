//! Access to I/O ports.

/// Writes one byte to a port.
pub fn write(port: u16, value: u8) {
    // SAFETY: the boot code permits the ports below 0x400; those used here (serial line, timer,
    // interrupt controller) do not touch memory.
    unsafe {
        core::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags));
    }
}

/// Reads one byte from a port.
pub fn read(port: u16) -> u8 {
    let value: u8;
    // SAFETY: as in `write`.
    unsafe {
        core::arch::asm!("in al, dx", out("al") value, in("dx") port, options(nomem, nostack, preserves_flags));
    }
    value
}
