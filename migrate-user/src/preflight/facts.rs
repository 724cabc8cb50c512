//! What is compared. Plain data: collecting it is elsewhere.

use serde::{Deserialize, Serialize};

use crate::{
    memory::Backend,
    network::{Mac, Transport},
    vmm::{Disk, MachineFacts},
};

/// The source's side, as it goes to the destination.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SourceFacts {
    /// The host.
    pub host: HostFacts,
    /// The machine that runs the VM.
    pub machine: MachineFacts,
    /// Its process.
    pub pid: u32,
    /// What its RAM lies in, one for each backend; empty when RAM is in no files.
    pub backing: Vec<Backing>,
    /// Its images, one for each disk.
    pub images: Vec<ImageFacts>,
}

/// The destination's side.
#[derive(Clone, Debug)]
pub struct DestinationFacts {
    /// The host.
    pub host: HostFacts,
    /// The machine that waits.
    pub machine: MachineFacts,
    /// Its process.
    pub pid: u32,
    /// What its RAM lies in, or why that cannot be used.
    pub backing: Result<Vec<Backing>, String>,
    /// Whether QEMU has claimed the huge pages that it may need.
    pub reserved: bool,
    /// Bytes that each backend needs now.
    pub needed: Vec<u64>,
    /// Its images, one for each disk, read where the source read.
    pub images: Vec<ImageFacts>,
    /// Where each of the VM's NICs would be announced.
    pub uplinks: Vec<Uplink>,
}

/// A host, whatever VM it is about.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct HostFacts {
    /// Name of its agent.
    pub name: String,
    /// Version of its agent.
    pub software: String,
    /// Random number of this boot of its kernel: equal for two agents on one machine.
    pub boot_id: String,
    /// Whether its processor can run a guest's TSC at another frequency than its own.
    pub tsc_scaling: bool,
    /// Memory that can be had without swapping (`MemAvailable`), bytes.
    pub available: Option<u64>,
    /// Pools of huge pages.
    pub huge_pools: Vec<HugePool>,
    /// The migration NIC.
    pub nic: NicFacts,
}

/// A pool of huge pages (Documentation/admin-guide/mm/hugetlbpage.rst of the kernel).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct HugePool {
    /// Size of a page, bytes.
    pub page_size: u64,
    /// Pages that are in no use.
    pub free: u64,
    /// Those of them that are promised to somebody.
    pub promised: u64,
}

/// A migration NIC in use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct NicFacts {
    /// Name.
    pub name: String,
    /// Largest IP packet, bytes.
    pub mtu: usize,
    /// AF_XDP or UDP sockets.
    #[serde(default)]
    pub transport: Transport,
    /// Why it is not AF_XDP though that was wanted.
    #[serde(default)]
    pub fallback: Option<String>,
    /// How the XDP program is attached: driver or generic; none where there is none.
    pub xdp_mode: String,
    /// Whether the driver works on the UMEM itself.
    pub zero_copy: bool,
    /// Whether frames may span several buffers.
    pub multi_buffer: bool,
    /// Sockets that receive.
    pub queues: usize,
}

/// What one memory backend lies in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Backing {
    /// File.
    pub path: String,
    /// Kind of file system: `tmpfs`, `hugetlbfs`, or the number of another.
    pub file_system: String,
    /// Size of its pages, bytes.
    pub page_size: u64,
    /// The mount's `huge=` option, which makes tmpfs use huge pages by itself; empty when off.
    pub transparent_huge: String,
    /// Room, as its host sees it now.
    pub room: Room,
}

/// Room in a file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Room {
    /// Number of the file system (`st_dev`).
    pub device: u64,
    /// Free bytes; `None` without a limit.
    pub free: Option<u64>,
    /// Bytes that the file has already.
    pub taken: u64,
}

/// An image as a host reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageFacts {
    /// Device and inode numbers; the same on both sides of one machine only for the same file.
    pub inode: Option<(u64, u64)>,
    /// Hashes of some blocks, where the image is a file or a block device.
    pub samples: Vec<Sample>,
    /// Why it could not be read.
    pub unread: Option<String>,
    /// Other processes of this host that have it open for writing, as `name (pid)`, with the pid.
    pub writers: Vec<(u32, String)>,
}

/// The hash of a block of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Where it is, bytes.
    pub offset: u64,
    /// xxh3-64 of its content; `None` for a block of zeros, or none at all.
    pub hash: Option<u64>,
}

/// Where a NIC would be announced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    /// Ethernet address.
    pub mac: Mac,
    /// The interface, by the definition or found through the bridge.
    pub interface: Option<String>,
    /// Whether there is such an interface.
    pub exists: bool,
}

/// The destination's rules about VMs that arrive, and how it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Admission {
    /// VMs that may arrive at once.
    pub max_arriving: Option<u32>,
    /// Those that do, without this one.
    pub arriving: Vec<String>,
    /// Whether this very VM is arriving already.
    pub same: bool,
    /// Memory that stays with the host, bytes.
    pub headroom: u64,
    /// Memory that arriving VMs will still take, bytes.
    pub promised: u64,
}

impl SourceFacts {
    /// Size of the guest's RAM, bytes.
    pub fn ram(&self) -> u64 {
        self.machine.backends.iter().map(|backend: &Backend| backend.size).sum()
    }

    /// The images that belong to `disks` of another host, in their order; nothing where there is none.
    pub fn images_for(&self, disks: &[Disk]) -> Vec<ImageFacts> {
        let image = |disk: &Disk| {
            let own = self.disks().find(|(own, _)| own.device == disk.device);
            own.map(|(_, image)| image.clone()).unwrap_or_default()
        };
        disks.iter().map(image).collect()
    }

    /// Disks with what is known of their images.
    pub fn disks(&self) -> impl Iterator<Item = (&Disk, &ImageFacts)> {
        self.machine.disks.iter().zip(&self.images)
    }
}
