//! The demo's command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use crate::guest::GuestKind;
use crate::lab::Accel;
use crate::wire::WireConfig;

/// Moves a running VM from one host to another and back, and shows what its users notice.
///
/// Needs root: the hosts are network namespaces of this machine. Everything is removed at the end.
#[derive(Clone, Debug, Parser)]
#[command(name = "demo", version)]
pub struct Args {
    /// The guest: a Linux with network and disk, or a bare-metal program that runs natively under KVM
    #[arg(long, value_enum, default_value_t = Guest::Linux)]
    pub guest: Guest,

    /// RAM of the VM in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512, value_parser = clap::value_parser!(u64).range(64..))]
    pub memory: u64,

    /// How much of its RAM the guest keeps writing to, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..))]
    pub working_set: u64,

    /// Pages the guest dirties per second [default: 2000 if it runs under tcg, else 5000]
    #[arg(long, value_name = "PAGES/S")]
    pub rate: Option<u64>,

    /// How the guest's instructions run; auto takes kvm where the guest really runs on it
    #[arg(long, value_enum, default_value_t = AccelChoice::Auto)]
    pub accel: AccelChoice,

    /// MTU of the migration network in bytes
    #[arg(long, default_value_t = 9000, value_parser = clap::value_parser!(u32).range(1500..=65535))]
    pub mtu: u32,

    /// Queues of the migration NICs
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub queues: u32,

    /// By what frames get on and off the migration NICs; udp-a and udp-b are host-a or host-b alone
    #[arg(long, value_enum, default_value_t = Transports::AfXdp)]
    pub transport: Transports,

    /// IPv6 on the migration network
    #[arg(long)]
    pub ipv6: bool,

    /// What is wrong with the migration network: loss=1%,burst=1%x8,reorder=1%,dup=1%,corrupt=1%,delay=2ms,rate=100
    /// (MiB/s),queue=64 (frames),seed=7,only=a-b; any of them
    #[arg(long, value_name = "FAULTS", conflicts_with = "keep")]
    pub wire: Option<WireConfig>,

    /// The Linux guest reads its disk as hard as it can, and QEMU reads it with O_DIRECT
    #[arg(long)]
    pub disk_load: bool,

    /// How often the VM goes there and back
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub repeat: u32,

    /// How the RAM of both sides is compared while the VM is stopped
    #[arg(long, value_enum, default_value_t = Verify::Hash)]
    pub verify: Verify,

    /// Write all reports and checks to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// Leave the lab up, and say how to look into it
    #[arg(long)]
    pub keep: bool,

    /// Remove a lab that was left up, and do nothing else
    #[arg(long)]
    pub clean: bool,

    /// The xferry program [default: $XFERRY_BIN, else target/release/xferry]
    #[arg(long, value_name = "PATH")]
    pub xferry: Option<PathBuf>,

    /// What the namespaces' names start with
    #[arg(long, default_value = "", hide = true)]
    pub prefix: String,
}

/// `--guest`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Guest {
    /// Debian's cloud kernel with a small initrd.
    Linux,
    /// A bare-metal program.
    Bare,
}

impl From<Guest> for GuestKind {
    fn from(guest: Guest) -> Self {
        match guest {
            Guest::Linux => Self::Linux,
            Guest::Bare => Self::Bare,
        }
    }
}

/// `--accel`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AccelChoice {
    /// Find out.
    Auto,
    /// The processor.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl AccelChoice {
    /// The accelerator, if it was chosen.
    pub fn chosen(self) -> Option<Accel> {
        match self {
            Self::Auto => None,
            Self::Kvm => Some(Accel::Kvm),
            Self::Tcg => Some(Accel::Tcg),
        }
    }
}

/// `--transport`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Transports {
    /// AF_XDP on both hosts.
    AfXdp,
    /// UDP sockets on host-a.
    UdpA,
    /// UDP sockets on host-b.
    UdpB,
    /// UDP sockets on both.
    Udp,
}

impl Transports {
    /// `[migration] transport` of host-a and host-b.
    pub const fn each(self) -> [&'static str; 2] {
        match self {
            Self::AfXdp => ["af-xdp", "af-xdp"],
            Self::UdpA => ["udp", "af-xdp"],
            Self::UdpB => ["af-xdp", "udp"],
            Self::Udp => ["udp", "udp"],
        }
    }
}

/// `--verify`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Verify {
    /// By a digest of all RAM.
    Hash,
    /// Byte by byte.
    Full,
}

impl Verify {
    /// The option that `xferry migrate` is given.
    pub const fn option(self) -> &'static str {
        match self {
            Self::Hash => "--verify=hash",
            Self::Full => "--verify=full",
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn command_line_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn defaults_are_those_of_the_readme() {
        let args = Args::parse_from(["demo"]);
        assert_eq!((args.memory, args.working_set, args.mtu, args.repeat), (512, 64, 9000, 1));
        assert_eq!(args.transport.each(), ["af-xdp", "af-xdp"]);
        let mixed = Args::parse_from(["demo", "--transport", "udp-b", "--ipv6"]);
        assert_eq!((mixed.transport.each(), mixed.ipv6), (["af-xdp", "udp"], true));
        assert!(Args::try_parse_from(["demo", "--mtu", "1400"]).is_err());
        assert!(Args::try_parse_from(["demo", "--wire", "loss=1%,reorder=0.5%"]).is_ok());
        assert!(Args::try_parse_from(["demo", "--wire", "loss=200%"]).is_err());
    }
}
