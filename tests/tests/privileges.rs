//! What the agent may do, and who may talk to it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use xferry_lab::guest::GuestKind;
use xferry_lab::lab::{Disk, Host, LabConfig, Output, Side, VmConfig, wait_for};
use xferry_lab::scenario::{Scenario, Workload, bare, skipped, status};

/// The unit that hosts run the agent by.
const UNIT: &str = include_str!("../../packaging/systemd/xferry.service");
const LIMIT: Duration = Duration::from_secs(60);
/// A user and a group that nobody is.
const NOBODYS: u32 = 47_900;

fn said(output: &Output) -> String {
    format!("{}{}", output.stdout, output.stderr)
}

fn has(text: &str, words: &[&str]) {
    assert!(words.iter().all(|word| text.contains(word)), "{words:?} in {text}");
}

/// The capabilities that the unit leaves the agent, as `net_admin`.
fn of_the_unit() -> Vec<String> {
    let line = UNIT.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).unwrap();
    line.split_whitespace().map(|name| name.strip_prefix("CAP_").unwrap().to_lowercase()).collect()
}

/// A command that starts a program as root with these capabilities and no way to get others.
fn confined(capabilities: &[String]) -> Vec<String> {
    assert!(UNIT.contains("NoNewPrivileges=yes") && UNIT.contains("LimitMEMLOCK=infinity"));
    let mut set: String = capabilities.iter().map(|name| format!(",+{name}")).collect();
    let mut command: Vec<String> = Vec::new();
    // The unit's LimitMEMLOCK, where this machine allows to set it; else what overrides the limit.
    let unlimited = ["prlimit", "--memlock=unlimited:unlimited"];
    let raised = Command::new(unlimited[0]).args([unlimited[1], "true"]).stderr(Stdio::null()).status();
    if raised.unwrap().success() {
        command.extend(unlimited.map(str::to_owned));
    } else {
        set += ",+ipc_lock";
    }
    let set = format!("--bounding-set=-all{set}");
    command.extend(["setpriv", "--no-new-privs", "--inh-caps=-all", &set, "--"].map(str::to_owned));
    command
}

fn with_disk() -> VmConfig {
    VmConfig { disk: Some(Disk::Cached), ..bare(Workload::USUAL).unwrap() }
}

/// The effective capabilities of a process.
fn effective(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let mask = text.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(mask.trim(), 16).unwrap()
}

#[test]
fn the_units_capabilities_are_enough() {
    if skipped("the_units_capabilities_are_enough", GuestKind::Bare) {
        return;
    }
    let capabilities = of_the_unit();
    let scenario = Scenario::new(LabConfig::for_test(), with_disk()).unwrap();
    let (a, b) = (&scenario.lab.a, &scenario.lab.b);
    for host in [a, b] {
        host.launch_agent_by(confined(&capabilities));
    }
    scenario.start_agents().unwrap();
    let held = effective(a.agent_pid().unwrap());
    let expected =
        capabilities.len() + usize::from(confined(&[]).iter().any(|word| word.contains("ipc_lock")));
    assert_eq!(held.count_ones() as usize, expected, "{held:x}");
    scenario.boot().unwrap();
    // The VM that the lab started has all capabilities; the one that the agent starts has the agent's.
    scenario.expect_migrates(Side::A, &["--verify"]).unwrap();
    let [qemu] = b.qemu_pids().unwrap()[..] else { panic!("one QEMU") };
    assert_eq!(effective(u32::try_from(qemu).unwrap()), held);
    // And nobody else reads its memory.
    assert_eq!(fs::metadata(b.vm_paths().ram).unwrap().mode() & 0o077, 0);
    scenario.expect_migrates(Side::B, &["--verify"]).unwrap();
    // Whoever else has the disk open is seen, though it is another user's process.
    let disk = scenario.lab.layout().disk().display().to_string();
    let script = format!("exec 3>>{disk}; exec setpriv --reuid {NOBODYS} --clear-groups sleep 600");
    let mut writer = Command::new("sh").args(["-c", &script]).spawn().unwrap();
    let check = wait_for("the writer to be seen", LIMIT, || {
        let check = a.xferry(&["check", "demo", "--to", "host-b"], LIMIT)?;
        Ok(check.stdout.contains("✗ disks").then_some(check))
    });
    writer.kill().unwrap();
    writer.wait().unwrap();
    has(&check.unwrap().stdout, &["sleep"]);
}

/// A lack is a sentence at the start, not an EPERM in the middle of a migration.
#[test]
fn a_missing_capability_is_named() {
    if skipped("a_missing_capability_is_named", GuestKind::Bare) {
        return;
    }
    let scenario = Scenario::new(LabConfig::for_test(), bare(Workload::USUAL).unwrap()).unwrap();
    let a = &scenario.lab.a;
    let all = of_the_unit();
    for missing in &all {
        let others: Vec<String> = all.iter().filter(|name| *name != missing).cloned().collect();
        a.launch_agent_by(confined(&others));
        let error = format!("{:#}", a.start_agent().unwrap_err());
        let name = format!("CAP_{}", missing.to_uppercase());
        has(&error, &[&name, "CapabilityBoundingSet"]);
        let said = error.lines().rfind(|line| line.contains("lacks")).unwrap().trim();
        assert!(!error.contains("panicked") && said.matches("CAP_").count() == 1, "{error}");
        println!("without {missing}: {said}");
    }
    a.launch_agent_by(confined(&all));
    a.start_agent().unwrap();
}

/// A copy of the program that anybody may run.
fn for_everybody(scenario: &Scenario) -> PathBuf {
    let copy = scenario.lab.layout().run_dir().join("xferry");
    fs::copy(&scenario.lab.config().xferry, &copy).unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    copy
}

fn asks(host: &Host, user: u32, group: u32) -> Output {
    host.xferry_as(user, group, &["status"], LIMIT).unwrap()
}

#[test]
fn the_api_is_for_its_group() {
    if skipped("the_api_is_for_its_group", GuestKind::Bare) {
        return;
    }
    let mut scenario = Scenario::new(LabConfig::for_test(), bare(Workload::USUAL).unwrap()).unwrap();
    let program = for_everybody(&scenario);
    scenario.lab.a.use_program(&program);
    let a = &scenario.lab.a;
    let config = |group: &str| format!("socket-group = {group}\n{}", a.agent_config().unwrap());
    // Confined too: its group it has from its unit, and no CAP_CHOWN.
    let mut launcher = confined(&of_the_unit());
    let group = NOBODYS.to_string();
    let last = launcher.len() - 1;
    launcher.splice(last..last, ["--groups".to_owned(), group.clone()]);
    a.launch_agent_by(launcher);
    a.start_agent_by(&config(&group)).unwrap();
    let socket = fs::metadata(a.api_socket()).unwrap();
    assert_eq!((socket.mode() & 0o7777, socket.uid(), socket.gid()), (0o660, 0, NOBODYS));
    let member = asks(a, NOBODYS + 1, NOBODYS);
    assert!(member.status.success(), "{}", said(&member));
    has(&member.stdout, &["host-a (xferry"]);
    let other = asks(a, NOBODYS + 1, NOBODYS + 1);
    assert_eq!(other.status.code(), Some(1));
    has(&other.stderr, &["may not use", "usermod -aG 47900 47901", "log in anew", "Permission denied"]);
    assert_eq!(status(a).unwrap()["socket"]["group"], group.as_str(), "root may as ever");
    a.kill_agent();
    // Without that group it cannot give it the socket, and says so.
    a.launch_agent_by(confined(&of_the_unit()));
    has(
        &format!("{:#}", a.start_agent_by(&config(&group)).unwrap_err()),
        &["47900", "SupplementaryGroups", "CAP_CHOWN"],
    );
    has(
        &format!("{:#}", a.start_agent_by(&config("\"no-such-group\"")).unwrap_err()),
        &["no-such-group", "groupadd"],
    );
    if fs::read_to_string("/etc/group").unwrap().lines().any(|line| line.starts_with("xferry:")) {
        println!("the group xferry exists here: not tried without it");
        return;
    }
    a.start_agent().unwrap();
    has(&a.xferry(&["status"], LIMIT).unwrap().stdout, &["only root may use it", "groupadd --system xferry"]);
    let other = asks(a, NOBODYS, NOBODYS);
    has(&other.stderr, &["may not use", "groupadd --system xferry", "usermod -aG xferry 47900"]);
}
