//! The `xferry` command.

mod cli;

use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    if let Some(code) = help_agent() {
        return code;
    }
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_env("XFERRY_LOG").unwrap_or_else(|_| EnvFilter::new("info")))
        .with_writer(std::io::stderr)
        .init();
    match cli::run(cli::Cli::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("xferry: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// When the agent has started this process for something that must not end with itself: does that, and nothing else.
fn help_agent() -> Option<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    match arguments.next()?.as_str() {
        xferry::memory::HELPER_ARGUMENT => help_tracker(arguments),
        xferry::vmm::GUARD_ARGUMENT => Some(xferry::vmm::guard(arguments)),
        _ => None,
    }
}

/// Reaches into a VMM.
fn help_tracker(mut arguments: impl Iterator<Item = String>) -> Option<ExitCode> {
    let pid = arguments.next().and_then(|pid| pid.parse().ok())?;
    let flags = arguments.next().and_then(|flags| flags.parse().ok())?;
    Some(match xferry::memory::help(pid, flags) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    })
}
