//! xferry beside its peers: the same guest, the same link, in the same run. Ratios count; times of one machine
//! do not compare with another's.

mod ciphers;
mod link;
mod qemu;
mod table;
mod transport;

use std::{fs, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, Result, ensure};
use clap::Parser;

use crate::guest::{Fill, GuestImage, GuestKind, GuestParams, Rate, SerialLog};
use crate::lab::{Accel, Host, Lab, LabConfig, Report, Side, VmConfig, plan::VM_NAME};
use ciphers::Cost;
use qemu::Peer;
use table::{Row, Table};

/// How long a guest may take to fill its memory.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
const MIGRATION_LIMIT: Duration = Duration::from_secs(300);
const MIB: f64 = 1024.0 * 1024.0;

/// Measures xferry against QEMU's own migration and plain TCP over the same link.
#[derive(Debug, Parser)]
pub struct Args {
    /// RAM of the guest in MiB
    #[arg(long, default_value_t = 1024)]
    memory: u64,
    /// How much of it holds random data, in MiB
    #[arg(long, default_value_t = 900)]
    fill: u64,
    /// Pages the guest dirties per second
    #[arg(long, default_value_t = 5000)]
    rate: u64,
    /// MTU of the migration link
    #[arg(long, default_value_t = 9000)]
    mtu: u32,
    /// Queues of the migration NIC
    #[arg(long, default_value_t = 1)]
    queues: u32,
    /// Runs of each; medians are shown
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// Instead: what each way of guarding pages costs migrations
    #[arg(long)]
    ciphers: bool,
    /// Compare AF_XDP and UDP sockets at either end with each other, and with nobody else
    #[arg(long, conflicts_with_all = ["json", "ciphers"])]
    transports: bool,
    /// Write rows and all figures to this file
    #[arg(long)]
    json: Option<PathBuf>,
    /// The xferry program [default: XFERRY_BIN, or target/release/xferry]
    #[arg(long)]
    xferry: Option<PathBuf>,
}

/// One migration's figures.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figures {
    /// From request to end, ms.
    pub total_ms: f64,
    /// Blackout as the migrating side says, ms.
    pub downtime_ms: f64,
    /// Payload rate of the first pass, MiB/s; only xferry tells it.
    pub rate_mib: Option<f64>,
}

/// Runs the benchmark.
pub fn main(args: &Args) -> ExitCode {
    if let Some(reason) = crate::lab::missing() {
        eprintln!("bench: {reason}");
        return ExitCode::FAILURE;
    }
    let measured = if args.ciphers {
        measure_ciphers(args)
    } else if args.transports {
        set_up(args).and_then(|(lab, config)| transport::compare(&lab, &config, args.runs))
    } else {
        run(args).map(|table| print!("{table}"))
    };
    match measured {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn set_up(args: &Args) -> Result<(Lab, VmConfig)> {
    let image = GuestImage::prepare(GuestKind::Bare, &crate::lab::cache_dir())?;
    let params = GuestParams {
        mib: args.fill,
        rate: Rate::PerSecond(args.rate),
        fill: Fill::Random,
        ip: None,
        disk_read: false,
    };
    let config = VmConfig {
        accel: Accel::Kvm,
        memory_mib: args.memory,
        kernel: image.kernel.clone(),
        initrd: None,
        append: image.cmdline(&params),
        disk: None,
        extra: vec!["-bios".to_owned(), "qboot.rom".to_owned()],
    };
    let lab = Lab::new(LabConfig {
        mtu: args.mtu,
        queues: args.queues,
        xferry: args.xferry.clone().unwrap_or_else(crate::lab::xferry_program),
        ..LabConfig::for_test()
    })?;
    Ok((lab, config))
}

fn measure_ciphers(args: &Args) -> Result<()> {
    let (lab, config) = set_up(args)?;
    // Not counted, as below.
    xferry(&lab, &config, "")?;
    let mut costs: Vec<Vec<Cost>> = ciphers::ALL.iter().map(|_| Vec::new()).collect();
    for _ in 0..args.runs {
        for (guarding, costs) in ciphers::ALL.iter().zip(&mut costs) {
            costs.push(xferry(&lab, &config, guarding.settings)?);
        }
    }
    ciphers::print(&costs);
    Ok(())
}

fn run(args: &Args) -> Result<Table> {
    let (lab, config) = set_up(args)?;
    let mut table = Table::new(args);
    let tcp = link::best_tcp(&lab)?;
    // Not counted: whoever goes first pays for memory that the machine below touches for the first time.
    with_guest(&lab, &config, || qemu::migrate(&lab, &config, Peer::ALL[0]))?;
    for _ in 0..args.runs {
        table.add("xferry", xferry(&lab, &config, "")?.figures);
        for peer in Peer::ALL {
            table.add(peer.name(), with_guest(&lab, &config, || qemu::migrate(&lab, &config, peer))?);
        }
    }
    table.compare(tcp);
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&table.to_json())?;
        fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(table)
}

/// Boots the guest on host-a, lets `work` move it, and ends it wherever it is.
fn with_guest<T>(lab: &Lab, config: &VmConfig, work: impl FnOnce() -> Result<T>) -> Result<T> {
    // What an earlier guest said must not be taken for this one's.
    let _ = fs::remove_file(lab.a.vm_paths().serial);
    lab.a.start_vm(config)?;
    let mut serial = SerialLog::new(lab.a.vm_paths().serial);
    serial.wait_ready(BOOT_LIMIT)?;
    serial.wait_progress(BOOT_LIMIT)?;
    let result = work();
    for side in [Side::A, Side::B] {
        lab.host(side).kill_vm()?;
        lab.host(side).discard_ram()?;
    }
    result
}

/// One migration by agents with these settings beside the usual ones.
fn xferry(lab: &Lab, config: &VmConfig, settings: &str) -> Result<Cost> {
    let (report, cpu) = migrate(lab, config, |host| host.start_agent_saying(settings))?;
    let first = report.rounds().into_iter().next().context("a report without rounds")?;
    let figures = Figures {
        total_ms: report.milliseconds("/total-time").context("a report without total-time")?,
        downtime_ms: report.milliseconds("/downtime").context("a report without downtime")?,
        rate_mib: Some(first.bytes as f64 / MIB / (first.duration_ms / 1e3)),
    };
    Ok(Cost { figures, cpu })
}

/// One migration by agents that `start` starts: its report, and the processor time of both agents, s.
fn migrate(lab: &Lab, config: &VmConfig, start: impl Fn(&Host) -> Result<()>) -> Result<(Report, [f64; 2])> {
    for side in Side::BOTH {
        lab.host(side).write_vm_definition(config)?;
        start(lab.host(side))?;
    }
    let migrated = with_guest(lab, config, || {
        let output = lab.a.xferry(&["migrate", VM_NAME, "--to", "host-b", "--json"], MIGRATION_LIMIT)?;
        ensure!(output.status.success(), "xferry failed: {}{}", output.stdout, output.stderr);
        let cpu = [ciphers::agent_cpu(&lab.a)?, ciphers::agent_cpu(&lab.b)?];
        Ok((Report::parse(&output.stdout)?, cpu))
    });
    lab.a.kill_agent();
    lab.b.kill_agent();
    migrated
}

impl Row {
    /// A row whose ratio should be at most `bar`.
    fn at_most(name: &str, unit: &'static str, ours: f64, peer: (&str, f64), bar: f64) -> Self {
        Self::compare(name, unit, ours, peer, bar, |ratio| ratio <= bar)
    }

    /// A row whose ratio should be at least `bar`.
    fn at_least(name: &str, unit: &'static str, ours: f64, peer: (&str, f64), bar: f64) -> Self {
        Self::compare(name, unit, ours, peer, bar, |ratio| ratio >= bar)
    }

    fn compare(
        name: &str,
        unit: &'static str,
        ours: f64,
        (peer_name, peer): (&str, f64),
        bar: f64,
        holds: impl FnOnce(f64) -> bool,
    ) -> Self {
        let ratio = ours / peer;
        Self {
            name: name.to_owned(),
            ours,
            peer,
            peer_name: peer_name.to_owned(),
            unit,
            ratio,
            bar,
            holds: holds(ratio),
        }
    }
}
