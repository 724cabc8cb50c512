//! Sleeping until the next timer tick, so that a guest with little to do leaves the host's CPU alone.
//!
//! Ring 3 may not halt, so the fault that comes of it does it. The timer ticks for ever, which makes a
//! lost tick harmless: the next one ends the sleep. Interrupts stay off whenever the guest is not asleep.

use crate::address_space;
use crate::port;

unsafe extern "C" {
    static mut interrupt_gates: [[u64; 2]; 256];
    fn timer_gate();
    fn halt_gate();
}

const RING_0_CODE: u64 = 0x08;
/// Present, not to be called by ring 3.
const INTERRUPT_GATE: u64 = 0x8e00;
const PROTECTION_VECTOR: usize = 13;
const TIMER_VECTOR: usize = 0x20;
const TICKS_PER_SECOND: u32 = 500;

/// How to wait for the next piece of work.
pub struct Idle {
    spin: bool,
}

impl Idle {
    /// Starts the timer, unless the guest shall spin.
    pub fn new(spin: bool) -> Self {
        if !spin {
            set_gate(TIMER_VECTOR, timer_gate);
            set_gate(PROTECTION_VECTOR, halt_gate);
            let_interrupts_through();
            start_interrupt_controller();
            start_timer();
        }
        Idle { spin }
    }

    /// Returns at the next tick, at the latest.
    pub fn wait(&mut self) {
        if self.spin {
            for _ in 0..64 {
                core::hint::spin_loop();
            }
        } else {
            // SAFETY: the gate halts and comes back with all registers as they were; it runs on the stack of
            // ring 0, so not even the red zone of this one is touched.
            unsafe { core::arch::asm!("hlt", options(nomem, nostack)) }
        }
    }
}

fn set_gate(vector: usize, handler: unsafe extern "C" fn()) {
    let address = handler as usize as u64;
    let low = address & 0xffff | RING_0_CODE << 16 | INTERRUPT_GATE << 32 | (address >> 16 & 0xffff) << 48;
    // SAFETY: one CPU, interrupts off, no other reference; the processor reads the table.
    unsafe { (&raw mut interrupt_gates[vector]).write_volatile([low, address >> 32]) }
}

/// Wires the old controller to the CPU by way of the local one. Most firmware does that, small ones do not.
fn let_interrupts_through() {
    const LOCAL_CONTROLLER: usize = 0xfee0_0000;
    const SPURIOUS: usize = 0xf0;
    const LINE_0: usize = 0x350;
    address_space::map(LOCAL_CONTROLLER..LOCAL_CONTROLLER + 0x1000);
    for (register, value) in [(SPURIOUS, 0x1ff), (LINE_0, 0x700)] {
        let register = (LOCAL_CONTROLLER + register) as *mut u32;
        // SAFETY: every x86-64 processor has these registers at this address after a reset; it was just
        // mapped, and it is no memory.
        unsafe { register.write_volatile(value) }
    }
}

/// First controller's lines to vectors from 0x20 on, only the timer let through.
fn start_interrupt_controller() {
    for (port, value) in
        [(0x20, 0x11), (0x21, TIMER_VECTOR as u8), (0x21, 0x04), (0x21, 0x01), (0x21, 0xfe), (0xa1, 0xff)]
    {
        port::write(port, value);
    }
}

fn start_timer() {
    let count = 1_193_182 / TICKS_PER_SECOND;
    port::write(0x43, 0x34);
    port::write(0x40, count as u8);
    port::write(0x40, (count >> 8) as u8);
}
