//! Two hosts, a switch and a client, made of network namespaces.
//!
//! ```text
//!                 mig0 ════ migration network, 10.77.0.0/24 ════ mig0
//!  ┌─ host-a ────────┐                                   ┌──────── host-b ─┐
//!  │ agent   QEMU    │ mgmt0 ─── 10.78.0.0/24 ───  mgmt0 │   QEMU    agent │
//!  │         vmtap0  │                                   │  vmtap0         │
//!  │          br0    │                                   │    br0          │
//!  └───────── uplink0┘                                   └uplink0 ─────────┘
//!                │          ┌──── switch ────┐               │
//!                └── port-a │      sw0       │ port-b ───────┘
//!                           └── port-client ─┘
//!                                   │   VM network, 10.79.0.0/24
//!                              eth0 client
//! ```
//!
//! A [`Lab`] is removed when it is dropped, when its process gets SIGINT, SIGTERM or SIGHUP, and, if the
//! process is killed, by the next lab that anybody makes on this machine. Nothing outside the lab's
//! own namespaces, directories and disk image is ever touched.

mod agent;
mod api;
mod command;
mod disk;
mod encryption;
mod fixture;
mod host;
mod hugepages;
mod layout;
pub(crate) mod monitor;
pub mod netns;
mod pki;
pub mod plan;
mod process;
mod ready_ip;
mod report;
mod reporting;
mod signals;
mod state;
mod sync;
mod teardown;
mod topology;
mod vm;
mod wait;

use std::env;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};

pub(crate) use command::run as run_tool;
pub use disk::{Filler, Held, HoldableDisk};
pub use encryption::Encryption;
pub use host::{Host, Output};
pub use layout::Layout;
pub use plan::Side;
pub use process::{Lifetime, Process, last_lines, tail};
pub use ready_ip::ReadyIp;
pub use report::{Report, Round};
pub use signals::wait_if_interrupted;
pub(crate) use sync::lock;
pub use vm::{Accel, Disk, VmConfig, VmPaths};
pub use wait::wait_for;

use crate::wire::{Wire, WireConfig};
use fixture::Fixture;

/// What a lab is like.
#[derive(Clone, Debug)]
pub struct LabConfig {
    /// What the namespaces' names start with; empty for exactly `host-a`, `host-b`, `switch`, `client`.
    pub prefix: String,
    /// MTU of the migration NICs in bytes: 1500, 9000, … 65535.
    pub mtu: u32,
    /// Receive and transmit queues of each migration NIC.
    pub queues: u32,
    /// Bytes of a file system of its own for each agent's `state-dir`; else it is a directory like any other.
    pub state_disk: Option<u64>,
    /// Whether guest RAM lies in a tmpfs of huge pages (`huge=within_size`), as operations.md recommends; else in one
    /// that has none, as /dev/shm usually is.
    pub huge_tmpfs: bool,
    /// Time limits of the agents that are not the default, s, by their names under `[limits]`.
    pub limits: Vec<(&'static str, u64)>,
    /// What is wrong with the migration network; `None` is a cable. Needs ethtool.
    pub wire: Option<WireConfig>,
    /// Whether the migration network is a switch with a third host at it; see [`crate::intruder`]. Not together with
    /// `wire`. Needs ethtool.
    pub intruder: bool,
    /// `[migration] transport` of host-a and host-b: `auto`, `af-xdp`, `udp`.
    pub transport: [&'static str; 2],
    /// Whether the migration NICs have IPv6 addresses, and none of IPv4.
    pub ipv6: bool,
    /// Whether the agents go without certificates.
    pub insecure: bool,
    /// What the agents are told about encrypting pages; `None` is nothing.
    pub encryption: Option<Encryption>,
    /// Leave the lab up when it is dropped.
    pub keep: bool,
    /// The program under test.
    pub xferry: PathBuf,
    /// Where the shared disk image is made, on a disk filesystem.
    pub cache_dir: PathBuf,
}

impl Default for LabConfig {
    fn default() -> Self {
        Self {
            prefix: String::new(),
            mtu: 9000,
            queues: 1,
            state_disk: None,
            huge_tmpfs: false,
            limits: Vec::new(),
            wire: None,
            intruder: false,
            // Whatever falls back is to be seen.
            transport: ["af-xdp"; 2],
            ipv6: false,
            insecure: false,
            encryption: None,
            keep: false,
            xferry: xferry_program(),
            cache_dir: cache_dir(),
        }
    }
}

impl LabConfig {
    /// As [`Self::for_test`], without certificates: for tests that speak with an agent themselves.
    pub fn insecure() -> Self {
        Self { insecure: true, ..Self::for_test() }
    }

    /// The same with the agents told to encrypt pages, or not to.
    #[must_use]
    pub fn encryption(self, encryption: Encryption) -> Self {
        Self { encryption: Some(encryption), ..self }
    }

    fn migration_network(&self) -> topology::MigrationNetwork {
        topology::MigrationNetwork { mtu: self.mtu, queues: self.queues, ipv6: self.ipv6 }
    }

    /// A lab with a prefix of its own, so that tests may run side by side.
    pub fn for_test() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Self { prefix: format!("x{}-{number}-", std::process::id()), ..Self::default() }
    }
}

/// Where guests' images and disks are kept between runs: `XFERRY_LAB_CACHE`, else `target/lab` of
/// this workspace.
pub fn cache_dir() -> PathBuf {
    env::var_os("XFERRY_LAB_CACHE").map_or_else(|| target_dir().join("lab"), PathBuf::from)
}

/// The program under test: `XFERRY_BIN`, else the workspace's release build.
pub fn xferry_program() -> PathBuf {
    env::var_os("XFERRY_BIN").map_or_else(|| target_dir().join("release/xferry"), PathBuf::from)
}

pub(crate) fn target_dir() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).join("target")
}

/// Why no lab can be made here, for a test to skip with; `None` if one can.
pub fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("network namespaces need root".to_owned());
    }
    let tools = [
        ("ip", "iproute2"),
        ("bridge", "iproute2"),
        ("setpriv", "util-linux"),
        ("setsid", "util-linux"),
        ("fsfreeze", "util-linux"),
        ("mount", "mount"),
        ("mkfs.ext4", "e2fsprogs"),
    ];
    let path = env::var_os("PATH").unwrap_or_default();
    let found = |tool: &str| env::split_paths(&path).any(|dir| dir.join(tool).is_file());
    let absent = tools.iter().find(|(tool, _)| !found(tool))?;
    Some(format!("there is no program `{}`: install the package {}", absent.0, absent.1))
}

/// A lab that is up. Dropping it removes it, unless it is to be kept.
pub struct Lab {
    /// The host on which the VM starts.
    pub a: Host,
    /// The other host.
    pub b: Host,
    wire: Option<Wire>,
    fixture: Arc<Fixture>,
    config: LabConfig,
}

impl Lab {
    /// Builds a lab. What a killed process left of an earlier one is removed first.
    ///
    /// # Errors
    /// If the names are in use (the error says by what, and what to do), or something cannot be made;
    /// then nothing is left of it.
    pub fn new(config: LabConfig) -> Result<Self> {
        if let Some(reason) = missing() {
            bail!("the lab cannot be made: {reason}");
        }
        let layout = Layout::new(&config.prefix, &config.cache_dir);
        let fixture = Fixture::build(layout, &config)?;
        let lifetime = if config.keep { Lifetime::Kept } else { Lifetime::WithUs };
        let host = |side| Host::new(side, &fixture, &config, lifetime);
        let mut lab =
            Self { a: host(Side::A), b: host(Side::B), wire: None, fixture: Arc::clone(&fixture), config };
        if let Some(wire) = lab.config.wire {
            lab.wire = Some(lab.interpose_wire(&wire)?);
        } else if lab.config.intruder {
            let network = lab.config.migration_network();
            lab.fixture.while_up(|| topology::admit_intruder(lab.layout(), network))?;
        }
        Ok(lab)
    }

    /// Names and paths.
    pub fn layout(&self) -> &Layout {
        self.fixture.layout()
    }

    /// How it was made.
    pub fn config(&self) -> &LabConfig {
        &self.config
    }

    /// Puts a switch between the migration NICs whose path takes packets of `path_mtu` at most. Agents and VMs must
    /// not have been started.
    ///
    /// # Errors
    /// If the cables cannot be changed.
    pub fn interpose_switch(&self, path_mtu: u32) -> Result<()> {
        let network = self.config.migration_network();
        self.fixture.while_up(|| topology::interpose_switch(self.layout(), network, path_mtu))
    }

    /// Puts a relay between the migration NICs. Agents and VMs must not have been started.
    fn interpose_wire(&self, wire: &WireConfig) -> Result<Wire> {
        let network = self.config.migration_network();
        self.fixture.while_up(|| {
            topology::lead_through_switch(self.layout(), network)?;
            Wire::start(self.layout(), network.mtu, wire)
        })
    }

    /// Takes huge pages of 2 MiB for guests' RAM from this machine until the lab is removed. Returns the directory for
    /// files in them, or `None` if the machine does not have so many to give.
    ///
    /// # Errors
    /// If the pool cannot be changed or mounted.
    pub fn take_huge_pages(&self, pages: u64) -> Result<Option<PathBuf>> {
        self.fixture.while_up(|| hugepages::take(self.layout(), pages))
    }

    /// Lets this machine, where it is itself virtual, keep what memory it frees until the lab is removed. `false` where it does
    /// so anyway.
    ///
    /// # Errors
    /// If the kernel does not let itself be told.
    pub fn keep_free_memory(&self) -> Result<bool> {
        self.fixture.while_up(|| reporting::stop(self.layout()))
    }

    /// The bad wire.
    ///
    /// # Errors
    /// If it has none: see [`LabConfig::wire`].
    pub fn wire(&self) -> Result<&Wire> {
        self.wire.as_ref().context("this lab's migration network is a cable, not a wire")
    }

    /// Starts a program in one of the lab's namespaces; what it prints is appended to `log`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(&self, name: &str, namespace: &str, argv: &[String], log: &Path) -> Result<Process> {
        self.fixture.while_up(|| Process::start(name, namespace, argv, log, Lifetime::WithUs))
    }

    /// A host.
    pub fn host(&self, side: Side) -> &Host {
        match side {
            Side::A => &self.a,
            Side::B => &self.b,
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Its ports go now.
        self.wire = None;
        let result = if self.config.keep { self.fixture.keep() } else { self.fixture.remove() };
        if let Err(error) = result {
            eprintln!("{error:#}");
        }
    }
}

/// Removes the lab of `prefix` that was kept or left by a killed process, and all other stale ones.
/// Returns the first namespace of each lab removed.
///
/// # Errors
/// If it is in use, or cannot be removed.
pub fn clean(prefix: &str) -> Result<Vec<String>> {
    fixture::clean(prefix)
}
