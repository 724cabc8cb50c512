//! A guest without an operating system that dirties memory and verifies it, for live-migration tests.
//!
//! It starts by PVH, goes to ring 3 at once and stays there: one loop writes pages at the rate that the
//! command line asks for, verifies each page before it is written, sweeps over all of them, and reports
//! on the first serial port. What it verifies and prints is in [`workload`], shared with the Linux guest.
#![no_std]
#![no_main]

mod address_space;
mod clock;
mod idle;
mod intrinsics;
mod memory_map;
mod port;
mod serial;
mod start_info;
mod workload;

use workload::{
    Area, Line, PAGE_SIZE, Params, Progress, READY_LINE, Reporter, Workload, error_line, report_line,
};

core::arch::global_asm!(include_str!("boot.s"), options(att_syntax));

/// Entered once from `boot.s`, in ring 3, on its own stack.
#[unsafe(no_mangle)]
extern "C" fn user_main() -> ! {
    let mut serial = serial::Serial::new();
    let info = start_info::StartInfo::from_boot();
    let params = Params::parse(info.command_line());
    let clock = clock::Clock::calibrate(params.tsc_khz);
    let mut idle = idle::Idle::new(params.spin);

    let mut region = memory_map::largest_free(&info);
    address_space::map(region.clone());
    region.end = region.end.min(address_space::LIMIT);
    let wanted = params.pages();
    let pages = wanted.min(memory_map::pages_that_fit(&region));
    if pages < wanted {
        serial.line(&Line::new(format_args!(
            "xferry-guest note: xferry.mib={} does not fit into the {} MiB free at {:#x}, using {} MiB",
            params.mib,
            (region.end - region.start) >> 20,
            region.start,
            (pages * PAGE_SIZE) >> 20,
        )));
    }
    let (base, generations) = memory_map::place(&region, pages);
    serial.line(&Line::new(format_args!(
        "xferry-guest note: pages={pages} at={:#x} tsc-khz={}",
        base as usize,
        clock.ticks_per_second() / 1000
    )));
    serial.flush();
    // SAFETY: `place` hands out RAM of that size which nothing else uses.
    let mut area = unsafe { Area::new(base, pages, generations, params.fill) };
    area.fill_up();
    serial.line(&Line::new(format_args!("{READY_LINE}")));

    let mut workload = Workload::new(area, params.rate, clock.ticks_per_second(), clock.now());
    let mut reporter = Reporter::new(clock.ticks_per_second());
    loop {
        let progress = workload.step(
            || clock.now(),
            |mismatch, errors| {
                if let Some(line) = error_line(mismatch, errors) {
                    serial.line(&line);
                }
            },
        );
        if reporter.is_due(clock.now()) {
            serial.line(&report_line(&workload.counters()));
        }
        serial.pump();
        if progress == Progress::Idle && !serial.is_busy() {
            idle.wait();
        }
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    let mut serial = serial::Serial::new();
    serial.line(&Line::new(format_args!("xferry-guest PANIC {info}")));
    serial.flush();
    loop {
        core::hint::spin_loop();
    }
}
