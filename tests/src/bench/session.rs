//! One run of the program: beds are made as cases need them, and nothing is measured twice.

use std::fmt;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::args::Args;
use super::bed::{Bed, BedConfig};
use super::figures::{Figures, MIB};
use super::guests::{Backing, Guest};
use super::peers::Mover;
use super::results::{Results, Series};
use crate::guest::{Fill, GuestKind, Rate};

/// Memory that is left alone when all other is touched, bytes.
const SPARED: u64 = 2 << 30;

/// The migration network of a series.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Network {
    /// Bytes.
    pub mtu: u32,
    /// What is let through a second, as `tc` says it; `None` is a cable.
    pub shape: Option<&'static str>,
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MTU {}", self.mtu)?;
        self.shape.map_or(Ok(()), |rate| write!(f, ", {rate}"))
    }
}

/// What has been measured, and where.
pub(super) struct Session<'a> {
    pub args: &'a Args,
    pub results: Results,
    bed: Option<Bed>,
    /// Whether something was moved already that does not count.
    warm: bool,
    /// Whether the machine below has been made to give the memory that guests will take.
    fetched: bool,
}

impl<'a> Session<'a> {
    pub fn new(args: &'a Args) -> Self {
        let setting = format!(
            "{} MiB guest, {} MiB filled, {} pages/s, veth with MTU {}, {} queue(s), {} run(s) of each",
            args.memory,
            args.fill,
            args.rate,
            args.mtu,
            args.queues,
            args.runs()
        );
        Self {
            args,
            results: Results { setting, ..Results::default() },
            bed: None,
            warm: false,
            fetched: false,
        }
    }

    /// The guest of most cases.
    pub fn usual_guest(&self) -> Guest {
        Guest {
            kind: GuestKind::Bare,
            memory: self.args.memory,
            area: self.args.fill,
            rate: Rate::PerSecond(self.args.rate),
            fill: Fill::Random,
            backing: self.args.backing,
        }
    }

    /// The network of most cases.
    pub fn usual_network(&self) -> Network {
        Network { mtu: self.args.mtu, shape: None }
    }

    /// Two hosts with such a migration network. There is one pair at a time.
    pub fn bed(&mut self, mtu: u32) -> Result<&mut Bed> {
        self.bed_for(mtu, self.args.backing)
    }

    fn bed_for(&mut self, mtu: u32, backing: Backing) -> Result<&mut Bed> {
        let config = BedConfig {
            mtu,
            queues: self.args.queues,
            huge_tmpfs: backing == Backing::HugeTmpfs,
            xferry: self.args.xferry.clone(),
        };
        if self.bed.as_ref().is_none_or(|bed| *bed.config() != config) {
            // First the old one's end: its huge pages may be wanted.
            self.bed = None;
            let bed = Bed::new(config)?;
            if bed.lab.keep_free_memory()? && !std::mem::replace(&mut self.fetched, true) {
                fetch_memory();
            }
            self.bed = Some(bed);
        }
        self.bed.as_mut().context("no bed")
    }

    /// Moves the guest by each mover, by turns, as often as `runs` says; those that have moved it there already do not again.
    /// A mover that fails is noted, and has no more turns.
    ///
    /// # Errors
    /// If it cannot be measured at all.
    pub fn compare(&mut self, network: Network, guest: &Guest, movers: &[Mover], runs: u32) -> Result<()> {
        let new: Vec<&Mover> =
            movers.iter().filter(|mover| self.series(network, guest, mover).is_none()).collect();
        if new.is_empty() {
            return Ok(());
        }
        let warm = std::mem::replace(&mut self.warm, true);
        let bed = self.bed_for(network.mtu, guest.backing)?;
        if guest.backing == Backing::Hugetlbfs {
            ensure!(
                bed.provide_huge_pages(guest.memory)?,
                "this machine has not enough memory for huge pages"
            );
        }
        let shaped = network.shape.map(|rate| bed.shape(rate)).transpose()?;
        println!("  {guest}; {network}");
        if !warm {
            // Whoever goes first pays for memory that the machine below touches for the first time.
            if let Err(error) = bed.measure(guest, new[0]) {
                println!("    (uncounted: {error:#})");
                bed.clear()?;
            }
        }
        let mut all: Vec<Series> = new.iter().map(|mover| series_of(network, guest, mover)).collect();
        for _ in 0..runs {
            for (series, mover) in all.iter_mut().zip(&new).filter(|(series, _)| series.failed.is_none()) {
                let begun = Instant::now();
                match bed.measure(guest, mover) {
                    Ok(figures) => {
                        println!("    {}", line(mover, &figures, begun));
                        series.runs.push(figures);
                    }
                    Err(error) => {
                        println!("    {mover:<22} FAILED: {error:#}");
                        series.failed = Some(format!("{error:#}"));
                        bed.clear()?;
                    }
                }
            }
        }
        drop(shaped);
        self.results.series.extend(all);
        Ok(())
    }

    /// What was measured of a mover.
    pub fn series(&self, network: Network, guest: &Guest, mover: &Mover) -> Option<&Series> {
        let wanted = [network.to_string(), guest.to_string(), mover.to_string()];
        let same =
            |series: &&Series| [&series.network, &series.guest, &series.mover].into_iter().eq(wanted.iter());
        self.results.series.iter().find(same)
    }

    /// Median of a figure; `None` when it was not measured or did not come to an end.
    pub fn median(
        &self,
        network: Network,
        guest: &Guest,
        mover: &Mover,
        of: impl Fn(&Figures) -> f64,
    ) -> Option<f64> {
        self.series(network, guest, mover)?.median(of)
    }

    /// The mover of which a figure's median is least, and that; `None` instead of the figure when none came to an end.
    pub fn least(
        &self,
        network: Network,
        guest: &Guest,
        movers: &[Mover],
        of: impl Fn(&Figures) -> f64 + Copy,
    ) -> (String, Option<f64>) {
        let medians = movers
            .iter()
            .filter_map(|mover| Some((mover.to_string(), self.median(network, guest, mover, of)?)));
        let least = medians.min_by(|one, other| one.1.total_cmp(&other.1));
        least.map_or(("none came to an end".to_owned(), None), |(name, value)| (name, Some(value)))
    }
}

/// Touches all memory that can be had: the machine below finds it for the first who wants it, up to 4 ms for each 2 MiB, and
/// whoever that is would be measured with it. All, because the kernel gives guests in huge pages what lay untouched longest.
fn fetch_memory() {
    let bytes = available_bytes().saturating_sub(SPARED);
    println!("  this machine is virtual: touching {} MiB that its free memory shall consist of", bytes >> 20);
    drop(std::hint::black_box(vec![1_u8; bytes as usize]));
}

/// Memory that can be had, bytes; 0 when the kernel does not say.
fn available_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: Option<u64> = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    kib.unwrap_or(0) << 10
}

/// Nothing measured yet.
pub(super) fn series_of(network: Network, guest: &Guest, mover: &Mover) -> Series {
    Series {
        guest: guest.to_string(),
        mover: mover.to_string(),
        network: network.to_string(),
        pages_per_second: guest.pages_per_second(),
        memory_mib: [guest.memory, guest.area],
        runs: Vec::new(),
        failed: None,
    }
}

/// One migration in one line.
fn line(mover: &Mover, figures: &Figures, begun: Instant) -> String {
    let rate = figures.pre_copy_mib_s.map(|rate| format!(", pre-copy {rate:.0} MiB/s")).unwrap_or_default();
    let pace = figures.guest.map(|pace| format!(", guest {:.0} %", pace.kept() * 100.0)).unwrap_or_default();
    format!(
        "{mover:<22} {:>7.0} ms, blackout {:>6.1} ms, CPU {:>5.2} s, wire {:>5.0} MiB{rate}{pace} ({:.1} s)",
        figures.total_ms,
        figures.blackout_ms,
        figures.cpu_s,
        figures.wire_bytes as f64 / MIB,
        begun.elapsed().as_secs_f64()
    )
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::bench::peers::Qemu;

    #[test]
    fn the_least_is_of_those_that_came_to_an_end() {
        let args = Args::try_parse_from(["bench"]).unwrap();
        let mut session = Session::new(&args);
        let (network, guest) = (session.usual_network(), session.usual_guest());
        let movers = Qemu::ALL.map(Mover::Qemu);
        for (mover, times) in movers.iter().zip([&[900.0, 100.0, 500.0][..], &[400.0], &[]]) {
            let mut series = series_of(network, &guest, mover);
            series.runs = times.iter().map(|&time| Figures::sample(time, Vec::new())).collect();
            series.failed = times.is_empty().then(|| "it takes longer".to_owned());
            session.results.series.push(series);
        }
        let total = |figures: &Figures| figures.total_ms;
        assert_eq!(session.median(network, &guest, &movers[0], total), Some(500.0));
        assert_eq!(session.median(network, &guest, &movers[2], total), None);
        let least = session.least(network, &guest, &movers, total);
        assert_eq!(least, ("QEMU multifd 2".to_owned(), Some(400.0)));
        assert_eq!(session.least(network, &guest, &movers[2..], total).1, None);
        // The same on another network is something else.
        let slow = Network { shape: Some("1gbit"), ..network };
        assert!(session.series(slow, &guest, &movers[0]).is_none());
    }
}
