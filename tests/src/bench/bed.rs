//! Where it is measured: two hosts with a migration network, and a guest that is moved from host-a to host-b.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::figures::{Figures, Observer};
use super::guests::{Backing, Guest};
use super::peers::Mover;
use crate::guest::{Rate, SerialLog};
use crate::lab::plan::MIGRATION_NIC;
use crate::lab::{Lab, LabConfig, Side};

/// How long a guest may take to fill its memory.
const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// How long the guest's own pace is watched before it is moved: six of its reports.
const BASELINE: Duration = Duration::from_millis(600);
/// Bytes of a huge page.
const HUGE_PAGE_MIB: u64 = 2;
/// What a shaped link lets through at once, and how long a queue it has. `tbf` needs as much as the largest packet.
const SHAPE: &str = "burst 256kb latency 20ms";

/// What a [`Bed`] is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BedConfig {
    /// MTU of the migration network, bytes.
    pub mtu: u32,
    /// Queues of its NICs.
    pub queues: u32,
    /// Whether the tmpfs of the guests' RAM has huge pages.
    pub huge_tmpfs: bool,
    pub xferry: Option<PathBuf>,
}

/// Two hosts.
pub(super) struct Bed {
    pub lab: Lab,
    config: BedConfig,
    huge: Option<Huge>,
}

/// Huge pages, and where.
struct Huge {
    pages: u64,
    directory: PathBuf,
}

impl Bed {
    pub fn new(config: BedConfig) -> Result<Self> {
        let lab = Lab::new(LabConfig {
            mtu: config.mtu,
            queues: config.queues,
            huge_tmpfs: config.huge_tmpfs,
            // What users have.
            transport: ["auto"; 2],
            xferry: config.xferry.clone().unwrap_or_else(crate::lab::xferry_program),
            ..LabConfig::for_test()
        })?;
        Ok(Self { lab, config, huge: None })
    }

    pub fn config(&self) -> &BedConfig {
        &self.config
    }

    /// Takes huge pages for a guest of so many MiB on both hosts. `false` when this machine does not have them.
    pub fn provide_huge_pages(&mut self, memory_mib: u64) -> Result<bool> {
        // Each host's file, and the page by which a file is longer than the guest's RAM: none, but QEMU may round up.
        let pages = 2 * (memory_mib / HUGE_PAGE_MIB + 1);
        if let Some(huge) = &self.huge {
            ensure!(huge.pages >= pages, "the first guest in huge pages has to be the largest");
            return Ok(true);
        }
        self.huge = self.lab.take_huge_pages(pages)?.map(|directory| Huge { pages, directory });
        Ok(self.huge.is_some())
    }

    /// Lets so much through the migration network in each direction, as `tc` says it (`1gbit`), until the returned value is
    /// dropped. What AF_XDP sends goes past it: the kernel's copy mode sends without the NIC's queueing discipline.
    pub fn shape(&self, rate: &str) -> Result<Shaped<'_>> {
        let shaped = Shaped { bed: self };
        for side in Side::BOTH {
            tc(
                &self.lab.host(side).namespace(),
                &format!("qdisc replace dev {MIGRATION_NIC} root tbf rate {rate} {SHAPE}"),
            )?;
        }
        Ok(shaped)
    }

    /// How QEMU is started for a guest on a host.
    pub fn command(&self, guest: &Guest, side: Side) -> Result<Vec<String>> {
        let mut paths = self.lab.host(side).vm_paths();
        if guest.backing == Backing::Hugetlbfs {
            paths.ram = self.huge_file(side)?;
        }
        Ok(guest.vm()?.command(&paths))
    }

    fn huge_file(&self, side: Side) -> Result<PathBuf> {
        let huge = self.huge.as_ref().context("no huge pages were taken")?;
        Ok(huge.directory.join(side.name()))
    }

    /// Moves a guest, freshly started, from host-a to host-b, and tells what it took.
    pub fn measure(&self, guest: &Guest, mover: &Mover) -> Result<Figures> {
        mover.prepare(self, guest)?;
        let measured = self.boot(guest).and_then(|()| {
            let observer = Observer::start(&self.lab, Side::A)?;
            if guest.rate != Rate::PerSecond(0) {
                thread::sleep(BASELINE);
            }
            let begun = observer.begin()?;
            let told = mover.migrate(self, guest, Side::A)?;
            Ok(Figures::new(told, begun.finish()?))
        });
        let sound = measured.as_ref().map_or(Ok(()), |_| self.expect_sound());
        self.clear()?;
        sound.and(measured)
    }

    /// Starts a guest on host-a and waits until it has filled its memory.
    pub fn boot(&self, guest: &Guest) -> Result<()> {
        // What an earlier guest said must not be taken for this one's.
        for side in Side::BOTH {
            let _ = fs::remove_file(self.lab.host(side).vm_paths().serial);
        }
        self.lab.a.start_qemu(&self.command(guest, Side::A)?)?;
        let mut serial = SerialLog::new(self.lab.a.vm_paths().serial);
        serial.wait_ready(BOOT_LIMIT)?;
        if guest.rate != Rate::PerSecond(0) {
            serial.wait_progress(BOOT_LIMIT)?;
        }
        Ok(())
    }

    /// The guest found no page that does not hold what it wrote.
    pub fn expect_sound(&self) -> Result<()> {
        for side in Side::BOTH {
            let errors = SerialLog::new(self.lab.host(side).vm_paths().serial).errors_seen().to_vec();
            ensure!(errors.is_empty(), "the guest found wrong pages on {side}: {}", errors.join("; "));
        }
        Ok(())
    }

    /// Ends the guest wherever it is, and the agents.
    pub fn clear(&self) -> Result<()> {
        for side in Side::BOTH {
            self.lab.host(side).kill_agent();
        }
        Side::BOTH.into_iter().try_for_each(|side| self.clear_guest(side))
    }

    /// Ends the guest on one host, if it is there.
    pub fn clear_guest(&self, side: Side) -> Result<()> {
        let host = self.lab.host(side);
        host.kill_vm()?;
        host.discard_ram()?;
        if self.huge.is_some()
            && let Err(error) = fs::remove_file(self.huge_file(side)?)
            && error.kind() != ErrorKind::NotFound
        {
            return Err(error).context("removing a guest's huge pages");
        }
        Ok(())
    }
}

/// A migration network that is slow.
pub(super) struct Shaped<'a> {
    bed: &'a Bed,
}

impl Drop for Shaped<'_> {
    fn drop(&mut self) {
        for side in Side::BOTH {
            // It was not made on the second when that failed on the first.
            let _ =
                tc(&self.bed.lab.host(side).namespace(), &format!("qdisc delete dev {MIGRATION_NIC} root"));
        }
    }
}

fn tc(namespace: &str, line: &str) -> Result<()> {
    let words: Vec<&str> = ["-n", namespace].into_iter().chain(line.split_whitespace()).collect();
    crate::lab::run_tool("tc", &words).map(drop)
}
