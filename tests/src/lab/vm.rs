//! The VM: how QEMU is started, the same on both hosts except for paths, and what the agents are
//! told about it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;

use super::layout::Layout;
use super::plan::{Side, TAP, UPLINK, VM_MAC, VM_NAME};

/// How the guest's instructions are executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// By the processor.
    Kvm,
    /// By QEMU's translator.
    Tcg,
}

impl Accel {
    /// QEMU's name for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// The disk both hosts reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    /// Through the page cache.
    Cached,
    /// With `O_DIRECT` (`cache.direct=on`): its reads write guest RAM by DMA.
    Direct,
}

/// What a VM is made of.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// How it runs.
    pub accel: Accel,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Kernel image or PVH ELF.
    pub kernel: PathBuf,
    /// Initial RAM disk, if the guest has one.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub append: String,
    /// The shared disk, if the guest has one.
    pub disk: Option<Disk>,
    /// More arguments for QEMU.
    pub extra: Vec<String>,
}

/// Files of the VM on one host.
#[derive(Clone, Debug)]
pub struct VmPaths {
    /// The agent's QMP socket.
    pub qmp: PathBuf,
    /// A second QMP socket for the lab, because a QMP socket serves one client at a time.
    pub lab_qmp: PathBuf,
    /// What the guest prints; every start appends.
    pub serial: PathBuf,
    /// The file that is its RAM.
    pub ram: PathBuf,
    /// The shared disk.
    pub disk: PathBuf,
}

impl VmPaths {
    /// The paths on host `side`.
    pub fn new(layout: &Layout, side: Side) -> Self {
        let dir = layout.host_dir(side);
        Self {
            qmp: dir.join("demo.qmp"),
            lab_qmp: dir.join("demo-lab.qmp"),
            serial: dir.join("serial.log"),
            ram: layout.ram_file(side),
            disk: layout.disk().to_owned(),
        }
    }
}

impl VmConfig {
    /// The QEMU command that runs this VM with `paths`.
    pub fn command(&self, paths: &VmPaths) -> Vec<String> {
        let mut argv = Argv(vec!["qemu-system-x86_64".to_owned()]);
        argv.option("-name", VM_NAME);
        argv.option("-machine", "q35,memory-backend=ram");
        argv.option("-accel", self.accel.name());
        if self.accel == Accel::Kvm {
            argv.option("-cpu", "host,-arch-capabilities");
        }
        argv.option("-smp", "1");
        let mib = self.memory_mib;
        argv.option("-m", format!("{mib}M"));
        let ram = paths.ram.display();
        // Mapped at a multiple of 2 MiB: elsewhere no fault of QEMU or its guest gets a huge page of tmpfs
        // (`shmem_suitable_orders`, mm/shmem.c).
        let backend = format!("memory-backend-file,id=ram,size={mib}M,mem-path={ram},share=on,align=2M");
        argv.option("-object", backend);
        argv.flag("-nodefaults");
        argv.option("-vga", "none");
        argv.option("-display", "none");
        argv.flag("-no-reboot");
        // Appending, not `-serial file:`, which would cut off what the guest printed on its first visit.
        argv.option("-chardev", format!("file,id=s0,path={},append=on", paths.serial.display()));
        argv.option("-serial", "chardev:s0");
        for socket in [&paths.qmp, &paths.lab_qmp] {
            argv.option("-qmp", format!("unix:{},server=on,wait=off", socket.display()));
        }
        argv.option("-netdev", format!("tap,id=n0,ifname={TAP},script=no,downscript=no"));
        argv.option("-device", format!("virtio-net-pci,netdev=n0,mac={VM_MAC},romfile="));
        if let Some(disk) = self.disk {
            // Both hosts share this machine's page cache: dropping it at the cutover, as QEMU does when hosts
            // have one each, would throw away the other one's too and takes 0.3 ms per MiB.
            let cache = if disk == Disk::Direct { "cache.direct=on" } else { "file.drop-cache=off" };
            argv.option("-drive", format!("file={},format=raw,if=none,id=d0,{cache}", paths.disk.display()));
            argv.option("-device", "virtio-blk-pci,drive=d0");
        }
        argv.option("-kernel", self.kernel.display().to_string());
        if let Some(initrd) = &self.initrd {
            argv.option("-initrd", initrd.display().to_string());
        }
        if !self.append.is_empty() {
            argv.option("-append", self.append.as_str());
        }
        argv.0.extend(self.extra.iter().cloned());
        argv.0
    }

    /// The definition (TOML) that a host's agent reads: how it starts this VM, and what to announce.
    ///
    /// # Errors
    /// If it cannot be encoded.
    pub fn definition(&self, paths: &VmPaths) -> Result<String> {
        definition(paths, Some(&self.command(paths)))
    }
}

/// The definition (TOML) of the VM with `paths`: started by `command`, or, without one, by somebody else.
pub(super) fn definition(paths: &VmPaths, command: Option<&[String]>) -> Result<String> {
    let nics = [Nic { mac: VM_MAC, announce_on: UPLINK }];
    let definition = Definition { name: VM_NAME, qmp: &paths.qmp, command, nics };
    toml::to_string(&definition).context("encoding the VM's definition")
}

#[derive(Serialize)]
struct Definition<'a> {
    name: &'a str,
    qmp: &'a Path,
    #[serde(skip_serializing_if = "Option::is_none")]
    command: Option<&'a [String]>,
    nics: [Nic<'a>; 1],
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Nic<'a> {
    mac: &'a str,
    announce_on: &'a str,
}

/// A command line under construction.
struct Argv(Vec<String>);

impl Argv {
    fn flag(&mut self, name: &str) {
        self.0.push(name.to_owned());
    }

    fn option(&mut self, name: &str, value: impl Into<String>) {
        self.0.extend([name.to_owned(), value.into()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        VmConfig {
            accel: Accel::Kvm,
            memory_mib: 256,
            kernel: "/k".into(),
            initrd: None,
            append: "rate=1 \"quoted\"".into(),
            disk: Some(Disk::Direct),
            extra: vec![],
        }
    }

    fn paths(side: Side) -> VmPaths {
        VmPaths::new(&Layout::new("x-", Path::new("/cache")), side)
    }

    #[test]
    fn hosts_differ_only_in_paths() {
        let (a, b) = (config().command(&paths(Side::A)), config().command(&paths(Side::B)));
        assert_eq!(a.len(), b.len());
        for (one, other) in a.iter().zip(&b) {
            assert_eq!(one.replace("host-a", "host-b"), *other);
        }
    }

    #[test]
    fn definition_survives_quotes() {
        let paths = paths(Side::A);
        let text = config().definition(&paths).unwrap();
        let parsed: toml::Table = text.parse().unwrap();
        assert_eq!(parsed["name"].as_str(), Some("demo"));
        assert_eq!(parsed["nics"][0]["announce-on"].as_str(), Some("uplink0"));
        let command: Vec<&str> =
            parsed["command"].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
        assert_eq!(command, config().command(&paths));
    }

    #[test]
    fn definition_without_a_command_has_none() {
        let parsed: toml::Table = definition(&paths(Side::B), None).unwrap().parse().unwrap();
        assert!(!parsed.contains_key("command") && parsed.contains_key("nics"));
    }

    #[test]
    fn direct_disk_is_o_direct() {
        assert!(config().command(&paths(Side::A)).iter().any(|arg| arg.contains("cache.direct=on")));
    }
}
