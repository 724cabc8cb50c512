//! A guest that writes faster than the link carries: it stays, or it is throttled and moves, and is always let go.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use xferry_lab::guest::GuestKind;
use xferry_lab::lab::{LabConfig, Side, wait_for};
use xferry_lab::scenario::{Scenario, flat_out, skipped, status, throttled, with_cgroups};

/// How long something may take that takes a moment.
const LIMIT: Duration = Duration::from_secs(30);
/// What the guest writes flat out, MiB.
const SET: u64 = 64;
/// MiB/s: 300 ms carry less than a quarter of what the guest writes, and a round gives it time to write all of it, also on a
/// busy machine, where a guest that is tracked was seen to dirty no more than 20,000 pages/s.
const BANDWIDTH: [&str; 2] = ["--bandwidth", "40"];

/// Both hosts able to throttle, and the VM on host-a. `None` says why not.
fn scenario(test: &str) -> Option<Scenario> {
    if skipped(test, GuestKind::Bare) {
        return None;
    }
    let Some(launcher) = with_cgroups() else {
        println!("skipped: {test}: no cgroup here can limit CPU time");
        return None;
    };
    let scenario = Scenario::new(LabConfig::for_test(), flat_out(SET).unwrap()).unwrap();
    for side in Side::BOTH {
        scenario.lab.host(side).launch_agent_by(launcher.clone());
    }
    scenario.start_agents().unwrap();
    scenario.boot().unwrap();
    Some(scenario)
}

fn is_throttled(scenario: &Scenario, side: Side) -> bool {
    let pids = scenario.lab.host(side).qemu_pids().unwrap();
    pids.iter().any(|&pid| !throttled(pid).unwrap().is_empty())
}

fn wait_free(scenario: &Scenario, side: Side) {
    wait_for("the vCPUs to be let go", LIMIT, || Ok((!is_throttled(scenario, side)).then_some(()))).unwrap();
}

/// What is leaving host-a.
fn leaving(scenario: &Scenario) -> Value {
    status(&scenario.lab.a).unwrap()["leaving"][0].clone()
}

fn wait_throttled(scenario: &Scenario) {
    let mut seen = Value::Null;
    let throttled = wait_for("a throttle", LIMIT, || {
        seen = leaving(scenario);
        Ok((seen["cpu-throttle-percentage"].as_u64() >= Some(20)).then_some(()))
    });
    throttled.unwrap_or_else(|error| panic!("{error:#}: {seen:#}"));
    assert!(is_throttled(scenario, Side::A));
}

/// An earlier life's migration must have its end before the VM can be migrated again.
fn wait_settled(scenario: &Scenario) {
    for side in Side::BOTH {
        wait_for("nothing unsettled and nothing arriving", LIMIT, || {
            let status = status(scenario.lab.host(side))?;
            let free = |list: &Value| list.as_array().is_some_and(Vec::is_empty);
            Ok((free(&status["unsettled"]) && free(&status["arriving"])).then_some(()))
        })
        .unwrap();
    }
    scenario.lab.b.wait_vm_gone(LIMIT).unwrap();
}

/// The process that lifts a throttle when its agent dies.
fn guard_of(agent: u32) -> Option<Pid> {
    let children = std::fs::read_dir(format!("/proc/{agent}/task")).ok()?.flatten();
    let children: Vec<String> =
        children.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok()).collect();
    let guard = children.iter().flat_map(|line| line.split_whitespace()).find(|pid| {
        let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        command.split('\0').any(|word| word == "__lift-throttle")
    })?;
    Pid::from_raw(guard.parse().ok()?)
}

#[test]
fn flat_out_guest_moves_only_under_a_throttle() {
    let Some(scenario) = scenario("flat_out_guest_moves_only_under_a_throttle") else { return };
    let mut options = BANDWIDTH.to_vec();
    options.extend(["--timeout", "7"]);
    let output = scenario.migrate(Side::A, &options).unwrap();
    assert!(!output.status.success(), "{}", output.stdout);
    let report = scenario.lab.a.report(None).unwrap();
    assert!(report.text("/error-desc").is_some_and(|text| text.contains("--timeout")), "{:#}", report.0);
    assert!(report.get("/throttle").unwrap().is_null());
    scenario.expect_running(Side::A).unwrap();

    options[3] = "60";
    options.extend(["--auto-converge", "--verify=hash"]);
    let report = scenario.expect_migrates(Side::A, &options).unwrap();
    let ms = |pointer: &str| report.milliseconds(pointer).unwrap();
    println!(
        "{} rounds, {:.0} ms, blackout {:.1} ms, {:.1} predicted, by {}",
        report.rounds().len(),
        ms("/total-time"),
        ms("/downtime"),
        ms("/expected-downtime"),
        report.text("/throttle").unwrap()
    );
    assert!(ms("/expected-downtime") <= 300.0, "{:#}", report.0);
    assert!((ms("/downtime") - ms("/expected-downtime") - ms("/prediction-error")).abs() < 0.1);
    let rounds = report.get("/rounds").unwrap().as_array().unwrap();
    let throttles: Vec<u64> =
        rounds.iter().filter_map(|round| round["cpu-throttle-percentage"].as_u64()).collect();
    assert!(throttles.is_sorted() && throttles.contains(&20) && *throttles.last().unwrap() <= 99);
    let before_stop = &rounds[throttles.len() - 1];
    assert!(before_stop["downtime-at-most"].as_f64().unwrap() <= 300.0, "{before_stop:#}");
    for field in ["bandwidth", "dirty-pages-rate", "bandwidth-confidence", "dirty-rate-confidence"] {
        assert!(before_stop[field].as_f64().is_some_and(|figure| figure > 0.0), "{field}: {before_stop:#}");
    }
    assert!(!is_throttled(&scenario, Side::B));
}

#[test]
fn throttle_is_lifted_whatever_ends_the_migration() {
    let Some(scenario) = scenario("throttle_is_lifted_whatever_ends_the_migration") else { return };
    let a = &scenario.lab.a;
    // Less than a handover takes, and more than a word takes to the other host and back.
    let options = [BANDWIDTH.as_slice(), &["--auto-converge", "--downtime-limit", "5"]].concat();
    drop(scenario.begin(Side::A, &options).unwrap());
    wait_throttled(&scenario);
    let output = a.xferry(&["cancel"], LIMIT).unwrap();
    assert!(output.status.success(), "{}", output.stderr);
    scenario.wait_ended(Side::A).unwrap();
    assert!(!is_throttled(&scenario, Side::A));
    scenario.expect_running(Side::A).unwrap();

    // Nobody is left but the guard process.
    drop(scenario.begin(Side::A, &options).unwrap());
    wait_throttled(&scenario);
    a.signal_agent(Signal::KILL).unwrap();
    wait_free(&scenario, Side::A);
    a.kill_agent();
    a.start_agent().unwrap();
    scenario.expect_running(Side::A).unwrap();
    wait_settled(&scenario);

    // Nor that: it is left to the agent's next life.
    drop(scenario.begin(Side::A, &options).unwrap());
    wait_throttled(&scenario);
    let guard = guard_of(a.agent_pid().unwrap()).unwrap();
    for signal in [Signal::STOP, Signal::KILL] {
        // It must not have its moment between the two deaths.
        if signal == Signal::KILL {
            a.signal_agent(signal).unwrap();
        }
        kill_process(guard, signal).unwrap();
    }
    a.kill_agent();
    assert!(is_throttled(&scenario, Side::A), "nobody is left to lift it");
    a.start_agent().unwrap();
    wait_free(&scenario, Side::A);
    scenario.expect_undisturbed(Side::A).unwrap();
}
