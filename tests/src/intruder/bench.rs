//! `wire --flood`: what a migration loses to a flood of strangers at the data port of its destination, beside one that loses only
//! the processor time that the flood's own making takes.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::program::{ProgramTime, Statistics};
use super::{Flood, Intruder, Kind};
use crate::bench::median;
use crate::lab::plan::{INTRUDER_PORT, Side};
use crate::lab::{Lab, LabConfig, VmConfig, run_tool};
use crate::scenario::{Scenario, link};
use crate::wire::bench::{Figures, MIB, read};

/// Nobody's address (locally administered), which the switch knows to be behind the port that the frame came from: it ends
/// there.
const NOWHERE: [u8; 6] = [0x02, 0, 0, 0, 0, 0xee];
/// What a 64-byte frame takes of an Ethernet with preamble and gap, bytes (IEEE 802.3).
const ON_THE_WIRE: f64 = 84.0;
/// How long a flood runs before anything is measured.
const LEAD: Duration = Duration::from_millis(200);
/// How long the XDP program is measured.
const PROGRAM_TIME: Duration = Duration::from_secs(2);
/// How long QEMU may take to end.
const GONE: Duration = Duration::from_secs(20);

/// Where a flood goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Target {
    /// To the data port of the destination.
    DataPort,
    /// The same frames, no further than the switch.
    Nowhere,
}

/// A flood by pace and target; none is the first.
type Cell = Option<(u64, Target)>;

struct Row {
    migration: Figures,
    /// Frames a second that the flood really had.
    pace: f64,
    /// Of those, how many a full queue in front of the NIC took.
    lost: f64,
    /// Processor time of one of its frames, ns.
    each: f64,
}

/// Measures and prints.
pub(crate) fn run(vm: VmConfig, mtu: u32, runs: u32, paces: &[u64]) -> Result<()> {
    let config = LabConfig { mtu, intruder: true, ..LabConfig::for_test() };
    let scenario = Scenario::started(config, vm)?;
    let intruder = Intruder::enter(&scenario.lab)?;
    forward_by_address(&scenario.lab, &intruder)?;
    let floods = paces.iter().flat_map(|&pace| [(pace, Target::DataPort), (pace, Target::Nowhere)].map(Some));
    let cells: Vec<Cell> = std::iter::once(None).chain(floods).collect();
    let mut rows: BTreeMap<usize, Vec<Row>> = BTreeMap::new();
    let mut source = Side::A;
    // The first touches memory that the machine below has yet to find.
    for run in 0..=runs {
        for (index, &cell) in cells.iter().enumerate() {
            let row = migrate(&scenario, &intruder, source, cell)?;
            source = source.other();
            if run > 0 {
                rows.entry(index).or_default().push(row);
            }
        }
    }
    print(&cells, &rows);
    for &pace in paces {
        let time = program_time(&scenario.lab, &intruder, pace)?;
        println!("XDP program, {pace} strangers/s: {:.0} ns each, of {} runs", time.each(), time.runs);
    }
    Ok(())
}

/// Has the switch send every frame to where it belongs and nowhere else, as one that learned would.
fn forward_by_address(lab: &Lab, intruder: &Intruder) -> Result<()> {
    let switch = lab.layout().switch();
    let known = [
        (intruder.host(Side::A).mac, Side::A.migration_port()),
        (intruder.host(Side::B).mac, Side::B.migration_port()),
        (intruder.own().mac, INTRUDER_PORT),
        (NOWHERE, INTRUDER_PORT),
    ];
    for (mac, port) in known {
        let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
        run_tool("bridge", &["-n", &switch, "fdb", "replace", &mac, "dev", port, "master", "static"])?;
    }
    Ok(())
}

/// A frame of 64 bytes, with the checksum that a NIC adds, to a host's data port.
fn stranger(intruder: &Intruder, side: Side, target: Target) -> Result<Vec<u8>> {
    let kind = Kind::blind(intruder, side).into_iter().next().context("there are no strangers")?;
    let mut frame = kind.frame;
    ensure!(frame.len() == super::envelope::SHORTEST, "{} has {} bytes", kind.name, frame.len());
    if target == Target::Nowhere {
        frame[..6].copy_from_slice(&NOWHERE);
    }
    Ok(frame)
}

fn migrate(scenario: &Scenario, intruder: &Intruder, source: Side, cell: Cell) -> Result<Row> {
    let target = source.other();
    let flood = match cell {
        Some((pace, to)) => Some(intruder.flood(&stranger(intruder, target, to)?, Some(pace))?),
        None => None,
    };
    let sent = || flood.as_ref().map_or(0, Flood::sent);
    let processor = || flood.as_ref().map_or(0, Flood::processor_time);
    thread::sleep(LEAD);
    let lost = || -> Result<u64> {
        let port = link(&scenario.lab.layout().switch(), target.migration_port())?;
        port["stats64"]["tx"]["dropped"].as_u64().context("a port without counters")
    };
    let (before, processor_before, lost_before, begun) = (sent(), processor(), lost()?, Instant::now());
    let output = scenario.migrate(source, &["--downtime-limit", "2000"])?;
    let seconds = begun.elapsed().as_secs_f64();
    let row = Row {
        migration: read(&scenario.lab.host(source).report(None)?)?,
        pace: (sent() - before) as f64 / seconds,
        each: (processor() - processor_before) as f64 / (sent() - before) as f64,
        lost: (lost()? - lost_before) as f64,
    };
    ensure!(output.status.success(), "{cell:?}: {}{}", output.stdout, output.stderr);
    drop(flood);
    scenario.lab.host(source).wait_vm_gone(GONE)?;
    Ok(row)
}

fn print(cells: &[Cell], rows: &BTreeMap<usize, Vec<Row>>) {
    let median = |index: usize, of: fn(&Row) -> f64| median(rows.get(&index).into_iter().flatten().map(of));
    let quiet = median(0, |row| row.migration.pre_copy);
    let processors = thread::available_parallelism().map_or(1, usize::from) as f64;
    println!(
        "{:<24} {:>10} {:>8} {:>8} {:>8} {:>14} {:>6} {:>10} {:>10} {:>8} {:>8} {:>8}",
        "flood",
        "frames/s",
        "ns each",
        "of CPUs",
        "of wire",
        "pre-copy MiB/s",
        "ratio",
        "of nowhere",
        "lost port",
        "lost",
        "total ms",
        "blackout"
    );
    for (index, cell) in cells.iter().enumerate() {
        let name = match cell {
            None => "none".to_owned(),
            Some((pace, Target::DataPort)) => format!("{pace}/s, data port"),
            Some((pace, Target::Nowhere)) => format!("{pace}/s, nowhere"),
        };
        let pace = median(index, |row| row.pace);
        let each = if cell.is_some() { median(index, |row| row.each) } else { 0.0 };
        let rate = median(index, |row| row.migration.pre_copy);
        // The same pace to nowhere is the next.
        let beside = match cell {
            Some((_, Target::DataPort)) => {
                format!("{:.2}", rate / median(index + 1, |row| row.migration.pre_copy))
            }
            _ => "–".to_owned(),
        };
        println!(
            "{name:<24} {pace:>10.0} {each:>8.0} {:>7.0}% {:>7.1}% {rate:>14.0} {:>6.2} {beside:>10} {:>10.0} {:>8.0} {:>8.0} {:>8.1}",
            100.0 * pace * each / (processors * 1e9),
            100.0 * pace * ON_THE_WIRE / (quiet * MIB),
            rate / quiet,
            median(index, |row| row.lost),
            median(index, |row| row.migration.lost),
            median(index, |row| row.migration.total),
            median(index, |row| row.migration.blackout),
        );
    }
}

/// What the XDP program on host-b takes for strangers alone.
fn program_time(lab: &Lab, intruder: &Intruder, pace: u64) -> Result<ProgramTime> {
    let pid = lab.b.agent_pid().context("host-b has no agent")?;
    let _statistics = Statistics::enable()?;
    let _flood = intruder.flood(&stranger(intruder, Side::B, Target::DataPort)?, Some(pace))?;
    thread::sleep(LEAD);
    let before = ProgramTime::read(pid)?;
    thread::sleep(PROGRAM_TIME);
    Ok(ProgramTime::read(pid)?.since(before))
}
