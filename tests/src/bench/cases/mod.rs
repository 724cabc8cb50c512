//! What is measured, in the order of importance: a run that is cut off has the first of it.

mod blackout;
mod ciphers;
mod compression;
mod cores;
mod dirtying;
mod encryption;
mod flat_out;
mod hugetlbfs;
mod jumbo;
mod knobs;
mod memcpy;
mod random;
mod size;
mod transports;
mod verify;

use anyhow::Result;

use super::figures::Figures;
use super::guests::Guest;
use super::peers::{Mover, Qemu, Xferry};
use super::results::{Outcome, Rate};
use super::session::Session;

/// When a case is measured without being asked for by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// Always.
    Quick,
    /// In a whole run.
    Whole,
    /// Never.
    ByName,
}

impl When {
    pub fn includes(self, quick: bool) -> bool {
        self == Self::Quick || (self == Self::Whole && !quick)
    }
}

/// A part of the benchmark.
pub(super) struct Case {
    /// For `--only`.
    pub name: &'static str,
    /// In one line.
    pub about: &'static str,
    pub when: When,
    pub run: fn(&mut Session<'_>, &mut Outcome) -> Result<()>,
}

/// All there are.
pub(super) const ALL: &[Case] = &[
    Case {
        name: "random",
        about: "the usual guest, full of random data: xferry, QEMU, iperf3, a bare AF_XDP pair",
        when: When::Quick,
        run: random::run,
    },
    Case {
        name: "encryption",
        about: "encrypted beside encrypted, plain beside plain; tmpfs without huge pages, and with",
        when: When::Quick,
        run: encryption::run,
    },
    Case {
        name: "blackout",
        about: "the usual guest there and back, many cutovers",
        when: When::Quick,
        run: blackout::run,
    },
    Case {
        name: "verify",
        about: "the usual guest, with all RAM compared afterwards: --verify, --verify=full",
        when: When::Quick,
        run: verify::run,
    },
    Case {
        name: "dirtying",
        about: "idle, 5,000, 20,000, 100,000 pages/s: xferry and QEMU",
        when: When::Quick,
        run: dirtying::run,
    },
    Case {
        name: "sparse",
        about: "16 GiB of which as much was touched as of the usual guest",
        when: When::Quick,
        run: size::sparse,
    },
    Case {
        name: "shaped",
        about: "compressible guest over 1 Gbit/s: xferry, QEMU multifd with zstd",
        when: When::Quick,
        run: compression::shaped,
    },
    Case {
        name: "jumbo",
        about: "MTU 65535: xferry, iperf3, a bare AF_XDP pair",
        when: When::Quick,
        run: jumbo::run,
    },
    Case {
        name: "flat-out",
        about: "native guest that writes as fast as it can, throttled (--auto-converge)",
        when: When::Quick,
        run: flat_out::native,
    },
    Case {
        name: "cores",
        about: "what one core does in memory, as the last `cargo bench` found it",
        when: When::Quick,
        run: cores::run,
    },
    Case { name: "memcpy", about: "what one core copies", when: When::Quick, run: memcpy::run },
    Case {
        name: "sizes",
        about: "guests of 256 MiB to 2 GiB, and 4 GiB mostly untouched",
        when: When::Whole,
        run: size::sizes,
    },
    Case {
        name: "hugetlbfs",
        about: "guests in huge pages: idle, 5,000, 20,000, 100,000 pages/s, flat out",
        when: When::Whole,
        run: hugetlbfs::run,
    },
    Case {
        name: "compressible",
        about: "compressible guest on the fast link: compression chosen, and none",
        when: When::Whole,
        run: compression::fast,
    },
    Case {
        name: "flat-out-linux",
        about: "a translated Linux that writes as fast as it can, throttled (--auto-converge)",
        when: When::Whole,
        run: flat_out::linux,
    },
    Case {
        name: "ciphers",
        about: "what each way of guarding pages costs",
        when: When::ByName,
        run: ciphers::run,
    },
    Case {
        name: "codecs",
        about: "compressible guest over 1 Gbit/s, by way of packing",
        when: When::ByName,
        run: compression::codecs,
    },
    Case {
        name: "transports",
        about: "AF_XDP and UDP sockets at either end",
        when: When::ByName,
        run: transports::run,
    },
    Case {
        name: "knobs",
        about: "settings of the kernel at the receiving NIC, by AF_XDP; a processor for each host",
        when: When::ByName,
        run: knobs::run,
    },
];

/// xferry as installed.
fn ours() -> Mover {
    Mover::Xferry(Xferry::DEFAULT)
}

/// All of QEMU's ways without compression.
fn qemus() -> Vec<Mover> {
    Qemu::ALL.map(Mover::Qemu).into()
}

fn total(figures: &Figures) -> f64 {
    figures.total_ms
}

fn blackout_of(figures: &Figures) -> f64 {
    figures.blackout_ms
}

fn pre_copy(figures: &Figures) -> f64 {
    figures.pre_copy_mib_s.unwrap_or(f64::NAN)
}

/// More memory of its own than the other agent's.
fn agent_mib(figures: &Figures) -> f64 {
    figures.agent_bytes[0].max(figures.agent_bytes[1]) as f64 / super::figures::MIB
}

/// Memory that an agent may have of its own for a guest, MiB: 64 MiB and so many bytes for each page of 4 KiB.
fn agent_limit(guest: &Guest, bytes_per_page: u64) -> f64 {
    // 256 pages a MiB.
    64.0 + (guest.memory * 256 * bytes_per_page) as f64 / super::figures::MIB
}

/// The highest.
fn best(rates: &[Rate]) -> Option<&Rate> {
    rates.iter().max_by(|one, other| one.mib_s.total_cmp(&other.mib_s))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_one_case_each() {
        let names: BTreeSet<_> = ALL.iter().map(|case| case.name).collect();
        assert_eq!(names.len(), ALL.len());
    }

    #[test]
    fn an_agent_of_a_gibibyte_may_have_66_mib() {
        let guest = Guest {
            kind: crate::guest::GuestKind::Bare,
            memory: 1024,
            area: 900,
            rate: crate::guest::Rate::Max,
            fill: crate::guest::Fill::None,
            backing: crate::bench::guests::Backing::Tmpfs,
        };
        assert!((agent_limit(&guest, 8) - 66.0).abs() < 1e-9);
    }

    #[test]
    fn the_best_is_the_fastest() {
        let rates = [Rate::new("one", 3.0), Rate::new("other", 5.0)];
        assert_eq!(best(&rates).unwrap().name, "other");
        assert!(best(&[]).is_none());
    }
}
