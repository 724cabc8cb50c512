//! Installs what is missing. On Debian and its like by apt; elsewhere it says exactly what to install.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use anyhow::{Context, Result, bail};

use crate::cargo;

const BPF_LINKER: &str = "0.13.0";
/// Oldest QEMU that hands a stopped VM over as xferry needs it, and that the lab was run with.
const QEMU_MIN: u32 = 8;
const BACKPORTS: &str = "/etc/apt/sources.list.d/xferry-backports.sources";

/// Brings the machine to where everything builds and runs.
pub fn run() -> Result<()> {
    let mut missing = Missing::default();
    tools(
        &mut missing,
        &[
            ("ip", "iproute2"),
            ("bridge", "iproute2"),
            ("setpriv", "util-linux"),
            ("fsfreeze", "util-linux"),
            ("mount", "mount"),
            ("mkfs.ext4", "e2fsprogs"),
            ("ethtool", "ethtool"),
            ("tshark", "tshark"),
            ("cc", "gcc"),
        ],
    );
    qemu(&mut missing);
    compiler(&mut missing);
    provide(&missing)?;
    linker()
}

/// What the benchmark compares with, beside QEMU.
pub fn for_bench() -> Result<()> {
    let mut missing = Missing::default();
    tools(&mut missing, &[("iperf3", "iperf3")]);
    provide(&missing)
}

fn debian() -> bool {
    Path::new("/etc/debian_version").exists() && cargo::output("apt-get", &["--version"]).is_some()
}

fn provide(missing: &Missing) -> Result<()> {
    if missing.packages.is_empty() {
        return Ok(());
    }
    if !debian() {
        bail!(
            "this machine lacks, and only Debian's can be installed from here:\n  - {}",
            missing.by_hand.join("\n  - ")
        );
    }
    install(missing)
}

#[derive(Default)]
struct Missing {
    /// Debian packages.
    packages: BTreeSet<&'static str>,
    /// Whether one of them comes from the backports suite.
    backports: bool,
    /// The same in words for other distributions.
    by_hand: Vec<String>,
}

impl Missing {
    fn add(&mut self, packages: &[&'static str], words: &str) {
        self.packages.extend(packages);
        self.by_hand.push(words.to_owned());
    }
}

fn tools(missing: &mut Missing, wanted: &[(&str, &'static str)]) {
    for &(program, package) in wanted {
        let look = format!("command -v {program} || ls /sbin/{program} /usr/sbin/{program}");
        if cargo::output("sh", &["-c", &look]).is_none() {
            missing.add(&[package], &format!("{program} (package {package})"));
        }
    }
}

fn qemu(missing: &mut Missing) {
    let version = cargo::output("qemu-system-x86_64", &["--version"]);
    let major = version
        .as_deref()
        .and_then(|text| text.split("version ").nth(1))
        .and_then(|text| text.split('.').next())
        .and_then(|major| major.parse::<u32>().ok());
    if major.is_none_or(|major| major < QEMU_MIN) {
        missing.add(&["qemu-system-x86"], &format!("QEMU {QEMU_MIN} or later (qemu-system-x86_64)"));
        missing.backports = true;
    }
}

/// rustup's nightly with `rust-src`, or the distribution's compiler with its sources.
fn compiler(missing: &mut Missing) {
    if bpf_rustc().is_none() {
        missing.add(
            &["rustc-web", "cargo-web", "rust-web-src"],
            "a Rust compiler that can build core: `rustup toolchain install nightly --component rust-src`",
        );
    }
}

/// The compiler that build.rs of migrate-user will take: program and arguments before its own.
fn bpf_rustc() -> Option<(&'static str, &'static [&'static str])> {
    let candidates: [(&str, &[&str]); 2] =
        [("rustup", &["run", "nightly", "rustc"]), ("/usr/bin/rustc", &[])];
    candidates.into_iter().find(|(program, before)| {
        let arguments = [before, &["--print", "sysroot"][..]].concat();
        cargo::output(program, &arguments).is_some_and(|root| {
            Path::new(root.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs").exists()
        })
    })
}

fn install(missing: &Missing) -> Result<()> {
    println!("installing {}", missing.packages.iter().copied().collect::<Vec<_>>().join(", "));
    if cargo::output("id", &["-u"]).is_none_or(|uid| uid.trim() != "0") {
        bail!("installing needs root: run as root once, or install: {}", missing.by_hand.join("; "));
    }
    let release = codename()?;
    let from_backports = missing.backports && release == "bookworm";
    if from_backports && !Path::new(BACKPORTS).exists() {
        fs::write(BACKPORTS, backports(&release)?).with_context(|| format!("cannot write {BACKPORTS}"))?;
    }
    apt(&["update"])?;
    let plain: Vec<&str> = missing
        .packages
        .iter()
        .copied()
        .filter(|package| !(from_backports && *package == "qemu-system-x86"))
        .collect();
    if !plain.is_empty() {
        apt(&[&["install", "-y", "--no-install-recommends"], &plain[..]].concat())?;
    }
    if from_backports {
        apt(&["install", "-y", "--no-install-recommends", "-t", "bookworm-backports", "qemu-system-x86"])?;
    }
    Ok(())
}

fn apt(arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.args(["-qq", "-o", "Dpkg::Use-Pty=0"]).args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    cargo::must(&mut command).context("apt-get failed: are the package sources reachable?")
}

fn codename() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let line = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    Ok(line.unwrap_or_default().trim_matches('"').to_owned())
}

/// A source for the backports suite at the place the machine gets its packages from.
fn backports(release: &str) -> Result<String> {
    let mut texts = vec![fs::read_to_string("/etc/apt/sources.list").unwrap_or_default()];
    for entry in fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten() {
        texts.push(fs::read_to_string(entry.path()).unwrap_or_default());
    }
    let (uri, signed_by) = texts
        .iter()
        .find_map(|text| source_of(text, release))
        .with_context(|| format!("no package source for {release} is configured under /etc/apt"))?;
    Ok(format!(
        "Types: deb\nURIs: {uri}\nSuites: {release}-backports\nComponents: main\nSigned-By: {signed_by}\n"
    ))
}

/// URI and keyring of the entry for `release`, in either of apt's formats (sources.list(5)).
fn source_of(text: &str, release: &str) -> Option<(String, String)> {
    const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
    for stanza in text.split("\n\n") {
        let field = |name: &str| {
            stanza.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned())
        };
        let (Some(uris), Some(suites)) = (field("URIs:"), field("Suites:")) else { continue };
        if suites.split_whitespace().any(|suite| suite == release) {
            let keyring = field("Signed-By:").unwrap_or_else(|| KEYRING.to_owned());
            return Some((uris.split_whitespace().next()?.to_owned(), keyring));
        }
    }
    for line in text.lines() {
        let words: Vec<&str> =
            line.split_whitespace().filter(|word| !word.starts_with('[') && !word.ends_with(']')).collect();
        if let ["deb", uri, suite, ..] = words[..]
            && suite == release
        {
            return Some((uri.to_owned(), KEYRING.to_owned()));
        }
    }
    None
}

/// bpf-linker, built against the LLVM of the compiler that will call it.
fn linker() -> Result<()> {
    if cargo::output("bpf-linker", &["--version"]).is_some() {
        return Ok(());
    }
    let llvm = llvm_major()?;
    let prefix = format!("/usr/lib/llvm-{llvm}");
    let own = Path::new(&prefix).join("lib/libLLVM.so").exists();
    if !own && debian() {
        apt(&["update"])?;
        apt(&["install", "-y", "--no-install-recommends", &format!("llvm-{llvm}-dev")])?;
    } else if !own {
        bail!(
            "bpf-linker is missing: install LLVM {llvm} with its headers, then `cargo install bpf-linker --version {BPF_LINKER} --no-default-features --features llvm-{llvm}`"
        );
    }
    println!("building bpf-linker {BPF_LINKER} against LLVM {llvm}; this takes a minute or two, once");
    let feature = format!("llvm-{llvm}");
    cargo::must(
        cargo::cargo()
            .args(["install", "bpf-linker", "--version", BPF_LINKER, "--locked", "--quiet"])
            .args(["--no-default-features", "--features", &feature])
            // bpf-linker's own build script, and llvm-sys's, look for LLVM by different names.
            .env("LLVM_PREFIX", &prefix)
            .env(format!("LLVM_SYS_{llvm}1_PREFIX"), &prefix),
    )
}

/// Major version of LLVM in the compiler for the BPF target.
fn llvm_major() -> Result<u32> {
    let (program, before) =
        bpf_rustc().context("no compiler for the BPF target was found after installing one")?;
    let arguments = [before, &["--version", "--verbose"][..]].concat();
    let text = cargo::output(program, &arguments).unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))
        .and_then(|version| version.split('.').next())
        .and_then(|major| major.parse().ok())
        .with_context(|| format!("{program} does not say its LLVM version"))
}

#[cfg(test)]
mod tests {
    use super::source_of;

    #[test]
    fn both_formats_of_sources_are_read() {
        let stanzas = "Types: deb\nURIs: http://mirror/debian-security\nSuites: bookworm-security\n\nTypes: deb\nURIs: http://mirror/debian\nSuites: bookworm bookworm-updates\nSigned-By: /k.gpg\n";
        assert_eq!(source_of(stanzas, "bookworm"), Some(("http://mirror/debian".into(), "/k.gpg".into())));
        let lines = "# deb http://no bookworm main\ndeb [arch=amd64] http://mirror/debian bookworm main\n";
        assert_eq!(source_of(lines, "bookworm").map(|found| found.0), Some("http://mirror/debian".into()));
        assert_eq!(source_of("", "bookworm"), None);
    }
}
