//! Tells the linker how to lay out an image that QEMU can start by PVH.

fn main() {
    let dir = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    let script = format!("-T{dir}/link.ld");
    let args = [
        "-nostdlib",
        "-static",
        "-no-pie",
        // The note must be the only one, or QEMU may look at another first.
        "-Wl,--build-id=none",
        "-Wl,--gc-sections",
        "-Wl,-z,max-page-size=4096",
        "-Wl,-z,norelro",
        &script,
    ];
    for arg in args {
        println!("cargo::rustc-link-arg-bins={arg}");
    }
    println!("cargo::rerun-if-changed=link.ld");
    println!("cargo::rerun-if-changed=src/boot.s");
}
