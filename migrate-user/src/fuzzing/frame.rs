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
    wire::{CHECKSUM_OFFSET, DESCRIPTOR_LEN, FrameHeader, HEADER_LEN, MAGIC, VERSION},
};

use self::reference::{Reference, Sent};
use super::PORT;
use crate::{
    datapath::{
        Cipher, Datagram, Endpoint, Feedback, FeedbackTx, FrameLayout, FramePath, Inbound, InboundSpec,
        Opener, Protection, Sealer, Secret, SessionReceiver,
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
    /// How its session's frames are guarded, and how others'.
    protection: [Protection; 2],
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
    /// Whether it took the frame, which came as `packet` and says `sent`, if its guard holds.
    fn take(&mut self, packet: &Packet<'_>, sent: Option<&Sent>) -> bool;
    fn close(&mut self, epoch: u32);
}

struct Real(SessionReceiver);

impl Receives for Real {
    fn take(&mut self, packet: &Packet<'_>, _: Option<&Sent>) -> bool {
        let taken = |receiver: &SessionReceiver| {
            let counter: &AtomicU64 = &receiver.inbound().counters().frames;
            counter.load(Ordering::Relaxed)
        };
        let before = taken(&self.0);
        if let Some((datagram, header)) = found(packet) {
            // Whether its guard holds is said by what it does.
            let _ = self.0.handle(&datagram, header);
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
    static GUESTS: RefCell<[Option<Guest>; 2]> = const { RefCell::new([None, None]) };
}

impl Guest {
    /// `None` where there is no memory for it.
    fn new(sealed: bool) -> Option<Self> {
        let key = Secret::new([7; 32]).page_key(SESSION, Cipher::ChaCha20Poly1305).ok()?;
        let mut protection = [Protection::Checksum, Protection::Sealed(Arc::new(key))];
        if sealed {
            protection.reverse();
        }
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
            lanes: LANES,
            protection: protection[0].clone(),
            feedback: Box::new(Check),
            feedback_every: 1,
        });
        Some(Self { protection, inbound, reference: Reference::new() })
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
/// from the page stream's header on, with headers, lengths, packing and checksum or tag put right here; 2 IPv6; 4 closes the epoch
/// afterwards; 8 in the first of them that the session's frames are sealed; 0x30 how the kernel cuts the frame into
/// buffers; 0x40 guarded in the way that is not the session's.
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
    let sealed = data.first().is_some_and(|flags| flags & 8 != 0);
    GUESTS.with_borrow_mut(|slots| {
        let slot = &mut slots[usize::from(sealed)];
        if slot.is_none() {
            *slot = Guest::new(sealed);
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
        let frame = if flags & 1 == 1 {
            body.to_vec()
        } else {
            whole(body, flags & 2 != 0, &guest.protection[usize::from(flags >> 6 & 1)])
        };
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
    let sent = sent(&packet, &guest.protection[0]);
    let taken = receiver.take(&packet, sent.as_ref());
    let due = sent.as_ref().is_some_and(|sent| {
        let numbered = sent.header.sequence.checked_add(1).is_some_and(|end| guest.inbound.can_be(&[end]));
        guest.reference.take(sent, numbered)
    });
    let header = sent.map(|sent| sent.header);
    match (taken, due) {
        (true, false) => Err(format!("a frame was taken that must not be: {header:?}")),
        (false, true) => Err(format!("a frame was not taken that must be: {header:?}")),
        _ => Ok(()),
    }
}

fn found<'a>(packet: &Packet<'a>) -> Option<(Datagram<'a>, FrameHeader)> {
    let datagram = Datagram::in_ethernet(packet, PORT)?;
    let header = datagram.header().ok()?;
    Some((datagram, header))
}

/// What a frame says, if its guard holds.
fn sent(packet: &Packet<'_>, protection: &Protection) -> Option<Sent> {
    let (datagram, header) = found(packet)?;
    let opened = Opener::new(protection.clone()).open(&datagram, header, |frame| {
        let payload = frame.payload(0, header.payload as usize).flatten().copied().collect();
        Sent::new(header, frame.descriptors().to_vec(), payload)
    });
    opened.ok()
}

/// A frame with headers before it, whose lengths and guard hold: only what is said in it is arbitrary.
fn whole(body: &[u8], ipv6: bool, protection: &Protection) -> Vec<u8> {
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
    body[..4].copy_from_slice(&MAGIC);
    body[4] = VERSION;
    body[22] = protection.guard() as u8;
    body[23] %= 3;
    body[36..40].fill(0);
    let count = usize::from(u16::from_le_bytes([body[6], body[7]]));
    let payload = (body.len() - HEADER_LEN).saturating_sub(count * DESCRIPTOR_LEN) as u32;
    body[28..32].copy_from_slice(&payload.to_le_bytes());
    body.resize(body.len() + protection.guard().trailer_len(), 0);
    let header: Option<[u8; HEADER_LEN]> = body[..HEADER_LEN].try_into().ok();
    let parsed = header.and_then(|bytes| FrameHeader::parse(&bytes).ok());
    let mut frame = vec![0; path.len()];
    frame.extend_from_slice(&body);
    if let Some(header) = parsed.filter(|header| header.frame_len() == body.len()) {
        let completed = Sealer::new(protection.clone()).complete(&mut frame, &path, header);
        debug_assert_eq!(completed, Ok(frame.len()));
        debug_assert!(datagram(&frame[..], PORT).is_some());
        debug_assert_ne!(frame[path.len() + CHECKSUM_OFFSET..].len(), 0);
    }
    frame
}
