//! What the link carries with TCP: iperf3, one and two streams, and zero-copy.

use std::{
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::bench::figures::MIB;
use crate::bench::results::Rate;
use crate::lab::{Lab, Side};

/// Length of each measurement, s.
const SECONDS: &str = "3";

/// Why there is no comparison with TCP; `None` if there is.
pub(in crate::bench) fn missing() -> Option<&'static str> {
    let found = Command::new("iperf3").arg("--version").output().is_ok();
    (!found).then_some("there is no program `iperf3`: install the package iperf3")
}

/// Payload by each of the ways.
pub(in crate::bench) fn measure(lab: &Lab) -> Result<Vec<Rate>> {
    let ways: [(&str, &[&str]); 3] =
        [("iperf3, 1 stream", &[]), ("iperf3, 2 streams", &["-P", "2"]), ("iperf3, zero-copy", &["-Z"])];
    let rates = ways.into_iter().map(|(name, options)| {
        let rate = run(lab, options).with_context(|| name.to_owned())?;
        Ok(Rate::new(name, rate))
    });
    rates.collect()
}

fn inside(namespace: &str) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", namespace, "setpriv", "--pdeathsig", "KILL", "iperf3"]);
    command
}

/// MiB/s that arrive.
fn run(lab: &Lab, options: &[&str]) -> Result<f64> {
    let mut server = serve(lab)?;
    // It says nothing when it listens; the client tries again until it does, or its server's turn is over.
    let mut rate = None;
    for _ in 0..50 {
        let output = inside(&lab.a.namespace())
            .args(["-c", &Side::B.migration_ip().to_string(), "-t", SECONDS, "-J"])
            .args(options)
            .output()?;
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        rate = answer["end"]["sum_received"]["bits_per_second"].as_f64().filter(|_| output.status.success());
        if rate.is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
        if server.try_wait()?.is_some() {
            server = serve(lab)?;
        }
    }
    // It ends after one client; if there was none, it must not stay.
    let _ = server.kill();
    server.wait()?;
    Ok(rate.context("iperf3 tells no rate")? / 8.0 / MIB)
}

fn serve(lab: &Lab) -> Result<Child> {
    let server = inside(&lab.b.namespace()).args(["-s", "-1"]).stdout(Stdio::null()).spawn();
    server.context("cannot start iperf3")
}
