//! Measures the lab's bad wire, and migrations through it.

use std::process::ExitCode;

use clap::Parser;
use xferry_lab::wire::bench::{self, Args};

fn main() -> ExitCode {
    bench::main(&Args::parse())
}
