//! The program `wire`: what the relay carries, and what a migration through it loses by losses; or what it loses to a flood.
//! Ratios within one run count: everything shares the machine's processors.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;

use super::config::WireConfig;
use super::line::Frame;
use super::nic::PacketNic;
use crate::bench::median;
use crate::guest::{Fill, GuestImage, GuestKind, GuestParams, Rate};
use crate::intruder::bench as flood;
use crate::lab::plan::{MIGRATION_NIC, Side};
use crate::lab::{self, Accel, Lab, LabConfig, Report, VmConfig};
use crate::scenario::Scenario;

pub(crate) const MIB: f64 = 1024.0 * 1024.0;
/// Length of the measurement of the bare relay.
const RELAY_TIME: Duration = Duration::from_secs(2);
/// Frames sent and not yet seen at the other end: what a veth queue holds, with room to spare.
const RELAY_WINDOW: u64 = 128;
/// Silence after which frames are taken for lost.
const RELAY_STALL: Duration = Duration::from_millis(20);
/// EtherType for experiments (IEEE 802).
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// Measures the lab's relay, and migrations through it by loss; or migrations beside a flood of strangers.
#[derive(Debug, Parser)]
pub struct Args {
    /// What the wire does, once more for each wire; the first is what the others are compared with
    #[arg(long, value_name = "FAULTS", default_values = ["loss=0", "loss=0.1%", "loss=1%", "loss=5%"])]
    wire: Vec<String>,
    /// Instead: a switch, and a third host that floods the destination's data port with frames of 64 bytes
    #[arg(long, conflicts_with = "wire")]
    flood: bool,
    /// Frames a second of the flood, once more for each flood
    #[arg(long, value_name = "FRAMES", default_values_t = [50_000, 200_000, 500_000])]
    pace: Vec<u64>,
    /// Migrations on each wire, or beside each flood; medians are shown
    #[arg(long, default_value_t = 4)]
    runs: u32,
    /// RAM of the guest in MiB
    #[arg(long, default_value_t = 512)]
    memory: u64,
    /// How much of it holds random data, in MiB
    #[arg(long, default_value_t = 400)]
    fill: u64,
    /// Pages the guest dirties per second
    #[arg(long, default_value_t = 2000)]
    rate: u64,
    /// MTU of the migration link
    #[arg(long, default_value_t = 9000)]
    mtu: u32,
}

/// One migration's figures.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figures {
    /// Page content of all rounds while the VM ran, by their time, MiB/s.
    pub pre_copy: f64,
    /// The same of round 0 alone.
    first: f64,
    /// ms.
    pub total: f64,
    /// ms.
    pub blackout: f64,
    /// Frames lost.
    pub lost: f64,
    /// Number of rounds.
    rounds: f64,
    /// Times the receiver was silent for too long.
    stalls: f64,
}

/// Runs the measurement.
pub fn main(args: &Args) -> ExitCode {
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("wire: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    if args.flood {
        return flood::run(guest(args)?, args.mtu, args.runs, &args.pace);
    }
    let wires: Vec<WireConfig> = args.wire.iter().map(|text| text.parse()).collect::<Result<_>>()?;
    let config = LabConfig { mtu: args.mtu, wire: Some(WireConfig::default()), ..LabConfig::for_test() };
    let lab = Lab::new(config.clone())?;
    println!("relay alone, MTU {}: {:.0} MiB/s", args.mtu, relay_rate(&lab, args.mtu)?);
    drop(lab);
    let scenario = Scenario::started(config, guest(args)?)?;
    let mut figures: BTreeMap<usize, Vec<Figures>> = BTreeMap::new();
    let mut source = Side::A;
    // The first touches memory that the machine below has yet to find.
    for run in 0..=args.runs {
        for (index, wire) in wires.iter().enumerate() {
            scenario.lab.wire()?.set(&WireConfig { seed: u64::from(run), ..*wire });
            let output = scenario.migrate(source, &["--downtime-limit", "2000"])?;
            ensure!(output.status.success(), "{}: {}{}", args.wire[index], output.stdout, output.stderr);
            let of = read(&scenario.lab.host(source).report(None)?)?;
            scenario.lab.host(source).wait_vm_gone(Duration::from_secs(20))?;
            source = source.other();
            if run > 0 {
                figures.entry(index).or_default().push(of);
            }
        }
    }
    println!(
        "{:<24} {:>14} {:>6} {:>14} {:>8} {:>8} {:>8} {:>8} {:>8}",
        "wire",
        "pre-copy MiB/s",
        "ratio",
        "round 0 MiB/s",
        "total ms",
        "blackout",
        "lost",
        "rounds",
        "stalls"
    );
    let mut best = None;
    for (index, rows) in &figures {
        let median = |of: fn(&Figures) -> f64| median(rows.iter().map(of));
        let pre_copy = median(|row| row.pre_copy);
        let best = *best.get_or_insert(pre_copy);
        println!(
            "{:<24} {:>14.0} {:>6.2} {:>14.0} {:>8.0} {:>8.1} {:>8.0} {:>8.0} {:>8.0}",
            args.wire[*index],
            pre_copy,
            pre_copy / best,
            median(|row| row.first),
            median(|row| row.total),
            median(|row| row.blackout),
            median(|row| row.lost),
            median(|row| row.rounds),
            median(|row| row.stalls),
        );
    }
    Ok(())
}

fn guest(args: &Args) -> Result<VmConfig> {
    let image = GuestImage::prepare(GuestKind::Bare, &lab::cache_dir())?;
    let rate = Rate::PerSecond(args.rate);
    let params = GuestParams { mib: args.fill, rate, fill: Fill::Random, ip: None, disk_read: false };
    Ok(VmConfig {
        accel: Accel::Kvm,
        memory_mib: args.memory,
        kernel: image.kernel.clone(),
        initrd: None,
        append: image.cmdline(&params),
        disk: None,
        extra: ["-bios", "qboot.rom"].map(str::to_owned).to_vec(),
    })
}

pub(crate) fn read(report: &Report) -> Result<Figures> {
    let rounds = report.rounds();
    let last =
        |index: usize| report.get(&format!("/rounds/{index}/last")).and_then(serde_json::Value::as_bool);
    let running: Vec<_> =
        rounds.iter().enumerate().filter(|(index, _)| last(*index) != Some(true)).map(|(_, r)| r).collect();
    let rate = |bytes: u64, ms: f64| bytes as f64 / MIB / (ms / 1e3);
    let first = running.first().context("a report without rounds")?;
    let lanes = report.get("/stream/lanes").and_then(serde_json::Value::as_array);
    let stalls = lanes.map(|lanes| lanes.iter().filter_map(|lane| lane["stalls"].as_f64()).sum());
    Ok(Figures {
        pre_copy: rate(
            running.iter().map(|round| round.bytes).sum(),
            running.iter().map(|round| round.duration_ms).sum(),
        ),
        first: rate(first.bytes, first.duration_ms),
        total: report.milliseconds("/total-time").context("a report without total-time")?,
        blackout: report.milliseconds("/downtime").context("a report without downtime")?,
        lost: rounds.iter().map(|round| round.lost_frames).sum::<u64>() as f64,
        rounds: rounds.len() as f64,
        stalls: stalls.unwrap_or(f64::NAN),
    })
}

/// What goes through the relay from packet socket to packet socket, MiB/s.
fn relay_rate(lab: &Lab, mtu: u32) -> Result<f64> {
    let open = |side: Side| PacketNic::open(&lab.host(side).namespace(), MIGRATION_NIC);
    let (from, to) = (open(Side::A)?, open(Side::B)?);
    let len = mtu as usize + 14;
    let mut buffer = vec![0x5a; len];
    buffer[..12].fill(0xff);
    buffer[12..14].copy_from_slice(&ETHERTYPE);
    let frames: Vec<Frame> = (0..16).map(|_| Frame { buffer: buffer.clone(), len }).collect();
    let (mut sent, mut seen, mut lost) = (0, 0u64, 0);
    let mut room = vec![0; len + 64];
    let begun = Instant::now();
    let mut heard = begun;
    while begun.elapsed() < RELAY_TIME {
        if sent - seen - lost <= RELAY_WINDOW - frames.len() as u64 {
            from.send(&frames);
            sent += frames.len() as u64;
        }
        while let Some(got) = to.receive(&mut room)? {
            seen += u64::from(got == len);
            heard = Instant::now();
        }
        if sent - seen - lost > RELAY_WINDOW - frames.len() as u64 {
            to.wait(RELAY_STALL);
            if heard.elapsed() > RELAY_STALL {
                lost = sent - seen;
            }
        }
    }
    if seen == 0 {
        bail!("nothing gets through the relay");
    }
    if lost > 0 {
        println!("  ({lost} of {sent} frames lost)");
    }
    Ok((seen * len as u64) as f64 / MIB / begun.elapsed().as_secs_f64())
}
