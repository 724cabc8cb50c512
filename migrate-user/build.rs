//! Builds the XDP program from source and hands its path to the library as `XFERRY_XDP_OBJECT`.
//!
//! The BPF target has no prebuilt `core`, so the compiler must be able to build it (`-Z build-std`) and must
//! find its sources, and bpf-linker's LLVM must not be older than the compiler's. Two kinds of machine can:
//! one with rustup's nightly and its `rust-src` component, and a Debian one with `rustc-web` and
//! `rust-web-src`. What is there is taken; what is missing is named.
//!
//! Every profile of the outer build, clippy, and the fuzz targets run this script each for itself. So that they need not build `core`
//! again each time, `XFERRY_BPF_TARGET_DIR` may name one target directory for all of them, as `cargo xtask` does.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

const TARGET: &str = "bpfel-unknown-none";
/// Names the target directory that several builds share.
const SHARED: &str = "XFERRY_BPF_TARGET_DIR";

fn main() {
    if let Err(problem) = build() {
        eprintln!("\nxferry's XDP program cannot be built: {problem}");
        std::process::exit(1);
    }
}

fn build() -> Result<(), String> {
    let manifest = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let workspace = manifest.parent().ok_or("migrate-user has no parent directory")?;
    for watched in ["migrate-ebpf", "migrate-common"] {
        println!("cargo:rerun-if-changed={}", workspace.join(watched).display());
    }
    println!("cargo:rerun-if-changed=build.rs");

    let out_dir = PathBuf::from(variable("OUT_DIR")?);
    let target_dir = env::var_os(SHARED).map_or_else(|| out_dir.join("bpf"), PathBuf::from);
    let mut cargo = toolchain()?;
    cargo
        .current_dir(workspace)
        .args(["build", "--package", "migrate-ebpf", "--release"])
        .args(["--target", TARGET, "-Z", "build-std=core", "--target-dir"])
        .arg(&target_dir)
        .env("RUSTFLAGS", "-C linker=bpf-linker -C link-arg=--btf -C debuginfo=2")
        // `-Z` on a compiler that calls itself stable.
        .env("RUSTC_BOOTSTRAP", "1")
        // What cargo tells its build scripts about the outer build must not leak into the inner one.
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("CARGO_MAKEFLAGS");
    let status = cargo.status().map_err(|error| format!("{cargo:?} does not start: {error}"))?;
    if !status.success() {
        return Err(
            "the compiler failed, see above; `cargo xtask setup` installs a toolchain that works".into()
        );
    }
    let built = target_dir.join(TARGET).join("release/xferry-xdp");
    let object = out_dir.join("xferry-xdp");
    fs::copy(&built, &object)
        .map_err(|error| format!("{} cannot be copied to {}: {error}", built.display(), object.display()))?;
    println!("cargo:rustc-env=XFERRY_XDP_OBJECT={}", object.display());
    Ok(())
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|_| format!("cargo did not set {name}"))
}

/// A cargo that can build for the BPF target.
fn toolchain() -> Result<Command, String> {
    let linker = Command::new("bpf-linker").arg("--version").output();
    if !linker.is_ok_and(|output| output.status.success()) {
        return Err("bpf-linker is not on the PATH; run `cargo xtask setup`".into());
    }
    if has_source(&sysroot("rustup", &["run", "nightly", "rustc"])) {
        let mut cargo = Command::new("rustup");
        cargo.args(["run", "nightly", "cargo"]);
        cargo.env_remove("RUSTC").env_remove("CARGO");
        return Ok(cargo);
    }
    if Path::new("/usr/bin/cargo").exists() && has_source(&sysroot("/usr/bin/rustc", &[])) {
        let mut cargo = Command::new("/usr/bin/cargo");
        cargo.env("RUSTC", "/usr/bin/rustc").env_remove("CARGO").env_remove("RUSTUP_TOOLCHAIN");
        return Ok(cargo);
    }
    Err("no Rust compiler with its library sources was found: neither rustup's nightly with the component \
         rust-src, nor the distribution's own compiler with its rust-src package; run `cargo xtask setup`"
        .into())
}

fn sysroot(program: &str, arguments: &[&str]) -> Option<PathBuf> {
    let output = Command::new(program)
        .args(arguments)
        .args(["--print", "sysroot"])
        .env_remove("RUSTUP_TOOLCHAIN")
        .output()
        .ok()?;
    output.status.success().then(|| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
}

fn has_source(sysroot: &Option<PathBuf>) -> bool {
    sysroot.as_ref().is_some_and(|root| root.join("lib/rustlib/src/rust/library/core/src/lib.rs").exists())
}
