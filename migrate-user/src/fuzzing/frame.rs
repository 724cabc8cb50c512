//! Frames of the page stream through the real receiver into a small guest.

#[cfg(test)]
mod mutants;
mod reference;

use std::{
    cell::RefCell,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use migrate_common::{
    PAGE_SIZE,
    locate::datagram,
    wire::{CHECKSUM_OFFSET, DESCRIPTOR_LEN, FrameHeader, HEADER_LEN},
};

use self::reference::{Reference, Sent};
use super::PORT;
use crate::{
    datapath::{
        Endpoint, Feedback, FeedbackTx, FrameLayout, FramePath, Inbound, InboundSpec, SessionReceiver,
        checked_frame,
    },
    memory::{Access, Backend, Mapping, RamLayout, Reservation},
    xsk::Packet,
};

/// Pages of each backend.
const PAGES: [u64; 2] = [3, 5];
/// Pages of each file behind its backend: whoever writes there wrote too far.
const BEYOND: u64 = 2;
/// Lanes of the page stream.
const LANES: u16 = 64;
const SESSION: u64 = 0x5e55_1011;
/// What every page holds at first.
const CANARY: u8 = 0xa5;

/// Kept from input to input: mapping memory takes longer than all of the rest.
struct Guest {
    inbound: Arc<Inbound>,
    reference: Reference,
}

struct Check;

impl FeedbackTx for Check {
    fn send(&self, feedback: Feedback) {
        assert!(feedback.session == SESSION && feedback.lane < LANES && feedback.seen > 0);
    }
}

/// What is looked at: the real receiver, or in tests one that is wrong.
trait Receives {
    /// Whether it took the frame, which came as `packet` and says `sent`.
    fn take(&mut self, packet: &Packet<'_>, sent: &Sent) -> bool;
    fn close(&mut self, epoch: u32);
}

struct Real(SessionReceiver);

impl Receives for Real {
    fn take(&mut self, packet: &Packet<'_>, _: &Sent) -> bool {
        let taken = |receiver: &SessionReceiver| {
            let counter: &AtomicU64 = &receiver.inbound().counters().frames;
            counter.load(Ordering::Relaxed)
        };
        let before = taken(&self.0);
        if let Ok(frame) = checked_frame(packet, PORT) {
            self.0.handle(&frame);
        }
        self.0.feedback(true);
        assert!(self.0.inbound().take_failure().is_none(), "all memory was reserved");
        taken(&self.0) != before
    }

    fn close(&mut self, epoch: u32) {
        for lane in self.0.close(epoch) {
            assert!(lane.missing(lane.end()).len() <= lane.end() as usize);
        }
    }
}

thread_local! {
    static GUEST: RefCell<Option<Guest>> = const { RefCell::new(None) };
}

impl Guest {
    /// `None` where there is no memory for it.
    fn new() -> Option<Self> {
        let mut backends = Vec::new();
        let mut mappings = Vec::new();
        let mut reservations = Vec::new();
        for (index, pages) in PAGES.into_iter().enumerate() {
            let name = format!("fuzz-{index}");
            let file = rustix::fs::memfd_create(&name, rustix::fs::MemfdFlags::CLOEXEC).ok()?;
            let file = std::fs::File::from(file);
            file.set_len((pages + BEYOND) * PAGE_SIZE as u64).ok()?;
            let mapping = Mapping::new(file, name.clone().into(), Access::Write).ok()?;
            let reservation = Reservation::clear(&mapping).ok()?;
            reservation.cover(&mapping, 0).ok()?;
            backends.push(Backend { id: name, size: pages * PAGE_SIZE as u64 });
            mappings.push(mapping);
            reservations.push(reservation);
        }
        let inbound = Inbound::new(InboundSpec {
            session: SESSION,
            layout: RamLayout::new(backends),
            mappings,
            reservations,
            frames: FrameLayout::new(9000, false, false).ok()?,
            hash: true,
            queues: 1,
            feedback: Box::new(Check),
            feedback_every: 1,
        });
        Some(Self { inbound, reference: Reference::new() })
    }

    fn begin(&mut self) {
        self.reference.begin();
        for mapping in self.inbound.mappings() {
            for page in 0..mapping.pages() {
                mapping.write(page, 0, &[CANARY; PAGE_SIZE]);
            }
        }
    }
}

/// Frames, each after one byte of flags and a length (2 bytes, little-endian). Flags: 1 a whole Ethernet frame, else
/// from the page stream's header on, with headers, lengths and checksum put right here; 2 IPv6; 4 closes the epoch
/// afterwards; 0x30 how the kernel cuts the frame into buffers.
///
/// # Panics
/// When a frame writes anything but what it says, or anywhere but into the guest, or when one is taken that must not
/// be or the other way round.
pub fn frame(data: &[u8]) {
    let checked = look(data, |inbound| Real(SessionReceiver::new(inbound, 0)));
    assert_eq!(checked, Ok(()));
}

/// One input through a receiver.
fn look<R: Receives>(data: &[u8], receiver: impl FnOnce(Arc<Inbound>) -> R) -> Result<(), String> {
    GUEST.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = Guest::new();
        }
        let Some(guest) = slot else { return Ok(()) };
        guest.begin();
        let mut receiver = receiver(Arc::clone(&guest.inbound));
        receive(guest, &mut receiver, data)
    })
}

fn receive(guest: &mut Guest, receiver: &mut impl Receives, mut data: &[u8]) -> Result<(), String> {
    while let [flags, low, high, rest @ ..] = data {
        // Headers, frame and their lengths fit 16 bits.
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len()).min(60_000);
        let (body, rest) = rest.split_at(length);
        data = rest;
        let frame = if flags & 1 == 1 { body.to_vec() } else { whole(body, flags & 2 != 0) };
        one(guest, receiver, &frame, flags >> 4 & 3)?;
        if flags & 4 != 0 {
            receiver.close(guest.reference.epoch);
            guest.reference.close();
        }
    }
    guest.reference.compare(guest.inbound.mappings())
}

fn one(guest: &mut Guest, receiver: &mut impl Receives, frame: &[u8], cut: u8) -> Result<(), String> {
    let piece = [usize::MAX, 3840, 256, 61][usize::from(cut)];
    let pieces: Vec<&[u8]> = frame.chunks(piece).take(18).collect();
    let packet = Packet::new(&pieces);
    let Some(sent) = sent(&packet) else { return Ok(()) };
    let numbered = sent.header.sequence.checked_add(1).is_some_and(|end| guest.inbound.can_be(&[end]));
    match (receiver.take(&packet, &sent), guest.reference.take(&sent, numbered)) {
        (true, false) => Err(format!("a frame was taken that must not be: {:?}", sent.header)),
        (false, true) => Err(format!("a frame was not taken that must be: {:?}", sent.header)),
        _ => Ok(()),
    }
}

fn sent(packet: &Packet<'_>) -> Option<Sent> {
    let frame = checked_frame(packet, PORT).ok()?;
    let payload = frame.payload(0, frame.header.payload as usize).flatten().copied().collect();
    Some(Sent { header: frame.header, descriptors: frame.descriptors().to_vec(), payload })
}

/// A frame with headers before it, whose lengths and checksum hold: only what is said in it is arbitrary.
fn whole(body: &[u8], ipv6: bool) -> Vec<u8> {
    let ip = |last: u8| -> std::net::IpAddr {
        if ipv6 {
            [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last].into()
        } else {
            [10, 0, 0, last].into()
        }
    };
    let end = |last: u8| Endpoint { mac: [2, 0, 0, 0, 0, last], ip: ip(last) };
    let path = FramePath::new(end(1), end(2), 50_000, PORT);
    let mut body = body.to_vec();
    body.resize(body.len().max(HEADER_LEN), 0);
    body[..5].copy_from_slice(b"XFRY\x01");
    body[22..24].fill(0);
    body[36..40].fill(0);
    let count = usize::from(u16::from_le_bytes([body[6], body[7]]));
    let payload = (body.len() - HEADER_LEN).saturating_sub(count * DESCRIPTOR_LEN) as u32;
    body[28..32].copy_from_slice(&payload.to_le_bytes());
    let header: Option<[u8; HEADER_LEN]> = body[..HEADER_LEN].try_into().ok();
    let parsed = header.and_then(|bytes| FrameHeader::parse(&bytes).ok());
    let mut frame = vec![0; path.len()];
    frame.extend_from_slice(&body);
    if let Some(header) = parsed.filter(|header| header.frame_len() == body.len()) {
        crate::datapath::write_frame(&mut frame, &path, header);
        debug_assert!(datagram(&frame[..], PORT).is_some());
        debug_assert_ne!(frame[path.len() + CHECKSUM_OFFSET..].len(), 0);
    }
    frame
}
