//! What encryption costs: the page stream's sealing in memory by one core, and whole migrations by cipher.

use std::{fs, time::Instant};

use anyhow::{Context, Result};
use migrate_common::wire::{DESCRIPTOR_LEN, FrameHeader, FrameKind, Guard, HEADER_LEN, TAG_LEN};
use xferry::datapath::{Cipher, Datagram, FramePath, Opener, Protection, Sealer, Secret};

use super::{Figures, table::median};
use crate::lab::Host;

/// Bytes that each measurement in memory seals and opens.
const SEALED: usize = 2 << 30;
/// Clock ticks of `/proc/PID/stat` in a second (`USER_HZ`, 100 on every Linux that this runs on).
const TICKS: f64 = 100.0;

/// A way of guarding frames: its name and the agent's settings for it.
pub(super) struct Guarding {
    pub name: &'static str,
    pub settings: &'static str,
    cipher: Option<Cipher>,
}

/// All of them; the first is what the others are compared with.
pub(super) const ALL: [Guarding; 4] = [
    Guarding { name: "CRC32C (off)", settings: "encryption = \"off\"", cipher: None },
    Guarding {
        name: "aes-128-gcm",
        settings: "ciphers = [\"aes-128-gcm\"]",
        cipher: Some(Cipher::Aes128Gcm),
    },
    Guarding {
        name: "aes-256-gcm",
        settings: "ciphers = [\"aes-256-gcm\"]",
        cipher: Some(Cipher::Aes256Gcm),
    },
    Guarding {
        name: "chacha20-poly1305",
        settings: "ciphers = [\"chacha20-poly1305\"]",
        cipher: Some(Cipher::ChaCha20Poly1305),
    },
];

/// One migration, and what the agents worked for it.
pub(super) struct Cost {
    pub figures: Figures,
    /// Processor time of the agents of source and destination, s.
    pub cpu: [f64; 2],
}

/// Prints what one core seals and opens, in frames of `pages` whole pages.
pub(super) fn in_memory(pages: usize) -> Result<()> {
    println!("in memory, one core, frames of {pages} pages, GiB/s:");
    for guarding in &ALL {
        let (sealed, opened) = rates(guarding, pages)?;
        println!("  {:<18} completing {sealed:>6.2}   checking {opened:>6.2}", guarding.name);
    }
    Ok(())
}

fn rates(guarding: &Guarding, pages: usize) -> Result<(f64, f64)> {
    let secret = Secret::new([7; 32]);
    let protection = Protection::agreed(guarding.cipher, Some(&secret), 1)?;
    // The guard's cost alone: no headers of the network.
    let path = FramePath::bare();
    let payload = pages * migrate_common::PAGE_SIZE;
    let mut buffer = vec![0xa5; HEADER_LEN + pages * DESCRIPTOR_LEN + payload + TAG_LEN];
    let header = |sequence| FrameHeader {
        kind: FrameKind::Pages,
        descriptors: pages as u16,
        session: 1,
        epoch: 1,
        lane: 0,
        sequence,
        guard: Guard::Checksum,
        payload: payload as u32,
        checksum: 0,
    };
    let rounds = (SEALED / payload) as u32;
    let gib = f64::from(rounds) * payload as f64 / f64::from(1 << 30);
    let mut sealer = Sealer::new(protection.clone());
    let begun = Instant::now();
    let mut len = 0;
    for sequence in 0..rounds {
        len = sealer.complete(&mut buffer, &path, header(sequence))?;
    }
    let sealed = gib / begun.elapsed().as_secs_f64();
    // As a NIC leaves a frame: in buffers of 4 KiB less the kernel's 256 bytes.
    let pieces: Vec<&[u8]> = buffer[..len].chunks(4096 - 256).collect();
    let datagram = Datagram::bare(&pieces);
    let mut opener = Opener::new(protection);
    let begun = Instant::now();
    for _ in 0..rounds {
        let header = datagram.header()?;
        let opened = opener.open(&datagram, header, |frame| std::hint::black_box(frame.descriptors().len()));
        opened.ok().context("a frame does not open")?;
    }
    Ok((sealed, gib / begun.elapsed().as_secs_f64()))
}

/// Processor time that the agent of a host has used, s.
pub(super) fn agent_cpu(host: &Host) -> Result<f64> {
    let pid = host.agent_pid().context("no agent runs")?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Fields 14 and 15, counted from behind the name (proc_pid_stat(5)).
    let behind = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks = behind.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<f64>().ok());
    Ok(ticks.sum::<f64>() / TICKS)
}

/// Prints the migrations, medians by way of guarding.
pub(super) fn print(costs: &[Vec<Cost>]) {
    println!(
        "\n{:<18} {:>9} {:>9} {:>12} {:>12} {:>14} {:>12}",
        "", "total ms", "ratio", "round 0 MiB/s", "blackout ms", "source CPU s", "dest. CPU s"
    );
    let of = |costs: &[Cost], of: &dyn Fn(&Cost) -> f64| median(costs.iter().map(of).collect());
    let total = |cost: &Cost| cost.figures.total_ms;
    let first = costs.first().map_or(f64::NAN, |costs| of(costs, &total));
    for (guarding, costs) in ALL.iter().zip(costs) {
        println!(
            "{:<18} {:>9.0} {:>9.2} {:>12.0} {:>12.1} {:>14.2} {:>12.2}",
            guarding.name,
            of(costs, &total),
            of(costs, &total) / first,
            of(costs, &|cost| cost.figures.rate_mib.unwrap_or(f64::NAN)),
            of(costs, &|cost| cost.figures.downtime_ms),
            of(costs, &|cost| cost.cpu[0]),
            of(costs, &|cost| cost.cpu[1]),
        );
    }
}
