//! `xferry check` and `migrate --force` on real QEMUs: every finding is shown with its remedy, and what could lose
//! the VM is not overridden.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;

use xferry_lab::guest::GuestKind;
use xferry_lab::lab::{Accel, Disk, LabConfig, Output, Side, VmConfig};
use xferry_lab::scenario::{Scenario, Workload, bare, linux, skipped};

/// How long a command may take.
const LIMIT: Duration = Duration::from_secs(90);
const CHECK: [&str; 4] = ["check", "demo", "--to", "host-b"];
const MIGRATE: [&str; 5] = ["migrate", "demo", "--to", "host-b", "--verify"];

fn sound(vm: VmConfig) -> Scenario {
    Scenario::started(LabConfig::for_test(), vm).unwrap()
}

fn usual() -> VmConfig {
    bare(Workload::USUAL).unwrap()
}

fn run(scenario: &Scenario, args: &[&str], more: &[&str]) -> Output {
    scenario.lab.a.xferry(&[args, more].concat(), LIMIT).unwrap()
}

/// `check` with these options ends with this exit code, leaves the VM alone, and says what it found in JSON.
fn check(scenario: &Scenario, more: &[&str], code: i32) -> Value {
    let output = run(scenario, &CHECK, &[&["--json"], more].concat());
    assert_eq!(output.status.code(), Some(code), "{}{}", output.stdout, output.stderr);
    scenario.expect_running(Side::A).unwrap();
    scenario.lab.b.wait_vm_gone(LIMIT).unwrap();
    serde_json::from_str(&output.stdout).unwrap()
}

/// The finding of a check: the worst, where it has several.
fn row(answer: &Value, check: &str) -> Value {
    let order = ["good", "warning", "unknown", "bad"];
    let findings = answer["findings"].as_array().unwrap();
    let rank = |finding: &&Value| order.iter().position(|verdict| finding["verdict"] == *verdict);
    let found = findings.iter().filter(|finding| finding["check"] == check).max_by_key(rank);
    found.unwrap_or_else(|| panic!("no {check} in {answer:#}")).clone()
}

/// The finding has this verdict and these words.
fn says(finding: &Value, verdict: &str, words: &[&str]) {
    let text = format!("{}: {}", finding["found"].as_str().unwrap(), finding["remedy"].as_str().unwrap());
    assert_eq!(finding["verdict"], verdict, "{text}");
    assert!(words.iter().all(|word| text.contains(word)), "{words:?} in {text}");
}

fn has(text: &str, words: &[&str]) {
    assert!(words.iter().all(|word| text.contains(word)), "{words:?} in {text}");
}

fn replaced(command: &[String], old: &str, new: &str) -> Vec<String> {
    let command: Vec<String> = command.iter().map(|argument| argument.replace(old, new)).collect();
    assert!(command.iter().any(|argument| argument.contains(new)), "{new} in {command:?}");
    command
}

/// What host-b would start instead.
fn on_b(scenario: &Scenario, old: &str, new: &str) {
    let command = replaced(&scenario.command(Side::B), old, new);
    scenario.lab.b.write_vm_command(Some(&command)).unwrap();
}

#[test]
fn pair_that_fits() {
    if skipped("pair_that_fits", GuestKind::Bare) {
        return;
    }
    let scenario = sound(usual());
    let begun = Instant::now();
    let output = run(&scenario, &CHECK, &[]);
    println!("check took {} ms\n{}", begun.elapsed().as_millis(), output.stdout);
    assert_eq!(output.status.code(), Some(0), "{}", output.stdout);
    assert!(output.stdout.starts_with("✓ demo can go from host-a to host-b"), "{}", output.stdout);
    let answer = check(&scenario, &[], 0);
    assert_eq!((answer["ok"].as_bool(), answer["outcome"].as_str()), (Some(true), Some("can-go")));
    let findings = answer["findings"].as_array().unwrap();
    for finding in findings {
        let explained = finding["verdict"] == "warning" && finding["remedy"] != "";
        assert!(finding["verdict"] == "good" || explained, "{finding:#}");
    }
    assert!(findings.len() >= 29, "{} rows", findings.len());
    says(&row(&answer, "cpu-features"), "good", &["on both hosts"]);
    says(&row(&answer, "clock-offset"), "good", &["host-b is", "±"]);
    says(&row(&answer, "uplink"), "good", &["52:54:00:78:66:01 by uplink0"]);
    says(&row(&answer, "path-mtu"), "good", &["MTU 9000"]);
    scenario.expect_migrates(Side::A, &["--verify"]).unwrap();
}

#[test]
fn missing_cpu_features_can_be_forced() {
    if skipped("missing_cpu_features_can_be_forced", GuestKind::Bare) {
        return;
    }
    let scenario = sound(usual());
    // Something that this processor has, and a guest that only moves memory never asks for.
    on_b(&scenario, "host,-arch-capabilities", "host,-arch-capabilities,-clflushopt,-umip");
    let refused = check(&scenario, &[], 1);
    let finding = row(&refused, "cpu-features");
    says(&finding, "bad", &["host-b lacks", "clflushopt, umip", "named model"]);
    assert_eq!(finding["overridable"], true);
    let table = run(&scenario, &CHECK, &[]).stdout;
    has(&table, &["✗ demo cannot go", "✗ cpu-features", "→ give the same -cpu", "--force overrides this"]);
    let output = run(&scenario, &MIGRATE, &[]);
    assert_eq!(output.status.code(), Some(1));
    has(&output.stdout, &["cpu-features", "clflushopt, umip", "--force overrides this"]);
    scenario.expect_running(Side::A).unwrap();

    let forced = check(&scenario, &["--force"], 0);
    assert_eq!(row(&forced, "cpu-features")["overridden"], true);
    has(&run(&scenario, &CHECK, &["--force"]).stdout, &["overridden by --force"]);
    let output = run(&scenario, &MIGRATE, &["--force"]);
    assert_eq!(output.status.code(), Some(0), "{}{}", output.stdout, output.stderr);
    has(&output.stdout, &["overridden by --force: cpu-features: host-b lacks", "clflushopt, umip"]);
    scenario.expect_moved(Side::A).unwrap();
}

/// Several things are wrong at once: all are told, and those that could lose the VM are not overridden.
#[test]
fn what_could_lose_the_vm_is_not_forced() {
    if skipped("what_could_lose_the_vm_is_not_forced", GuestKind::Bare) {
        return;
    }
    let scenario = sound(usual());
    let mut command = replaced(&scenario.command(Side::B), "256M", "128M");
    command
        .extend(["-machine", "pc", "-cpu", "host,-arch-capabilities,-umip", "-smp", "2"].map(str::to_owned));
    scenario.lab.b.write_vm_command(Some(&command)).unwrap();
    for more in [&[][..], &["--force"]] {
        let answer = check(&scenario, more, 1);
        says(&row(&answer, "machine-type"), "bad", &["q35", "i440fx", "same -machine"]);
        says(&row(&answer, "ram-layout"), "bad", &["256 MiB on host-a", "128 MiB on host-b", "same -m"]);
        says(&row(&answer, "vcpus"), "bad", &["1 on host-a, 2 on host-b"]);
        says(&row(&answer, "cpu-features"), "bad", &["umip"]);
        says(&row(&answer, "path-mtu"), "good", &[]);
        let output = run(&scenario, &MIGRATE, more);
        assert_eq!(output.status.code(), Some(1));
        has(&output.stdout, &["machine-type: ", "ram-layout: ", "vcpus: "]);
        assert_eq!(output.stdout.contains("cpu-features: "), more.is_empty(), "{}", output.stdout);
        scenario.expect_running(Side::A).unwrap();
        scenario.lab.b.wait_vm_gone(LIMIT).unwrap();
    }
    assert!(!scenario.lab.b.vm_paths().ram.exists(), "what a check makes, it takes away");
    scenario.lab.b.write_vm_definition(&scenario.vm).unwrap();
    scenario.expect_migrates(Side::A, &["--verify"]).unwrap();
}

/// Somebody keeps a QEMU waiting on the destination: a check looks at it, and it goes on waiting.
#[test]
fn waiting_qemu_is_left_waiting() {
    if skipped("waiting_qemu_is_left_waiting", GuestKind::Bare) {
        return;
    }
    let scenario = sound(usual());
    let mut command = scenario.command(Side::B);
    command.extend(["-incoming", "defer", "-S"].map(str::to_owned));
    scenario.lab.b.start_qemu(&command).unwrap();
    scenario.lab.b.write_vm_command(None).unwrap();
    let pids = scenario.lab.b.qemu_pids().unwrap();
    for _ in 0..2 {
        let output = run(&scenario, &CHECK, &[]);
        assert_eq!(output.status.code(), Some(0), "{}{}", output.stdout, output.stderr);
        assert_eq!(scenario.lab.b.qemu_pids().unwrap(), pids);
    }
    scenario.expect_migrates(Side::A, &["--verify"]).unwrap();
    assert_eq!(scenario.lab.b.qemu_pids().unwrap(), pids);
}

/// The source has reasons of its own, and the destination's are shown all the same.
#[test]
fn reasons_of_both_sides() {
    if skipped("reasons_of_both_sides", GuestKind::Bare) {
        return;
    }
    let scenario = Scenario::new(LabConfig::for_test(), usual()).unwrap();
    scenario.start_agents().unwrap();
    let mut command = replaced(&scenario.command(Side::A), "share=on", "share=off");
    command.extend(["-device", "virtio-balloon-pci,id=ballast"].map(str::to_owned));
    scenario.boot_by(&command).unwrap();
    let answer = check(&scenario, &["--force"], 1);
    says(&row(&answer, "ram-backing"), "bad", &["share=off", "share=on"]);
    says(&row(&answer, "devices"), "bad", &["ballast", "start the VM without it"]);
    says(&row(&answer, "device-set"), "bad", &["virtio-balloon-pci only on host-a"]);
    says(&row(&answer, "machine-type"), "good", &["q35"]);
    says(&row(&answer, "path-mtu"), "good", &["9000"]);
}

#[test]
fn what_cannot_be_told() {
    if skipped("what_cannot_be_told", GuestKind::Bare) {
        return;
    }
    let scenario = Scenario::new(LabConfig::for_test(), usual()).unwrap();
    scenario.boot().unwrap();
    // Not even an agent here.
    assert_eq!(run(&scenario, &CHECK, &[]).status.code(), Some(2));
    scenario.lab.a.start_agent().unwrap();
    let answer = check(&scenario, &["--force"], 2);
    says(&row(&answer, "peer"), "unknown", &["10.78.0.2:4790", "is `xferry agent` running there"]);
    says(&row(&answer, "vm-state"), "good", &[]);
    has(&run(&scenario, &CHECK, &[]).stdout, &["? whether demo can go", "? peer"]);
    let unknown = run(&scenario, &["check", "demi", "--to", "host-b"], &[]);
    assert_eq!(unknown.status.code(), Some(2));
    has(&unknown.stderr, &["demi.toml", "defined are: demo"]);
}

#[test]
fn memory_and_admission() {
    if skipped("memory_and_admission", GuestKind::Bare) {
        return;
    }
    let scenario = Scenario::new(LabConfig::for_test(), usual()).unwrap();
    scenario.boot().unwrap();
    scenario.lab.a.start_agent().unwrap();
    let admission = |rules: &str| {
        scenario.lab.b.kill_agent();
        scenario.lab.b.start_agent_with(&format!("\n[admission]\n{rules}\n")).unwrap();
    };
    // More than any machine has.
    admission("memory-headroom-mib = 1073741824");
    for more in [&[][..], &["--force"]] {
        let answer = check(&scenario, more, 1);
        let words = ["not enough memory", "1073741824 MiB stay", "memory-headroom-mib on host-b"];
        says(&row(&answer, "memory"), "bad", &words);
    }
    // A QEMU that takes its memory as it starts is not started.
    on_b(&scenario, "share=on", "share=on,prealloc=on");
    let answer = check(&scenario, &[], 1);
    says(&row(&answer, "memory"), "bad", &["not enough memory"]);
    says(&row(&answer, "machine-type"), "unknown", &["not compared"]);
    scenario.lab.b.write_vm_definition(&scenario.vm).unwrap();

    admission("max-arriving = 0");
    let answer = check(&scenario, &["--force"], 1);
    says(&row(&answer, "admission"), "bad", &["takes 0 at once", "max-arriving on host-b"]);
    let output = run(&scenario, &MIGRATE, &["--force"]);
    has(&output.stdout, &["admission: ", "max-arriving"]);
    admission("max-arriving = 1");
    says(&row(&check(&scenario, &[], 0), "admission"), "good", &["0 of at most 1"]);
    scenario.expect_migrates(Side::A, &["--verify"]).unwrap();
}

/// Too small a file system, and one that RAM cannot be tracked on.
#[test]
fn room_and_backing() {
    if skipped("room_and_backing", GuestKind::Bare) {
        return;
    }
    let scenario = sound(usual());
    let ram_dir = scenario.lab.b.vm_paths().ram.parent().unwrap().display().to_string();
    let tiny = format!("mount -t tmpfs -o size=16m none {ram_dir} && exec \"$@\"");
    let on_tiny: Vec<String> = ["unshare", "--mount", "sh", "-c", &tiny, "sh"]
        .map(str::to_owned)
        .into_iter()
        .chain(scenario.command(Side::B))
        .collect();
    scenario.lab.b.write_vm_command(Some(&on_tiny)).unwrap();
    let answer = check(&scenario, &["--force"], 1);
    says(&row(&answer, "ram-room"), "bad", &["no room for the VM's RAM", "16 MiB free", "size="]);

    let ram = scenario.lab.b.vm_paths().ram.display().to_string();
    let elsewhere = scenario.lab.layout().disk().with_extension("ram");
    on_b(&scenario, &ram, &elsewhere.display().to_string());
    let answer = check(&scenario, &["--force"], 1);
    assert!(!elsewhere.exists(), "what a check makes, it takes away");
    says(&row(&answer, "ram-backing"), "bad", &["host-b", "file system of type", "on tmpfs"]);
}

/// The guest that has a disk, with O_DIRECT.
#[test]
fn disks() {
    if skipped("disks", GuestKind::Linux) {
        return;
    }
    let scenario = sound(linux(Workload::USUAL, Disk::Direct).unwrap());
    assert_eq!(scenario.vm.accel, Accel::Tcg);
    let answer = check(&scenario, &[], 0);
    says(&row(&answer, "dirty-scan"), "warning", &["quiesced", "O_DIRECT", "1 to 3 ms"]);
    says(&row(&answer, "disks"), "good", &["the same on both hosts", "64 MiB"]);
    says(&row(&answer, "tsc"), "good", &["emulated"]);

    let image = scenario.lab.layout().disk().display().to_string();
    let other = |name: &str| scenario.lab.layout().disk().with_extension(name);
    let use_other = |path: &std::path::Path| on_b(&scenario, &image, &path.display().to_string());
    use_other(&other("missing"));
    for more in [&[][..], &["--force"]] {
        let answer = check(&scenario, more, 1);
        says(&row(&answer, "disks"), "bad", &[".missing", "No such file", "mount or export"]);
    }
    // A copy that was made and then lived its own life; here it was never a copy.
    fs::write(other("other"), vec![7; 64 << 20]).unwrap();
    use_other(&other("other"));
    let answer = check(&scenario, &["--force"], 1);
    fs::write(other("other"), vec![7; 32 << 20]).unwrap();
    let smaller = check(&scenario, &["--force"], 1);
    fs::remove_file(other("other")).unwrap();
    says(&row(&answer, "disks"), "bad", &["another image", "copies are not moved"]);
    says(&row(&smaller, "disks"), "bad", &["the size", "67108864 bytes on host-a"]);

    // Somebody else writes it.
    scenario.lab.b.write_vm_definition(&scenario.vm).unwrap();
    let writer = fs::File::options().append(true).open(&image).unwrap();
    let answer = check(&scenario, &["--force"], 1);
    drop(writer);
    let pid = format!("(pid {})", std::process::id());
    says(&row(&answer, "disks"), "bad", &["open for writing on host-b", &pid]);
    let report = scenario.expect_migrates(Side::A, &["--verify"]).unwrap();
    let notes = report.get("/notes").unwrap().to_string();
    has(&notes, &["dirty-scan: quiesced"]);
}

/// Where the VM would be announced is not known: it could go, and the network would learn it late.
#[test]
fn missing_uplink_can_be_forced() {
    if skipped("missing_uplink_can_be_forced", GuestKind::Bare) {
        return;
    }
    let scenario = sound(usual());
    let definition = scenario.lab.b.vm_definition("demo");
    let text = fs::read_to_string(&definition).unwrap();
    fs::write(&definition, text.replace("uplink0", "uplink9")).unwrap();
    let answer = check(&scenario, &[], 1);
    says(&row(&answer, "uplink"), "bad", &["host-b has no interface uplink9", "announce-on"]);
    let output = run(&scenario, &MIGRATE, &["--force"]);
    assert_eq!(output.status.code(), Some(0), "{}{}", output.stdout, output.stderr);
    has(&output.stdout, &["overridden by --force: uplink"]);
    scenario.expect_moved(Side::A).unwrap();
}
