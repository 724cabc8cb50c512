//! AF_XDP at one end, UDP sockets at the other, or at both: the frames are the same.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use xferry_lab::guest::GuestKind;
use xferry_lab::lab::plan::MIGRATION_NIC;
use xferry_lab::lab::{Encryption, Host, Lab, LabConfig, Report, Side, wait_for};
use xferry_lab::scenario::{Scenario, Workload, bare, ip, skipped, status};
use xferry_lab::wire::{Faults, WireConfig};

/// Every page is compared before the VM runs at the other end.
const OPTIONS: [&str; 3] = ["--verify=full", "--downtime-limit", "2000"];
const WORKLOAD: Workload = Workload { mib: 32, rate: 2000 };
const LIMIT: Duration = Duration::from_secs(20);

fn scenario(lab: LabConfig) -> Scenario {
    Scenario::started(lab, bare(WORKLOAD).unwrap()).unwrap()
}

/// The VM goes there and back with equal digests, and all frames of it are let in and find room.
fn there_and_back(lab: LabConfig) -> [Report; 2] {
    let (transport, mtu) = (lab.transport, lab.mtu);
    let scenario = scenario(lab);
    Side::BOTH.map(|source| {
        let report = scenario.expect_migrates(source, &OPTIONS).unwrap();
        let (from, to) = match source {
            Side::A => (transport[0], transport[1]),
            Side::B => (transport[1], transport[0]),
        };
        told(&report, from, to);
        assert_eq!(report.count("/transport/mtu"), Some(mtu.into()));
        let port = &status(scenario.lab.host(source.other())).unwrap()["port"];
        assert_eq!(port["transport"], to);
        assert_eq!(port["xdp-mode"].as_str(), (to == "af-xdp").then_some("driver"), "{port}");
        let dropped = port["drops"].as_array().unwrap().iter().map(|drop| drop["frames"].as_u64().unwrap());
        assert_eq!((dropped.sum(), port["no-buffer"].as_u64()), (0, Some(0)), "{port}");
        report
    })
}

/// Both ends say what they use.
fn told(report: &Report, from: &str, to: &str) {
    let text = |pointer| report.text(pointer).unwrap_or_default();
    let (mode, xdp) = if from == "udp" { ("udp", "none") } else { ("af-xdp staged", "driver") };
    assert_eq!((text("/transport/mode"), text("/transport/xdp-mode")), (mode, xdp), "{:#}", report.0);
    let receiver = if to == "udp" { "UDP sockets on mig0" } else { "AF_XDP on mig0" };
    assert!(text("/transport/receiver").contains(receiver), "{:#}", report.0);
}

#[test]
fn mixed_at_every_mtu() {
    if skipped("mixed_at_every_mtu", GuestKind::Bare) {
        return;
    }
    for mtu in [1500, 9000, 65535] {
        there_and_back(LabConfig { mtu, transport: ["af-xdp", "udp"], ..LabConfig::for_test() });
    }
}

#[test]
fn udp_at_both_ends() {
    if skipped("udp_at_both_ends", GuestKind::Bare) {
        return;
    }
    for (mtu, queues) in [(1500, 1), (9000, 2), (65535, 1)] {
        let lab = LabConfig { mtu, queues, transport: ["udp"; 2], ..LabConfig::for_test() };
        for report in there_and_back(lab) {
            // Sockets need no queues of their own.
            let processors = std::thread::available_parallelism().unwrap().get() as u64;
            assert_eq!(report.count("/transport/lanes"), Some(processors.min(4.max(queues.into()))));
        }
    }
}

/// AF_XDP leaves the UDP checksum away, which a socket must have asked for.
#[test]
fn ipv6() {
    if skipped("ipv6", GuestKind::Bare) {
        return;
    }
    if !std::path::Path::new("/proc/sys/net/ipv6").exists() {
        println!("skipped: ipv6: this kernel has no IPv6");
        return;
    }
    for (mtu, transport) in
        [(1500, ["af-xdp", "udp"]), (9000, ["af-xdp", "af-xdp"]), (9000, ["af-xdp", "udp"])]
    {
        there_and_back(LabConfig { mtu, transport, ipv6: true, ..LabConfig::for_test() });
    }
}

#[test]
fn bad_wire() {
    if skipped("bad_wire", GuestKind::Bare) {
        return;
    }
    let faults = Faults { loss: 0.01, duplicate: 0.01, reorder: 0.01, ..Faults::default() };
    for transport in [["udp", "udp"], ["af-xdp", "udp"]] {
        let wire = Some(WireConfig::both(faults));
        let scenario = scenario(LabConfig { wire, transport, ..LabConfig::for_test() });
        for source in Side::BOTH {
            let report = scenario.expect_migrates(source, &OPTIONS).unwrap();
            let lanes = report.get("/stream/lanes").unwrap().as_array().unwrap();
            assert!(lanes.iter().any(|lane| lane["lost"].as_u64().unwrap() > 0), "{:#}", report.0);
        }
    }
}

/// Where AF_XDP cannot be had, or has only copy mode, the agent says so everywhere, and works.
#[test]
fn falls_back_with_a_reason() {
    if skipped("falls_back_with_a_reason", GuestKind::Bare) {
        return;
    }
    const REASON: &str = "mig0 already has an XDP program";
    let lab = LabConfig { transport: ["auto"; 2], ..LabConfig::for_test() };
    let scenario = Scenario::new(lab, bare(WORKLOAD).unwrap()).unwrap();
    let (a, b) = (&scenario.lab.a, &scenario.lab.b);
    // Somebody's program, which lets our frames pass.
    let mut loader = b.xferry_started(&["load", MIGRATION_NIC, "--port", "9"]).unwrap();
    wait_for("the program", LIMIT, || {
        loader.expect_running()?;
        Ok(ip(&b.namespace(), &format!("link show dev {MIGRATION_NIC}"))?.contains("xdp").then_some(()))
    })
    .unwrap();
    scenario.start_agents().unwrap();
    scenario.boot().unwrap();
    // A veth pair has no zero-copy, which is reason enough, and nothing to be warned of.
    let only_copies = |port: &Value| {
        port["transport"] == "udp"
            && port["fallback"].is_null()
            && port["choice"].as_str().is_some_and(|why| why.contains("no zero-copy"))
    };
    assert!(only_copies(&port(a)), "{}", port(a));
    let there = port(b);
    assert_eq!((&there["transport"], &there["xdp-mode"]), (&"udp".into(), &Value::Null), "{there}");
    assert!(there["fallback"].as_str().unwrap().contains(REASON), "{there}");
    let text = b.xferry(&["status"], LIMIT).unwrap().stdout;
    assert!(text.contains("UDP sockets") && text.contains(&format!("NO AF_XDP: {REASON}")), "{text}");

    let note = format!("the migration NIC of host-b uses UDP sockets: {REASON}");
    let report = scenario.expect_migrates(Side::A, &OPTIONS).unwrap();
    told(&report, "udp", "udp");
    let notes = report.get("/notes").unwrap().to_string();
    assert!(notes.contains(&note), "{notes}");
    let report = scenario.expect_migrates(Side::B, &OPTIONS).unwrap();
    assert!(
        report.text("/transport/fallback").is_some_and(|reason| reason.contains(REASON)),
        "{:#}",
        report.0
    );
    let text = b.xferry(&["report"], LIMIT).unwrap().stdout;
    assert!(text.contains(&format!("udp ({REASON}")), "{text}");
    let check = a.xferry(&["check", "demo", "--to", "host-b"], LIMIT).unwrap();
    assert!(check.stdout.contains(&note), "{}{}", check.stdout, check.stderr);

    // An agent that is started again finds the NIC free.
    loader.kill();
    b.kill_agent();
    b.start_agent().unwrap();
    assert!(only_copies(&port(b)), "{}", port(b));
    scenario.expect_migrates(Side::A, &OPTIONS).unwrap();
}

/// A lab of two queues whose host-a is told to send directly, and to leave `queues` of them to others.
fn told_to_send_directly(encryption: Encryption, queues: u32) -> Scenario {
    let lab = LabConfig { queues: 2, ..LabConfig::for_test() }.encryption(encryption);
    let scenario = Scenario::new(lab, bare(WORKLOAD).unwrap()).unwrap();
    start_sending_directly(&scenario, queues);
    scenario.lab.b.start_agent().unwrap();
    scenario.boot().unwrap();
    scenario
}

fn start_sending_directly(scenario: &Scenario, queues: u32) {
    let settings = format!("[migration]\nsending = \"direct\"\nqueues = {queues}\n");
    let config = scenario.lab.a.agent_config().unwrap().replace("[migration]\n", &settings);
    scenario.lab.a.start_agent_by(&config).unwrap();
}

/// That pages were copied, and that the report says why.
fn staged_because(report: &Report, reason: &str) {
    assert_eq!(report.text("/transport/mode"), Some("af-xdp staged"), "{:#}", report.0);
    let notes = report.get("/notes").unwrap().to_string();
    assert!(notes.contains("pages are staged and not sent directly") && notes.contains(reason), "{notes}");
}

/// The VM writes all the while, so that pages change under the NIC; every page is compared.
#[test]
fn direct() {
    if skipped("direct", GuestKind::Bare) {
        return;
    }
    let scenario = told_to_send_directly(Encryption::Off, 2);
    let report = scenario.expect_migrates(Side::A, &OPTIONS).unwrap();
    staged_because(&report, "mig0 has no queue to spare");
    // Whoever is not told anything copies where the kernel copies anyway, and need not say so.
    let report = scenario.expect_migrates(Side::B, &OPTIONS).unwrap();
    assert!(!report.get("/notes").unwrap().to_string().contains("staged"), "{:#}", report.0);

    scenario.lab.a.kill_agent();
    start_sending_directly(&scenario, 1);
    let report = scenario.expect_migrates(Side::A, &OPTIONS).unwrap();
    assert_eq!(report.text("/transport/mode"), Some("af-xdp direct"), "{:#}", report.0);
    assert_eq!(report.count("/transport/lanes"), Some(1));
    let ms = |pointer| report.get(pointer).and_then(Value::as_f64).unwrap();
    assert!(0.0 < ms("/pinning") && ms("/pinning") < ms("/setup-time"), "{:#}", report.0);
}

#[test]
fn encrypted_pages_are_staged() {
    if skipped("encrypted_pages_are_staged", GuestKind::Bare) {
        return;
    }
    let scenario = told_to_send_directly(Encryption::Required, 1);
    let report = scenario.expect_migrates(Side::A, &OPTIONS).unwrap();
    staged_because(&report, "pages are encrypted");
}

fn port(host: &Host) -> Value {
    status(host).unwrap()["port"].clone()
}

/// The agent gives the NIC the channels that are configured, and back those that it had; what cannot be is refused. Its threads
/// that move pages run where they should.
#[test]
fn channels_and_processors() {
    if skipped("channels_and_processors", GuestKind::Bare) {
        return;
    }
    let lab = Lab::new(LabConfig { queues: 2, transport: ["udp"; 2], ..LabConfig::for_test() }).unwrap();
    let host = &lab.a;
    let saying = |settings: &str| {
        let config = host.agent_config().unwrap();
        host.start_agent_by(&config.replace("[migration]\n", &format!("[migration]\n{settings}\n")))
    };
    let error = format!("{:#}", saying("channels = 3").unwrap_err());
    assert!(error.contains("mig0 cannot have 3: it has 2 receive and send channels at most"), "{error}");
    let error = format!("{:#}", saying("cpus = \"0,1020-1021\"").unwrap_err());
    assert!(error.contains("[migration] cpus: there is no processor 1020-1021"), "{error}");
    assert_eq!(channels(host), 2, "nothing changed");
    saying("channels = 1\ncpus = \"0\"").unwrap();
    assert_eq!(channels(host), 1);
    assert_eq!(status(host).unwrap()["port"]["cpus"], "0");
    assert_eq!(processors(host.agent_pid().unwrap(), "receive-0").as_deref(), Some("0"));
    host.signal_agent(Signal::TERM).unwrap();
    wait_for("the channels that were there", LIMIT, || Ok((channels(host) == 2).then_some(()))).unwrap();
}

/// Receive queues of a host's migration NIC. `ip netns exec` mounts the namespace's own `/sys`.
fn channels(host: &Host) -> usize {
    let queues = format!("/sys/class/net/{MIGRATION_NIC}/queues");
    let listed =
        Command::new("ip").args(["netns", "exec", &host.namespace(), "ls", &queues]).output().unwrap();
    String::from_utf8(listed.stdout).unwrap().lines().filter(|name| name.starts_with("rx-")).count()
}

/// Processors on which the thread of that name may run.
fn processors(process: u32, name: &str) -> Option<String> {
    let statuses = fs::read_dir(format!("/proc/{process}/task")).unwrap().map(|thread| {
        let status = thread.unwrap().path().join("status");
        fs::read_to_string(status).unwrap_or_default()
    });
    let field = |status: &str, field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field))?;
        Some(line.trim().to_owned())
    };
    statuses
        .filter(|status| field(status, "Name:").as_deref() == Some(name))
        .find_map(|status| field(&status, "Cpus_allowed_list:"))
}
