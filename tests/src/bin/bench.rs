//! Measures xferry beside QEMU's own migration on the same link.

use std::process::ExitCode;

use clap::Parser;
use xferry_lab::bench::{self, Args};

fn main() -> ExitCode {
    bench::main(&Args::parse())
}
