//! Frames of the page stream through the real receiver into a small guest.

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
    wire::{CHECKSUM_OFFSET, DESCRIPTOR_LEN, FrameHeader, Guard, HEADER_LEN, PageDescriptor},
};

use super::PORT;
use crate::{
    datapath::{
        Datagram, Endpoint, Feedback, FeedbackTx, FrameLayout, FramePath, Inbound, InboundSpec, Opener,
        Protection, Sealer, SessionReceiver,
    },
    memory::{Access, Backend, Mapping, RamLayout, Reservation},
    xsk::Packet,
};

/// Pages of each backend.
const PAGES: [u64; 2] = [3, 5];
/// Pages of each file behind its backend: whoever writes there wrote too far.
const BEYOND: u64 = 2;
const SESSION: u64 = 0x5e55_1011;
/// What every page holds at first.
const CANARY: u8 = 0xa5;

/// Kept from input to input: mapping memory takes longer than all of the rest.
struct Guest {
    inbound: Arc<Inbound>,
    /// What each file should hold.
    expected: Vec<Vec<u8>>,
}

struct Check;

impl FeedbackTx for Check {
    fn send(&self, feedback: Feedback) {
        assert!(feedback.session == SESSION && feedback.lane < 64 && feedback.seen > 0);
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
        let expected = mappings.iter().map(|mapping| vec![0; mapping.pages() as usize * PAGE_SIZE]).collect();
        let inbound = Inbound::new(InboundSpec {
            session: SESSION,
            layout: RamLayout::new(backends),
            mappings,
            reservations,
            frames: FrameLayout::new(9000, false, false).ok()?,
            hash: true,
            queues: 1,
            lanes: 64,
            protection: Protection::Checksum,
            feedback: Box::new(Check),
            feedback_every: 1,
        });
        Some(Self { inbound, expected })
    }

    fn begin(&mut self) {
        for (mapping, expected) in self.inbound.mappings().iter().zip(&mut self.expected) {
            expected.fill(CANARY);
            for page in 0..mapping.pages() {
                mapping.write(page, 0, &[CANARY; PAGE_SIZE]);
            }
        }
    }

    /// What a frame that was taken must have done: descriptor by descriptor, as the protocol's text says.
    fn expect(&mut self, descriptors: &[[u8; DESCRIPTOR_LEN]], mut payload: &[u8]) {
        for bytes in descriptors {
            match PageDescriptor::parse(bytes) {
                Ok(PageDescriptor::Data { backend, page, offset, length }) => {
                    assert!(page < PAGES[usize::from(backend)], "a page that is not there was taken");
                    let at = page as usize * PAGE_SIZE + usize::from(offset);
                    let (now, rest) = payload.split_at(length.into());
                    self.expected[usize::from(backend)][at..at + now.len()].copy_from_slice(now);
                    payload = rest;
                }
                Ok(PageDescriptor::Zero { backend, page, pages }) => {
                    let end = page + u64::from(pages);
                    assert!(end <= PAGES[usize::from(backend)], "a run beyond the end was taken");
                    let (from, to) = (page as usize * PAGE_SIZE, end as usize * PAGE_SIZE);
                    self.expected[usize::from(backend)][from..to].fill(0);
                }
                Err(error) => panic!("a frame with a bad descriptor was taken: {error}"),
            }
        }
        assert!(payload.is_empty(), "payload was left over");
    }

    fn compare(&self) {
        let mut page_now = [0; PAGE_SIZE];
        for (mapping, expected) in self.inbound.mappings().iter().zip(&self.expected) {
            for (page, expected) in expected.chunks_exact(PAGE_SIZE).enumerate() {
                mapping.read(page as u64, 0, &mut page_now);
                assert!(page_now == expected, "page {page} holds something else than was sent");
            }
        }
    }
}

/// Frames, each after one byte of flags and a length (2 bytes, little-endian). Flags: 1 a whole Ethernet frame, else
/// from the page stream's header on, with headers, lengths and checksum put right here; 2 IPv6; 4 closes the epoch
/// afterwards; 0x30 how the kernel cuts the frame into buffers.
///
/// # Panics
/// When a frame writes anything but what it says, or anywhere but into the guest.
pub fn frame(data: &[u8]) {
    GUEST.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = Guest::new();
        }
        if let Some(guest) = slot {
            guest.begin();
            receive(guest, data);
        }
    });
}

fn receive(guest: &mut Guest, mut data: &[u8]) {
    let mut receiver = SessionReceiver::new(Arc::clone(&guest.inbound), 0);
    let mut epoch = 1;
    while let [flags, low, high, rest @ ..] = data {
        // Headers, frame and their lengths fit 16 bits.
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len()).min(60_000);
        let (body, rest) = rest.split_at(length);
        data = rest;
        let frame = if flags & 1 == 1 { body.to_vec() } else { whole(body, flags & 2 != 0) };
        one(guest, &mut receiver, &frame, flags >> 4 & 3);
        if flags & 4 != 0 {
            for lane in receiver.close(epoch) {
                assert!(lane.missing(lane.end()).len() <= lane.end() as usize);
            }
            epoch += 1;
        }
    }
    guest.compare();
}

fn one(guest: &mut Guest, receiver: &mut SessionReceiver, frame: &[u8], cut: u8) {
    let piece = [usize::MAX, 3840, 256, 61][usize::from(cut)];
    let pieces: Vec<&[u8]> = frame.chunks(piece).take(18).collect();
    let packet = Packet::new(&pieces);
    let Some(datagram) = Datagram::in_ethernet(&packet, PORT) else { return };
    let Ok(header) = datagram.header() else { return };
    let taken = || -> u64 {
        let counters: &AtomicU64 = &guest.inbound.counters().frames;
        counters.load(Ordering::Relaxed)
    };
    let before = taken();
    let proved = receiver.handle(&datagram, header);
    receiver.feedback(true);
    assert!(guest.inbound.take_failure().is_none(), "all memory was reserved");
    if taken() != before {
        assert!(proved.is_ok(), "a frame was placed whose guard does not hold");
        let opened = Opener::new(Protection::Checksum).open(&datagram, header, |checked| {
            let payload: Vec<u8> = checked.payload(0, header.payload as usize).flatten().copied().collect();
            guest.expect(checked.descriptors(), &payload);
        });
        assert!(opened.is_ok(), "the same frame holds once and once not");
    }
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
    body[..5].copy_from_slice(b"XFRY\x02");
    body[22..24].fill(Guard::Checksum as u8);
    body[36..40].fill(0);
    let count = usize::from(u16::from_le_bytes([body[6], body[7]]));
    let payload = (body.len() - HEADER_LEN).saturating_sub(count * DESCRIPTOR_LEN) as u32;
    body[28..32].copy_from_slice(&payload.to_le_bytes());
    let header: Option<[u8; HEADER_LEN]> = body[..HEADER_LEN].try_into().ok();
    let parsed = header.and_then(|bytes| FrameHeader::parse(&bytes).ok());
    let mut frame = vec![0; path.len()];
    frame.extend_from_slice(&body);
    if let Some(header) = parsed.filter(|header| header.frame_len() == body.len()) {
        let completed = Sealer::new(Protection::Checksum).complete(&mut frame, &path, header);
        debug_assert_eq!(completed, Ok(frame.len()));
        debug_assert!(datagram(&frame[..], PORT).is_some());
        debug_assert_ne!(frame[path.len() + CHECKSUM_OFFSET..].len(), 0);
    }
    frame
}
