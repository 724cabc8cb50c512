//! Migrates a VM again and again, disturbs every migration by one fault, and counts what became of the VM.

use std::process::ExitCode;

use clap::Parser;
use xferry_lab::faults::{self, Args};

fn main() -> ExitCode {
    faults::main(&Args::parse())
}
