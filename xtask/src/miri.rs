//! `cargo xtask miri`: the modules without system calls under Miri, which sees what no test can: undefined behaviour.

use std::{
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Result, bail};

use crate::cargo;

/// Tests of migrate-user that need no more of a kernel than files and clocks: wire format, messages, journal, definitions,
/// page sets and rings.
const PURE: [&str; 12] = [
    "control::check::",
    "control::channel::",
    "datapath::path::",
    // The rest of feedback, and of what guards frames, is of a library in C.
    "datapath::feedback::tests::comes_out",
    "datapath::accounting::",
    "datapath::layout::",
    "datapath::window::",
    "memory::pages::",
    "memory::layout::",
    "migration::journal::",
    "vmm::definition::",
    "xsk::ring::",
];
/// Cases of each property test: Miri is some hundred times slower than the processor.
const CASES: &str = "8";

/// Runs all of it, or with arguments only the tests whose name contains one of them.
pub fn run(filter: &[String]) -> Result<ExitCode> {
    if cargo::output("cargo", &["+nightly", "miri", "--version"]).is_none() {
        bail!("Miri is missing: `rustup toolchain install nightly --component miri`");
    }
    let sysroot = cargo::output("rustc", &["+nightly", "--print", "sysroot"]).unwrap_or_default();
    let sources = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library");
    // Not installed from here: build.rs of migrate-user takes a nightly that has sources for the XDP program, so that
    // the component changes how everything else is built on this machine.
    let given = ["MIRI_LIB_SRC", "MIRI_SYSROOT"].into_iter().any(|name| std::env::var_os(name).is_some());
    if !given && !sources.exists() {
        bail!(
            "Miri needs the standard library's sources: `rustup component add --toolchain nightly rust-src`, \
             or a copy of that compiler's `library` directory, named by MIRI_LIB_SRC, or what Miri once made of it \
             (`~/.cache/miri`), named by MIRI_SYSROOT"
        );
    }
    let pure: Vec<&str> =
        if filter.is_empty() { PURE.to_vec() } else { filter.iter().map(String::as_str).collect() };
    let mut passed = true;
    for (package, names) in [("migrate-common", &[][..]), ("migrate-user", &pure)] {
        println!("== miri {package}");
        // Not the cargo that runs this, which is another toolchain's.
        let mut miri = Command::new("cargo");
        miri.current_dir(cargo::root())
            .args(["+nightly", "miri", "test", "--quiet", "--package", package, "--lib", "--target-dir"])
            .arg(cargo::target_dir().join("miri"))
            .arg("--")
            .args(names)
            .env_remove("CARGO")
            .env_remove("RUSTUP_TOOLCHAIN")
            // Property tests look for a file of earlier failures.
            .env("MIRIFLAGS", "-Zmiri-disable-isolation")
            .env("PROPTEST_CASES", CASES);
        passed &= cargo::status(&mut miri)?.success();
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
