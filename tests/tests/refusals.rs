//! What cannot be done is refused in a sentence that names object and remedy, and the VM runs on untouched.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use xferry_lab::guest::GuestKind;
use xferry_lab::lab::plan::{CONTROL_PORT, MANAGEMENT_NIC, MIGRATION_NIC};
use xferry_lab::lab::{LabConfig, Output, Side, netns, wait_for};
use xferry_lab::probe::qemu_status;
use xferry_lab::scenario::{FakePeer, Scenario, Workload, bare, greet, hello, ip, skipped};

/// How long a command that is refused may take.
const LIMIT: Duration = Duration::from_secs(60);
const MIGRATE: [&str; 4] = ["migrate", "demo", "--to", "host-b"];

/// A VM on host-a, and no agent yet.
fn vm_only() -> Scenario {
    let scenario = without_vm();
    scenario.boot().unwrap();
    scenario
}

/// A lab in which nothing runs.
fn without_vm() -> Scenario {
    Scenario::new(LabConfig::for_test(), bare(Workload::USUAL).unwrap()).unwrap()
}

/// A VM on host-a, and no agent yet; agents will have no certificates, so that others can speak with them.
fn insecure_vm_only() -> Scenario {
    let scenario = Scenario::new(LabConfig::insecure(), bare(Workload::USUAL).unwrap()).unwrap();
    scenario.boot().unwrap();
    scenario
}

/// Everything is as it should be.
fn sound() -> Scenario {
    Scenario::started(LabConfig::for_test(), bare(Workload::USUAL).unwrap()).unwrap()
}

/// The sentence has all these words.
fn says(text: &str, words: &[&str]) {
    assert!(words.iter().all(|word| text.contains(word)), "{words:?} in {text}");
}

/// The command fails with these words.
fn fails(output: &Output, words: &[&str]) {
    let said = format!("{}{}", output.stdout, output.stderr);
    assert!(!output.status.success(), "{said}");
    says(&said, words);
}

/// `xferry ARGS` on host-a is refused with these words, and neither the VM nor the other host notices.
fn refused(scenario: &Scenario, args: &[&str], words: &[&str]) {
    fails(&scenario.lab.a.xferry(args, LIMIT).unwrap(), words);
    scenario.expect_running(Side::A).unwrap();
    scenario.lab.b.wait_vm_gone(LIMIT).unwrap();
}

/// The agent of host-a does not start, for this reason.
fn agent_refuses(scenario: &Scenario, words: &[&str]) {
    let error = scenario.lab.a.start_agent().unwrap_err();
    says(&format!("{error:#}"), words);
}

#[test]
fn unknown_names() {
    if skipped("unknown_names", GuestKind::Bare) {
        return;
    }
    let scenario = sound();
    refused(
        &scenario,
        &["migrate", "demi", "--to", "host-b"],
        &["\"demi\"", "demi.toml", "defined are: demo"],
    );
    refused(&scenario, &["migrate", "../demo", "--to", "host-b"], &["../demo", "not a VM name"]);
    refused(&scenario, &["migrate", "demo", "--to", "host-z"], &["host-z", "[peers]", "host-b"]);
    refused(&scenario, &["cancel"], &["no migration is going on"]);
    refused(&scenario, &["report", "host-a-77"], &["host-a-77", "xferry status"]);
}

#[test]
fn command_without_an_agent() {
    if skipped("command_without_an_agent", GuestKind::Bare) {
        return;
    }
    let scenario = vm_only();
    let socket = scenario.lab.a.api_socket().display().to_string();
    refused(&scenario, &MIGRATE, &["agent", &socket, "xferry agent --config", "--socket"]);
}

#[test]
fn dead_qmp_socket() {
    if skipped("dead_qmp_socket", GuestKind::Bare) {
        return;
    }
    let scenario = sound();
    let socket = scenario.lab.a.dir().join("ghost.qmp");
    let path = socket.display().to_string();
    fs::write(scenario.lab.a.vm_definition("ghost"), format!("name = \"ghost\"\nqmp = \"{path}\"\n"))
        .unwrap();
    let ghost = ["migrate", "ghost", "--to", "host-b"];
    refused(&scenario, &ghost, &[&path, "is the VM running", "-qmp unix:"]);
    drop(UnixListener::bind(&socket).unwrap());
    refused(&scenario, &ghost, &[&path, "left over from a QEMU that is gone"]);
}

#[test]
fn monitor_held_by_somebody_else() {
    if skipped("monitor_held_by_somebody_else", GuestKind::Bare) {
        return;
    }
    let scenario = sound();
    let socket = scenario.lab.a.vm_paths().qmp;
    let holder = UnixStream::connect(&socket).unwrap();
    let mut greeting = String::new();
    BufReader::new(&holder).read_line(&mut greeting).unwrap();
    let path = socket.display().to_string();
    refused(&scenario, &MIGRATE, &[&path, "one client at a time", "second -qmp socket"]);
    drop(holder);
    scenario.expect_migrates(Side::A, &["--verify"]).unwrap();
}

#[test]
fn memory_that_is_not_a_shared_file() {
    if skipped("memory_that_is_not_a_shared_file", GuestKind::Bare) {
        return;
    }
    for found in ["memory-backend-ram", "share=off"] {
        let scenario = without_vm();
        scenario.start_agents().unwrap();
        let mut command = scenario.command(Side::A);
        if found == "share=off" {
            command = replaced(&command, "share=on", found);
        } else {
            // What QEMU takes when nobody tells it.
            let object = command.iter().position(|argument| argument == "-object").unwrap();
            command.drain(object..object + 2);
            command = replaced(&command, "q35,memory-backend=ram", "q35");
        }
        scenario.boot_by(&command).unwrap();
        refused(&scenario, &MIGRATE, &[found, "-object memory-backend-file", "share=on", "memory-backend="]);
    }
}

fn replaced(command: &[String], old: &str, new: &str) -> Vec<String> {
    command.iter().map(|argument| argument.replace(old, new)).collect()
}

fn with(command: &[String], more: &[&str]) -> Vec<String> {
    command.iter().cloned().chain(more.iter().map(|&argument| argument.to_owned())).collect()
}

#[test]
fn device_that_forbids_migration() {
    if skipped("device_that_forbids_migration", GuestKind::Bare) {
        return;
    }
    let scenario = without_vm();
    scenario.start_agents().unwrap();
    let balloon = ["-device", "virtio-balloon-pci,id=ballast"];
    scenario.boot_by(&with(&scenario.command(Side::A), &balloon)).unwrap();
    for command in ["migrate", "check"] {
        let args = [command, "demo", "--to", "host-b"];
        refused(&scenario, &args, &["demo", "ballast", "virtio-balloon", "start the VM without it"]);
    }
}

/// The definition on the destination is wrong in one way after the other.
#[test]
fn destination_that_does_not_fit() {
    if skipped("destination_that_does_not_fit", GuestKind::Bare) {
        return;
    }
    let scenario = sound();
    let command = scenario.command(Side::B);
    let ram_dir = scenario.lab.b.vm_paths().ram.parent().unwrap().display().to_string();
    let tiny = format!("mount -t tmpfs -o size=16m none {ram_dir} && exec \"$@\"");
    let on_tiny_tmpfs: Vec<String> = ["unshare", "--mount", "sh", "-c", &tiny, "sh"]
        .map(str::to_owned)
        .into_iter()
        .chain(command.iter().cloned())
        .collect();
    let cases: [(Vec<String>, &[&str]); 6] = [
        (with(&command, &["-machine", "pc"]), &["machine type", "q35", "i440fx", "same -machine"]),
        (replaced(&command, "256M", "128M"), &["256 MiB", "128 MiB", "RAM differs", "same -m"]),
        (with(&command, &["-no-such-option"]), &["demo", "-no-such-option", "invalid option"]),
        (with(&command, &["-device", "no-such-device"]), &["demo", "no-such-device", "not a valid device"]),
        (vec!["/nonexistent/qemu".to_owned()], &["cannot start /nonexistent/qemu", "No such file"]),
        (on_tiny_tmpfs, &["no room for the VM's RAM", "16 MiB free", &ram_dir, "size="]),
    ];
    for (command, words) in cases {
        scenario.lab.b.write_vm_command(Some(&command)).unwrap();
        refused(&scenario, &MIGRATE, words);
        assert_eq!(scenario.lab.a.report(None).unwrap().status(), Some("failed"));
        refused(&scenario, &["check", "demo", "--to", "host-b"], words);
    }
    scenario.lab.b.write_vm_command(None).unwrap();
    refused(&scenario, &MIGRATE, &["host-b", "demo.qmp", "-incoming defer -S", "command = ["]);
    fs::write(scenario.lab.b.vm_definition("demo"), "name = \"demo\"\ncomand = []\n").unwrap();
    refused(&scenario, &MIGRATE, &["host-b", "demo.toml", "comand"]);
    fs::remove_file(scenario.lab.b.vm_definition("demo")).unwrap();
    refused(&scenario, &MIGRATE, &["host-b refuses", "\"demo\"", "demo.toml"]);
    // Nothing of all that is left in the way.
    scenario.lab.b.write_vm_definition(&scenario.vm).unwrap();
    scenario.expect_migrates(Side::A, &["--verify"]).unwrap();
}

/// What is there already is not ours: it is left alone.
#[test]
fn qemu_already_on_the_destination() {
    if skipped("qemu_already_on_the_destination", GuestKind::Bare) {
        return;
    }
    let scenario = sound();
    let command = scenario.command(Side::B);
    let cases: [(&[&str], &str, &[&str]); 2] = [
        (&["-incoming", "defer"], "inmigrate", &["waiting QEMU", "start it with -S"]),
        (&["-S"], "prelaunch", &["already there", "prelaunch", "does not wait for a migration"]),
    ];
    for (more, state, words) in cases {
        scenario.lab.b.start_qemu(&with(&command, more)).unwrap();
        let pids = scenario.lab.b.qemu_pids().unwrap();
        let says_pid = format!("pid {}", pids[0]);
        fails(&scenario.lab.a.xferry(&MIGRATE, LIMIT).unwrap(), &[&["host-b", &says_pid], words].concat());
        scenario.expect_running(Side::A).unwrap();
        assert_eq!(scenario.lab.b.qemu_pids().unwrap(), pids);
        let found = qemu_status(&scenario.lab.b.vm_paths().lab_qmp).unwrap();
        assert_eq!(found.as_deref(), Some(state));
        scenario.lab.b.kill_vm().unwrap();
    }
}

#[test]
fn nic_without_carrier() {
    if skipped("nic_without_carrier", GuestKind::Bare) {
        return;
    }
    let scenario = vm_only();
    let link =
        |state: &str| ip(&scenario.lab.b.namespace(), &format!("link set {MIGRATION_NIC} {state}")).unwrap();
    let words = ["mig0 has no carrier", "cable", "ip link set mig0 up"];
    link("down");
    agent_refuses(&scenario, &words);
    link("up");
    scenario.start_agents().unwrap();
    link("down");
    refused(&scenario, &MIGRATE, &words);
    link("up");
    scenario.expect_migrates(Side::A, &["--verify"]).unwrap();
}

/// The NICs take 9000 bytes, the switch between them does not.
#[test]
fn path_with_a_smaller_mtu() {
    if skipped("path_with_a_smaller_mtu", GuestKind::Bare) {
        return;
    }
    let words = ["MTU 9000", "host-b", "switch", "smaller MTU", "ip link set"];
    for (path_mtu, fits) in [(9000, true), (1500, false)] {
        let scenario = without_vm();
        scenario.lab.interpose_switch(path_mtu).unwrap();
        scenario.start_agents().unwrap();
        scenario.boot().unwrap();
        if fits {
            scenario.expect_migrates(Side::A, &["--verify"]).unwrap();
        } else {
            refused(&scenario, &MIGRATE, &words);
            refused(&scenario, &["check", "demo", "--to", "host-b"], &words);
        }
    }
}

#[test]
fn control_port_taken() {
    if skipped("control_port_taken", GuestKind::Bare) {
        return;
    }
    let scenario = vm_only();
    let address = (Side::A.management_ip(), CONTROL_PORT);
    let listener = netns::inside(&scenario.lab.a.namespace(), || Ok(TcpListener::bind(address)?)).unwrap();
    agent_refuses(&scenario, &["10.78.0.1:4790", "has the port", "[control] listen"]);
    drop(listener);
    scenario.expect_running(Side::A).unwrap();
    scenario.lab.a.start_agent().unwrap();
}

#[test]
fn agent_that_cannot_be_reached() {
    if skipped("agent_that_cannot_be_reached", GuestKind::Bare) {
        return;
    }
    let scenario = vm_only();
    scenario.lab.a.start_agent().unwrap();
    refused(&scenario, &MIGRATE, &["10.78.0.2:4790", "is `xferry agent` running there"]);
    // No answer at all, not even a refusal.
    ip(&scenario.lab.b.namespace(), &format!("link set {MANAGEMENT_NIC} down")).unwrap();
    refused(&scenario, &MIGRATE, &["10.78.0.2:4790", "is `xferry agent` running there"]);
}

#[test]
fn peer_of_another_version() {
    if skipped("peer_of_another_version", GuestKind::Bare) {
        return;
    }
    let scenario = insecure_vm_only();
    scenario.lab.a.start_agent().unwrap();
    let peer = FakePeer::of_version(&scenario.lab, Side::B, 99).unwrap();
    refused(&scenario, &MIGRATE, &["version 99", "same version of xferry on both hosts"]);
    assert_eq!(peer.calls(), 1);
    drop(peer);
    let words: [&[u8]; 3] =
        [b"HTTP/1.1 400 Bad Request\r\n\r\n", &[0, 0, 0, 3, 1, b'{', b'}'], &[0, 0, 0, 2, 9, 9]];
    for words in words {
        let peer = FakePeer::saying(&scenario.lab, Side::B, words.to_vec()).unwrap();
        refused(&scenario, &MIGRATE, &["not understood", "different versions of xferry?"]);
        assert_eq!(peer.calls(), 1);
    }
}

/// The same from the other end: the destination's agent says why, hangs up, and goes on.
#[test]
fn caller_of_another_version() {
    if skipped("caller_of_another_version", GuestKind::Bare) {
        return;
    }
    let scenario = insecure_vm_only();
    scenario.start_agents().unwrap();
    let answer = greet(&scenario.lab, Side::B, &hello(99)).unwrap();
    says(&answer, &["host-b", "abort", "version 99", "same version of xferry on both hosts"]);
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0, 0, 0, 2, 1, b'x'], &[0, 0]] {
        let answer = greet(&scenario.lab, Side::B, garbage).unwrap();
        assert!(!answer.contains("hello"), "{answer}");
    }
    scenario.expect_migrates(Side::A, &["--verify"]).unwrap();
}

#[test]
fn nic_with_an_xdp_program() {
    if skipped("nic_with_an_xdp_program", GuestKind::Bare) {
        return;
    }
    let scenario = vm_only();
    let program = || {
        let text = ip(&scenario.lab.a.namespace(), &format!("-j -d link show dev {MIGRATION_NIC}")).unwrap();
        let link: serde_json::Value = serde_json::from_str(&text).unwrap();
        link[0]["xdp"]["prog"]["id"].as_u64()
    };
    let mut loader = scenario.lab.a.xferry_started(&["load", MIGRATION_NIC]).unwrap();
    let theirs = wait_for("the program", LIMIT, || loader.expect_running().map(|()| program())).unwrap();
    agent_refuses(
        &scenario,
        &["mig0 already has an XDP program", "ip link set mig0 xdp off", "NIC of its own"],
    );
    assert_eq!(program(), Some(theirs));
    loader.expect_running().unwrap();
    scenario.expect_running(Side::A).unwrap();
    // It detaches when its process dies.
    loader.kill();
    wait_for("the NIC to be free", LIMIT, || Ok(program().is_none().then_some(()))).unwrap();
    scenario.lab.a.start_agent().unwrap();
    assert!(program().is_some());
    scenario.lab.a.kill_agent();
    wait_for("the NIC to be free", LIMIT, || Ok(program().is_none().then_some(()))).unwrap();
}

#[test]
fn second_agent_on_a_socket() {
    if skipped("second_agent_on_a_socket", GuestKind::Bare) {
        return;
    }
    let scenario = sound();
    let config = scenario.lab.a.dir().join("second.toml");
    let text = scenario.lab.a.agent_config().unwrap();
    // All its own but the socket.
    let text = text.replace("10.78.0.1:4790", "10.78.0.1:4890").replace(MIGRATION_NIC, MANAGEMENT_NIC);
    fs::write(&config, text).unwrap();
    let second = ["agent", "--config", config.to_str().unwrap()];
    let socket = scenario.lab.a.api_socket().display().to_string();
    fails(&scenario.lab.a.xferry(&second, LIMIT).unwrap(), &["another agent", &socket]);
    // The first one has noticed nothing.
    scenario.expect_migrates(Side::A, &["--verify"]).unwrap();
}

#[test]
fn vm_that_is_on_its_way() {
    if skipped("vm_that_is_on_its_way", GuestKind::Bare) {
        return;
    }
    let scenario = sound();
    let mut first = scenario.begin(Side::A, &["--bandwidth", "40", "--verify"]).unwrap();
    fails(
        &scenario.lab.a.xferry(&MIGRATE, LIMIT).unwrap(),
        &["demo", "already being migrated", "xferry cancel"],
    );
    assert!(first.wait(LIMIT).unwrap().success(), "{}", first.output());
    scenario.expect_moved(Side::A).unwrap();
}

#[test]
fn guest_that_does_not_converge() {
    if skipped("guest_that_does_not_converge", GuestKind::Bare) {
        return;
    }
    let vm = bare(Workload { mib: 4, rate: 100_000 }).unwrap();
    let scenario = Scenario::started(LabConfig::for_test(), vm).unwrap();
    let options = ["--bandwidth", "60", "--downtime-limit", "5"];
    refused(&scenario, &[&MIGRATE[..], &options].concat(), &["does not converge", "--downtime-limit"]);
    let timeout = ["--bandwidth", "2", "--timeout", "1"];
    refused(&scenario, &[&MIGRATE[..], &timeout].concat(), &["not finished within 1 s"]);
    scenario.expect_undisturbed(Side::A).unwrap();
}

#[test]
fn check_changes_nothing() {
    if skipped("check_changes_nothing", GuestKind::Bare) {
        return;
    }
    let scenario = sound();
    let output = scenario.lab.a.xferry(&["check", "demo", "--to", "host-b"], LIMIT).unwrap();
    assert!(output.status.success(), "{output:?}");
    says(&output.stdout, &["demo can go from host-a to host-b", "MTU 9000", "256 MiB", "live"]);
    scenario.expect_undisturbed(Side::A).unwrap();
    scenario.expect_migrates(Side::A, &["--verify"]).unwrap();
}
