//! The project's tasks. `cargo xtask` alone lists them.

mod cargo;
mod demo;
mod fuzz;
mod miri;
mod setup;
mod test;

use std::process::ExitCode;

use anyhow::{Result, bail};

const USAGE: &str = "\
cargo xtask TASK

  setup            install what building, demo and tests need (Debian: apt; elsewhere: say what is missing)
  build            setup, then build xferry with its XDP program (target/release/xferry)
  demo [OPTIONS]   build, then migrate a real VM between two hosts made of network namespaces, there and back
                   (--help lists the options; --guest bare, --mtu, --repeat, --json FILE, --keep …)
  test [FILTER]    everything that is checked: format, lints, unit tests, and the lab with real VMs
  bench [OPTIONS]  build, then measure xferry beside QEMU's own migration, TCP and bare AF_XDP on the same link
                   (--help lists cases; --quick, --only NAME, --json FILE, --check …)
  faults [OPTIONS] build, then migrate a real VM again and again, with one fault in each migration, and count what
                   became of it (--runs N, --seed S, --json FILE, --markdown FILE)
  fuzz [TARGET…]   fuzz the parsers of what comes from outside, all or those named (--runs N, --seconds S for each;
                   without either as long as `test` does; --asan with AddressSanitizer)
  miri [FILTER]    the tests of modules without system calls under Miri (nightly with miri and rust-src)
  wire [OPTIONS]   build, then measure migrations over a migration network that loses frames (--wire FAULTS …), or
                   beside a flood of strangers (--flood)
  load NIC         build, then attach the XDP program to NIC and show its counters
  clean            remove what `demo --keep` or a killed demo left behind
";

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    let Some(task) = arguments.next() else {
        print!("{USAGE}");
        return Ok(ExitCode::SUCCESS);
    };
    let rest: Vec<String> = arguments.collect();
    match task.as_str() {
        "setup" => setup::run()?,
        "build" => {
            setup::run()?;
            cargo::build_release()?;
        }
        "demo" => return demo::run(&rest),
        "bench" => return demo::bench(&rest),
        "faults" => return demo::faults(&rest),
        "fuzz" => return fuzz::run(&rest),
        "miri" => return miri::run(&rest),
        "wire" => return demo::wire(&rest),
        "clean" => return demo::run(&["--clean".to_owned()]),
        "load" => return demo::load(&rest),
        "test" => return test::run(&rest),
        "help" | "--help" | "-h" => print!("{USAGE}"),
        other => bail!("there is no task {other:?}\n\n{USAGE}"),
    }
    Ok(ExitCode::SUCCESS)
}
