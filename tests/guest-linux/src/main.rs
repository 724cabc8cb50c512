//! The program of the Linux guest: what the bare-metal guest does, plus what only an operating system can.
//!
//! It dirties and verifies an area of memory ([`workload`], the same code as in the bare-metal guest), serves
//! an echo on TCP port 7000, verifies the disk when asked to, and reports on the console.

mod console;
mod disk;
mod echo;
mod memory;
#[path = "../../guest-bare/src/workload/mod.rs"]
mod workload;

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use console::Console;
use workload::{Area, Line, Params, Progress, READY_LINE, Workload};

/// Sleep between batches: long enough to leave the CPU alone, short enough for an even pace.
const PAUSE: Duration = Duration::from_millis(2);
/// The workload's clock counts nanoseconds.
const TICKS_PER_SECOND: u64 = 1_000_000_000;

fn main() -> Result<()> {
    let path = "/proc/cmdline";
    let command_line =
        std::fs::read_to_string(path).with_context(|| format!("{path} cannot be read, is /proc mounted?"))?;
    let params = Params::parse(&command_line);
    let mut console = Console::open()?;

    let fits = memory::pages_that_fit()?;
    let pages = params.pages().min(fits);
    if pages < params.pages() {
        console.write(&Line::new(format_args!(
            "xferry-guest note: xferry.mib={} does not fit, using {} MiB",
            params.mib,
            pages >> 8
        )));
    }
    let (base, generations) = memory::allocate(pages)?;
    // SAFETY: `allocate` maps that many pages, never unmaps them, and gives their address to us alone.
    let mut area = unsafe { Area::new(base, pages, generations, params.fill) };
    area.fill_up();

    echo::serve()?;
    console.write(&Line::new(format_args!("{READY_LINE}")));
    let board = console.report_from_now_on();
    if params.disk_read {
        disk::verify(&board)?;
    }

    let start = Instant::now();
    let clock = || u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let mut workload = Workload::new(area, params.rate, TICKS_PER_SECOND, clock());
    loop {
        let progress = workload.step(clock, |mismatch, _| board.error(mismatch));
        board.publish(&workload.counters());
        if progress == Progress::Idle {
            thread::sleep(PAUSE);
        }
    }
}
