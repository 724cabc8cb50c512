//! Shows a live migration: a VM moves from one host to the other and back, in a lab of network
//! namespaces, while somebody pings it.

use std::process::ExitCode;

use clap::Parser;
use xferry_lab::demo::{self, Args};

fn main() -> ExitCode {
    demo::main(&Args::parse())
}
