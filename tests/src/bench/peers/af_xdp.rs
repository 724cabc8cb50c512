//! A bare pair of AF_XDP sockets on the migration network: the same frames as a migration's in the same kernel path, and nothing else. No page is
//! read or placed, nothing is encrypted, lost frames stay lost.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use migrate_common::PAGE_SIZE;
use migrate_common::wire::{FrameHeader, FrameKind, HEADER_LEN, MAGIC, SESSION_OFFSET, VERSION};
use rustix::event::{EventfdFlags, eventfd};
use xferry::datapath::FrameLayout;
use xferry::network::{Bouncer, Mac, Nic};
use xferry::xsk::{BindMode, CHUNK_SIZE, RxQueue, Socket, SocketConfig, TxQueue};

use crate::bench::figures::MIB;
use crate::bench::results::Rate;
use crate::intruder::{End, Envelope, Form, Stream};
use crate::lab::plan::{MIGRATION_NIC, MIGRATION_PORT, PREFIX_LEN, Side};
use crate::lab::{Lab, netns};
use crate::scenario::{link, mac};

/// How long it is measured.
const TIME: Duration = Duration::from_secs(3);
/// Frames on their way at most: a veth's queue holds 256, and drops what comes then.
const WINDOW: u64 = 200;
/// Silence after which frames on their way are taken for lost.
const STALL: Duration = Duration::from_millis(20);
/// Frames between two calls of the kernel.
const BATCH: u64 = 32;
/// Receive buffers, 16 MiB, as an agent has.
const RX_CHUNKS: u32 = 4096;
/// Bytes of frames that wait to be sent, as an agent has.
const TX_BYTES: usize = 4 << 20;
/// Number of the pair's session; any would do.
const SESSION: u64 = 0x5a5a;
const SOURCE_PORT: u16 = 50_000;

/// One end: the socket's halves, and what must live as long as they.
struct Port {
    tx: TxQueue,
    rx: RxQueue,
    _socket: Socket,
    _bouncer: Bouncer,
}

/// Page content that one queue carries.
pub(in crate::bench) fn measure(lab: &Lab) -> Result<Rate> {
    let frame = frame(lab)?;
    let (mut from, to) = (open(lab, Side::A, &frame)?, open(lab, Side::B, &frame)?);
    lay_out(&mut from.tx, &frame.bytes);
    let received = Arc::new(AtomicU64::new(0));
    let over = Arc::new(AtomicBool::new(false));
    let receiver = {
        let (received, over) = (Arc::clone(&received), Arc::clone(&over));
        // Opened here and moved there: a socket stays in the namespace where it was made.
        thread::spawn(move || receive(to, frame_len_min(frame.pages), &received, &over))
    };
    let begun = Instant::now();
    let sent = send(&mut from.tx, frame.bytes.len(), &received);
    let (arrived, elapsed) = (received.load(Ordering::Relaxed), begun.elapsed());
    over.store(true, Ordering::Relaxed);
    receiver.join().map_err(|_| anyhow!("the receiver panicked"))??;
    sent?;
    ensure!(arrived > 0, "no frame of the bare AF_XDP pair arrived");
    let bytes = arrived as f64 * (frame.pages * PAGE_SIZE) as f64;
    Ok(Rate::new("bare AF_XDP pair", bytes / MIB / elapsed.as_secs_f64()))
}

/// What is sent over and over.
struct Whole {
    bytes: Vec<u8>,
    pages: usize,
}

/// Least length that a frame of so many pages has: shorter ones do not count.
fn frame_len_min(pages: usize) -> usize {
    pages * PAGE_SIZE
}

/// A frame as full of pages as the network's MTU lets it be.
fn frame(lab: &Lab) -> Result<Whole> {
    let ends = [end(lab, Side::A)?, end(lab, Side::B)?];
    let layout = FrameLayout::new(lab.config().mtu as usize, false, false)?;
    let pages = layout.pages_per_frame;
    ensure!(pages > 0, "an MTU of {} carries no whole page", lab.config().mtu);
    let mut header = [0; HEADER_LEN];
    header[..4].copy_from_slice(&MAGIC);
    (header[4], header[5]) = (VERSION, FrameKind::Pages as u8);
    header[SESSION_OFFSET..SESSION_OFFSET + 8].copy_from_slice(&SESSION.to_le_bytes());
    let stream = Stream { header: FrameHeader::parse(&header)? };
    let numbers: Vec<u64> = (0..pages as u64).collect();
    let payload = stream.pages(&numbers, 0x5a, 0);
    let envelope =
        Envelope { from: ends[0], to: ends[1], ports: (SOURCE_PORT, MIGRATION_PORT), form: Form::Plain };
    Ok(Whole { bytes: envelope.wrap(&payload), pages })
}

fn end(lab: &Lab, side: Side) -> Result<End> {
    let mac = mac(&lab.host(side).namespace(), MIGRATION_NIC)?;
    Ok(End { mac, ip: IpAddr::V4(side.migration_ip()) })
}

/// A socket on the first queue of a host's migration NIC, behind the product's own XDP program.
fn open(lab: &Lab, side: Side, frame: &Whole) -> Result<Port> {
    let chunks = frame.bytes.len().div_ceil(CHUNK_SIZE) as u32;
    let namespace = lab.host(side).namespace();
    // Not read there: a thread that enters a network namespace keeps its `/sys`.
    let index = link(&namespace, MIGRATION_NIC)?["ifindex"].as_u64().context("a NIC without index")?;
    let nic = Nic {
        name: MIGRATION_NIC.to_owned(),
        index: index as u32,
        mac: Mac(mac(&namespace, MIGRATION_NIC)?),
        mtu: lab.config().mtu as usize,
        queues: lab.config().queues,
        addresses: vec![(side.migration_ip().into(), PREFIX_LEN)],
    };
    netns::inside(&namespace, || {
        let mut bouncer = Bouncer::attach(&nic, MIGRATION_PORT)?;
        let config = SocketConfig {
            interface: nic.name.clone(),
            ifindex: nic.index,
            queue: 0,
            rx_chunks: RX_CHUNKS,
            tx_slots: (TX_BYTES / frame.bytes.len()).clamp(64, 512) as u32,
            tx_slot_chunks: chunks,
        };
        let (socket, tx, rx) = Socket::open(&config, &BindMode::LADDER)?;
        bouncer.register_socket(0, socket.fd())?;
        bouncer.admit(SESSION, side.other().migration_ip().into())?;
        Ok(Port { tx, rx, _socket: socket, _bouncer: bouncer })
    })
    .with_context(|| format!("opening AF_XDP on {side}"))
}

/// Writes the frame into every place that is sent from: sending then copies nothing.
fn lay_out(tx: &mut TxQueue, frame: &[u8]) {
    let mut slots = Vec::new();
    while let Some(mut slot) = tx.slot() {
        tx.bytes(&mut slot)[..frame.len()].copy_from_slice(frame);
        slots.push(slot);
    }
    slots.into_iter().for_each(|slot| tx.discard(slot));
}

fn send(tx: &mut TxQueue, len: usize, received: &AtomicU64) -> Result<()> {
    let begun = Instant::now();
    let (mut sent, mut lost, mut seen, mut heard) = (0_u64, 0_u64, 0_u64, begun);
    while begun.elapsed() < TIME {
        let arrived = received.load(Ordering::Relaxed);
        if arrived != seen {
            (seen, heard) = (arrived, Instant::now());
        } else if heard.elapsed() > STALL {
            lost = sent - seen;
            heard = Instant::now();
        }
        let room = (WINDOW + arrived + lost).saturating_sub(sent).min(BATCH);
        if room == 0 {
            thread::yield_now();
        }
        for _ in 0..room {
            let Some(slot) = tx.slot() else { break };
            if let Err(slot) = tx.send(slot, len) {
                tx.discard(slot);
                break;
            }
            sent += 1;
        }
        tx.kick().context("sending by AF_XDP")?;
    }
    Ok(())
}

fn receive(mut port: Port, least: usize, received: &AtomicU64, over: &AtomicBool) -> Result<()> {
    let never: OwnedFd = eventfd(0, EventfdFlags::CLOEXEC).context("making an eventfd")?;
    while !over.load(Ordering::Relaxed) {
        let mut whole = 0;
        let frames = port.rx.receive(BATCH as usize, |packet| {
            let len: usize = packet.pieces().iter().map(|piece| piece.len()).sum();
            whole += u64::from(len >= least);
        });
        received.fetch_add(whole, Ordering::Relaxed);
        if frames == 0 {
            port.rx.wait(&never, 1).context("waiting for frames")?;
        }
    }
    Ok(())
}
