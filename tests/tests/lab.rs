//! The lab itself: that it is cabled as its plan says, and that nothing is left of it, however its
//! process ends.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use xferry_lab::guest::{Fill, GuestImage, GuestKind, GuestParams, Rate, SerialLog};
use xferry_lab::lab::plan::{self, Side};
use xferry_lab::lab::{self, Accel, Lab, LabConfig, Layout, VmConfig, netns};
use xferry_lab::probe::{PingProbe, RarpCapture, VmWatch, fdb_port, owner_count, send_rarp};

/// Set for [`hold_a_lab`]: the prefix of the lab to hold.
const HOLD: &str = "XFERRY_LAB_TEST_HOLD";

/// Says why a test cannot run, if so.
fn skipped() -> bool {
    let reason = lab::missing();
    if let Some(reason) = &reason {
        eprintln!("skipped: {reason}");
    }
    reason.is_some()
}

fn layout_of(config: &LabConfig) -> Layout {
    Layout::new(&config.prefix, &config.cache_dir)
}

/// What is left of a lab.
fn remains(layout: &Layout) -> Vec<String> {
    let namespaces = layout.namespaces().into_iter().filter(|name| netns::exists(name));
    let paths = [layout.run_dir(), layout.ram_dir(), layout.state_file(), layout.disk().to_owned()];
    let paths = paths.into_iter().filter(|path| path.exists()).map(|path| path.display().to_string());
    namespaces.chain(paths).collect()
}

fn assert_gone(layout: &Layout) {
    assert_eq!(remains(layout), Vec::<String>::new());
}

fn link_facts(namespace: &str, nic: &str) -> serde_json::Value {
    let output =
        Command::new("ip").args(["-n", namespace, "-d", "-j", "link", "show", "dev", nic]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()[0].clone()
}

#[test]
fn cabled_as_planned() {
    if skipped() {
        return;
    }
    for (mtu, queues) in [(1500, 1), (9000, 2), (65535, 1)] {
        let lab = Lab::new(LabConfig { mtu, queues, ..LabConfig::for_test() }).unwrap();
        for side in Side::BOTH {
            let link = link_facts(&lab.host(side).namespace(), plan::MIGRATION_NIC);
            assert_eq!(link["mtu"], mtu);
            assert_eq!(link["num_rx_queues"], queues);
            assert_eq!(link["num_tx_queues"], queues);
        }
        assert_gone(&{
            let layout = lab.layout().clone();
            drop(lab);
            layout
        });
    }
}

#[test]
fn hosts_reach_each_other_on_both_networks() {
    if skipped() {
        return;
    }
    let lab = Lab::new(LabConfig::for_test()).unwrap();
    for target in [Side::B.migration_ip(), Side::B.management_ip()] {
        let probe = PingProbe::start(&lab.a.namespace(), target).unwrap();
        probe.wait_answered(Duration::from_secs(2)).unwrap();
        let begin = probe.mark();
        thread::sleep(Duration::from_millis(300));
        let figures = probe.figures(begin, probe.mark());
        assert_eq!(figures.lost, 0, "{figures:?}");
        assert!((30..=61).contains(&figures.sent), "{figures:?}");
    }
}

#[test]
fn rarp_teaches_the_switch_and_reaches_the_client() {
    if skipped() {
        return;
    }
    let lab = Lab::new(LabConfig::for_test()).unwrap();
    let switch = lab.layout().switch();
    let port = || fdb_port(&switch, plan::SWITCH_BRIDGE, plan::VM_MAC).unwrap();
    let capture = RarpCapture::start(&lab.layout().client(), plan::VM_MAC_BYTES).unwrap();
    let start = SystemTime::now();
    assert_eq!(port(), None);
    for side in Side::BOTH {
        send_rarp(&lab.host(side).namespace(), plan::UPLINK, plan::VM_MAC_BYTES).unwrap();
        lab::wait_for("the switch to learn", Duration::from_secs(1), || {
            Ok((port().as_deref() == Some(side.switch_port())).then_some(()))
        })
        .unwrap();
    }
    capture.wait_quiet(Duration::from_millis(100), Duration::from_secs(2)).unwrap();
    assert_eq!(capture.since(start).len(), 2);
}

#[test]
fn names_in_use_are_refused_and_left_alone() {
    if skipped() {
        return;
    }
    let config = LabConfig::for_test();
    let first = Lab::new(config.clone()).unwrap();
    let error = Lab::new(config.clone()).err().unwrap().to_string();
    assert!(error.contains("host-a is in use by process"), "{error}");
    assert!(netns::exists(&first.a.namespace()));
    assert!(lab::clean(&config.prefix).unwrap_err().to_string().contains("in use"));
    drop(first);
    assert_gone(&layout_of(&config));
}

#[test]
fn a_strangers_namespace_is_refused_and_left_alone() {
    if skipped() {
        return;
    }
    let config = LabConfig::for_test();
    let switch = layout_of(&config).switch();
    let netns =
        |verb: &str| assert!(Command::new("ip").args(["netns", verb, &switch]).status().unwrap().success());
    netns("add");
    let error = Lab::new(config.clone()).err().unwrap().to_string();
    let left = netns::exists(&switch);
    netns("delete");
    assert!(left && error.contains(&switch) && error.contains("ip netns delete"), "{error}");
    assert_gone(&layout_of(&config));
}

#[test]
fn panic_removes_the_lab() {
    if skipped() {
        return;
    }
    let config = LabConfig::for_test();
    let layout = layout_of(&config);
    let result = panic::catch_unwind(AssertUnwindSafe(|| {
        let _lab = Lab::new(config).unwrap();
        panic!("as a failing test does");
    }));
    assert!(result.is_err());
    assert_gone(&layout);
}

#[test]
fn processes_in_the_lab_end_with_it() {
    if skipped() {
        return;
    }
    let lab = Lab::new(LabConfig::for_test()).unwrap();
    let namespace = lab.b.namespace();
    // As a VM that an agent started: not our child's child, in a session of its own.
    let script = "setsid sleep 1000 >/dev/null 2>&1 &";
    assert!(
        Command::new("ip")
            .args(["netns", "exec", &namespace, "sh", "-c", script])
            .status()
            .unwrap()
            .success()
    );
    let pids = lab::wait_for("sleep", Duration::from_secs(2), || {
        let pids = netns::pids(&namespace)?;
        let asleep =
            |pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "sleep\n");
        Ok(pids.iter().any(asleep).then_some(pids))
    })
    .unwrap();
    drop(lab);
    // A zombie that nobody waited for yet has no program any more.
    assert!(pids.iter().all(|pid| fs::read_link(format!("/proc/{pid}/exe")).is_err()));
}

#[test]
fn kept_lab_stays_until_cleaned() {
    if skipped() {
        return;
    }
    let config = LabConfig { keep: true, ..LabConfig::for_test() };
    let layout = layout_of(&config);
    drop(Lab::new(config.clone()).unwrap());
    assert!(remains(&layout).len() >= 6, "{:?}", remains(&layout));
    let error = Lab::new(config.clone()).err().unwrap().to_string();
    assert!(error.contains("--clean"), "{error}");
    assert!(lab::clean(&config.prefix).unwrap().contains(&layout.namespace(Side::A)));
    assert_gone(&layout);
}

#[test]
fn vm_that_does_not_start_says_why() {
    if skipped() {
        return;
    }
    let lab = Lab::new(LabConfig::for_test()).unwrap();
    let config = VmConfig {
        accel: Accel::Tcg,
        memory_mib: 64,
        kernel: "/nonexistent/kernel".into(),
        initrd: None,
        append: String::new(),
        disk: None,
        extra: Vec::new(),
    };
    let error = format!("{:#}", lab.a.start_vm(&config).unwrap_err());
    assert!(error.contains("QEMU on host-a ended early"), "{error}");
    assert_eq!(lab.a.qemu_pids().unwrap(), Vec::<i32>::new());
}

#[test]
fn vm_is_seen_to_run_stop_and_go() {
    if skipped() {
        return;
    }
    if !Path::new("/dev/kvm").exists() {
        eprintln!("skipped: the bare-metal guest needs /dev/kvm");
        return;
    }
    let image = GuestImage::prepare(GuestKind::Bare, &lab::cache_dir()).unwrap();
    let params =
        GuestParams { mib: 8, rate: Rate::PerSecond(1000), fill: Fill::Random, ip: None, disk_read: false };
    let config = VmConfig {
        accel: Accel::Kvm,
        memory_mib: 64,
        kernel: image.kernel.clone(),
        initrd: image.initrd.clone(),
        append: image.cmdline(&params),
        disk: None,
        extra: Vec::new(),
    };
    let lab = Lab::new(LabConfig::for_test()).unwrap();
    let watches = Side::BOTH.map(|side| VmWatch::start(lab.host(side).vm_paths().lab_qmp).unwrap());
    assert_eq!(owner_count(&watches).unwrap(), 0);

    let start = SystemTime::now();
    lab.a.start_vm(&config).unwrap();
    let mut serial = SerialLog::new(lab.a.vm_paths().serial);
    serial.wait_ready(Duration::from_secs(30)).unwrap();
    assert_eq!(serial.wait_progress(Duration::from_secs(10)).unwrap().errors, 0);
    assert_eq!(owner_count(&watches).unwrap(), 1);
    assert_eq!(lab.a.qemu_pids().unwrap().len(), 1);
    assert!(lab.a.start_vm(&config).unwrap_err().to_string().contains("already"));
    let names: Vec<String> = watches[0].events_since(start).into_iter().map(|event| event.name).collect();
    assert!(names.iter().all(|name| name == "RESUME"), "{names:?}");

    lab.a.kill_vm().unwrap();
    assert_eq!(owner_count(&watches).unwrap(), 0);
    assert_eq!(lab.a.qemu_pids().unwrap(), Vec::<i32>::new());
}

#[test]
fn agent_without_a_program_says_what_to_do() {
    if skipped() {
        return;
    }
    let lab = Lab::new(LabConfig { xferry: "/nonexistent/xferry".into(), ..LabConfig::for_test() }).unwrap();
    let error = lab.b.start_agent().unwrap_err().to_string();
    assert!(error.contains("/nonexistent/xferry") && error.contains("cargo xtask build"), "{error}");
}

#[test]
fn signal_removes_the_lab() {
    if skipped() {
        return;
    }
    for signal in ["INT", "TERM", "HUP"] {
        let config = LabConfig::for_test();
        let mut holder = Holder::start(&config);
        holder.signal(signal);
        let status = holder.wait();
        assert!(status.code().is_some_and(|code| code > 128), "{signal}: {status:?}");
        assert_gone(&layout_of(&config));
    }
}

#[test]
fn killed_process_is_cleaned_up_after_by_the_next_lab() {
    if skipped() {
        return;
    }
    let config = LabConfig::for_test();
    let mut holder = Holder::start(&config);
    holder.signal("KILL");
    assert_eq!(holder.wait().signal(), Some(9));
    assert!(!remains(&layout_of(&config)).is_empty());
    // Any lab, not only one of the same name.
    let next = Lab::new(LabConfig::for_test()).unwrap();
    assert_gone(&layout_of(&config));
    drop(next);
}

/// Not a test of its own: what [`Holder`] runs.
#[test]
fn hold_a_lab() {
    let Ok(prefix) = std::env::var(HOLD) else { return };
    let _lab = Lab::new(LabConfig { prefix, ..LabConfig::default() }).unwrap();
    println!("up");
    thread::sleep(Duration::from_secs(60));
}

/// Another process that has a lab up.
struct Holder(Child);

impl Holder {
    fn start(config: &LabConfig) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "hold_a_lab", "--nocapture"])
            .env(HOLD, &config.prefix)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut holder = Self(child);
        let mut output = BufReader::new(holder.0.stdout.as_mut().unwrap());
        let mut line = String::new();
        while line.trim() != "up" && !line.ends_with("up\n") {
            line.clear();
            assert_ne!(output.read_line(&mut line).unwrap(), 0, "no lab came up");
        }
        holder
    }

    fn signal(&self, name: &str) {
        let pid = self.0.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    fn wait(&mut self) -> std::process::ExitStatus {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the process with the lab does not end");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = self.0.stdout.take().map(|mut output| output.read_to_end(&mut Vec::new()));
    }
}
