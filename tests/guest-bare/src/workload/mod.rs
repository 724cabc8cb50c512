//! What both guests do: write pages at a rate, verify what they hold, count what is wrong.
//!
//! This directory is compiled into the bare-metal guest and into the program of the Linux guest. It uses
//! `core` only and leaves clock, console and memory to its user.

mod area;
mod line;
mod pace;
mod page;
mod params;
mod report;
mod run;

pub use area::Area;
pub use line::Line;
pub use page::PAGE_SIZE;
#[allow(unused_imports, reason = "only the Linux guest needs it")]
pub use page::mix;
pub use params::Params;
#[allow(unused_imports, reason = "only the Linux guest keeps them")]
pub use report::{Counters, Mismatch};
pub use report::{READY_LINE, Reporter, error_line, report_line};
pub use run::{Progress, Workload};
