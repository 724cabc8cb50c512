//! Sealing and opening against each other.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use migrate_common::{
    PAGE_SIZE,
    wire::{DESCRIPTOR_LEN, FrameHeader, FrameKind, Guard, HEADER_LEN, Packing, PageDescriptor, TAG_LEN},
};
use proptest::prelude::*;

use super::*;
use crate::{
    datapath::{Datagram, Endpoint, FramePath},
    memory::{Access, Mapping},
    xsk::Packet,
};

const PORT: u16 = 4791;
const CIPHERS: [Cipher; 3] = [Cipher::Aes128Gcm, Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305];

fn path(ipv6: bool) -> FramePath {
    let ip = |n: u8| -> std::net::IpAddr {
        if ipv6 { format!("fd00::{n}").parse().unwrap() } else { [10, 0, 0, n].into() }
    };
    let end = |n: u8| Endpoint { mac: [2, 0, 0, 0, 0, n], ip: ip(n) };
    FramePath::new(end(1), end(2), 50_000, PORT)
}

fn header(sequence: u32, payload: &[u8]) -> FrameHeader {
    FrameHeader {
        kind: FrameKind::Pages,
        descriptors: 1,
        session: 1,
        epoch: 2,
        lane: 3,
        sequence,
        guard: Guard::Checksum,
        packing: Packing::Plain,
        payload: payload.len() as u32,
        checksum: 0,
    }
}

fn sealed(cipher: Cipher, secret: u8, session: u64) -> Protection {
    Protection::Sealed(Arc::new(Secret::new([secret; 32]).page_key(session, cipher).unwrap()))
}

/// All protections there are.
fn protection(index: usize) -> Protection {
    CIPHERS.get(index).map_or(Protection::Checksum, |&cipher| sealed(cipher, 1, 1))
}

fn frame(protection: Protection, ipv6: bool, payload: &[u8]) -> Vec<u8> {
    let path = path(ipv6);
    let descriptor = PageDescriptor::Data { backend: 0, page: 5, offset: 0, length: payload.len() as u16 };
    let mut buffer = vec![0; path.len() + HEADER_LEN];
    buffer.extend(descriptor.to_bytes());
    buffer.extend(payload);
    buffer.extend([0; TAG_LEN]);
    let len = Sealer::new(protection).complete(&mut buffer, &path, header(4, payload)).unwrap();
    buffer.truncate(len);
    buffer
}

#[test]
fn a_payload_elsewhere_makes_the_same_frame() {
    let payload: Vec<u8> = (0..9000).map(|at| (at / 7) as u8).collect();
    for how in 0..4 {
        for len in [0, 1, 15, 16, 17, 4096, 8192, 9000] {
            let (path, payload) = (path(false), &payload[..len]);
            let whole = frame(protection(how), false, payload);
            let descriptor =
                PageDescriptor::Data { backend: 0, page: 5, offset: 0, length: payload.len() as u16 };
            // Old content, as in a buffer that is used again.
            let mut buffer = vec![0xa5; path.len() + HEADER_LEN + DESCRIPTOR_LEN + len + TAG_LEN];
            let at = path.len() + HEADER_LEN;
            buffer[at..at + DESCRIPTOR_LEN].copy_from_slice(&descriptor.to_bytes());
            let made = Sealer::new(protection(how))
                .complete_with(&mut buffer, &path, header(4, payload), payload)
                .unwrap();
            assert!(buffer[..made] == whole, "{how}, {len} bytes");
        }
    }
}

/// What is made of a frame in `pieces`: its payload, if it is believed.
fn opened(protection: Protection, pieces: &[&[u8]]) -> Option<Vec<u8>> {
    let packet = Packet::new(pieces);
    let datagram = Datagram::in_ethernet(&packet, PORT)?;
    let header = datagram.header().ok()?;
    let mut opener = Opener::new(protection);
    let opened = opener.open(&datagram, header, |frame| {
        assert_eq!(
            PageDescriptor::parse(&frame.descriptors()[0]).unwrap().payload_len(),
            header.payload as usize
        );
        frame.payload(0, header.payload as usize).flatten().copied().collect()
    });
    opened.ok()
}

/// A guest writes while its pages are encrypted: were a byte looked at twice, the tag would not be that of what is sent.
#[test]
fn a_payload_that_changes_meanwhile_makes_a_frame_that_holds() {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(PAGE_SIZE as u64).unwrap();
    let guest = Mapping::new(file.try_clone().unwrap(), "test".into(), Access::Write).unwrap();
    let agent = Mapping::new(file, "test".into(), Access::Read).unwrap();
    let stop = AtomicBool::new(false);
    let (mut torn, mut broken) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for value in (0..=255).cycle().take_while(|_| !stop.load(Ordering::Relaxed)) {
                guest.write(0, 0, &[value; PAGE_SIZE]);
            }
        });
        let path = path(false);
        let descriptor = PageDescriptor::Data { backend: 0, page: 5, offset: 0, length: PAGE_SIZE as u16 };
        let mut sealers = [0, 1].map(|how| (protection(how), Sealer::new(protection(how))));
        let begun = Instant::now();
        for sequence in 0.. {
            for (protection, sealer) in &mut sealers {
                let mut buffer = vec![0; path.len() + HEADER_LEN + DESCRIPTOR_LEN + PAGE_SIZE + TAG_LEN];
                let at = path.len() + HEADER_LEN;
                buffer[at..at + DESCRIPTOR_LEN].copy_from_slice(&descriptor.to_bytes());
                let sealed = agent.lend(0, 1, |page| {
                    sealer.complete_with(&mut buffer, &path, header(sequence, page), page)
                });
                match sealed.ok().and_then(|_| opened(protection.clone(), &[&buffer])) {
                    Some(page) => torn += u32::from(page.iter().any(|&byte| byte != page[0])),
                    None => broken += 1,
                }
            }
            if torn >= 1000 || begun.elapsed() > Duration::from_secs(10) {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(broken, 0);
    assert!(torn > 0, "nothing was written meanwhile");
}

proptest! {
    /// However the kernel cuts a frame into buffers, the same comes out.
    #[test]
    fn frames_survive_any_cut(
        how in 0usize..4,
        ipv6: bool,
        payload in proptest::collection::vec(any::<u8>(), 1..4096),
        cuts in proptest::collection::vec(0usize..4300, 0..6),
    ) {
        let frame = frame(protection(how), ipv6, &payload);
        // Headers lie in the first buffer: the kernel's is 3840 bytes.
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| (cut + 200).min(frame.len())).collect();
        cuts.sort_unstable();
        let mut pieces = Vec::new();
        let mut at = 0;
        for cut in cuts { pieces.push(&frame[at..cut]); at = cut; }
        pieces.push(&frame[at..]);
        prop_assert_eq!(opened(protection(how), &pieces), Some(payload));
    }

    #[test]
    fn every_flipped_bit_behind_the_headers_is_found(
        how in 0usize..4,
        payload in proptest::collection::vec(any::<u8>(), 1..300),
        at: prop::sample::Index,
        bit in 0u8..8,
    ) {
        let mut frame = frame(protection(how), false, &payload);
        let at = 42 + at.index(frame.len() - 42);
        frame[at] ^= 1 << bit;
        prop_assert_eq!(opened(protection(how), &[&frame]), None);
    }

    #[test]
    fn arbitrary_bytes_never_panic(how in 0usize..4, bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = opened(protection(how), &[&bytes]);
    }

    #[test]
    fn truncation_is_an_error(how in 0usize..4, len in 0usize..150) {
        let frame = frame(protection(how), false, &[9; 150]);
        prop_assert_eq!(opened(protection(how), &[&frame[..len]]), None);
    }
}

#[test]
fn only_the_same_key_opens() {
    for cipher in CIPHERS {
        let frame = frame(sealed(cipher, 1, 1), false, b"a page");
        assert!(opened(sealed(cipher, 1, 1), &[&frame]).is_some());
        assert!(opened(sealed(cipher, 2, 1), &[&frame]).is_none(), "another secret");
        assert!(opened(sealed(cipher, 1, 2), &[&frame]).is_none(), "another session");
        for other in CIPHERS.into_iter().filter(|&other| other != cipher) {
            assert!(opened(sealed(other, 1, 1), &[&frame]).is_none(), "another cipher");
        }
        assert!(opened(Protection::Checksum, &[&frame]).is_none(), "nobody agreed on sealed frames");
        assert!(!frame.windows(6).any(|bytes| bytes == b"a page"));
    }
}

#[test]
fn a_checksum_does_not_pass_for_a_tag() {
    let frame = frame(Protection::Checksum, false, b"a forged page");
    assert!(opened(Protection::Checksum, &[&frame]).is_some());
    let packet: [&[u8]; 1] = [&frame];
    let packet = Packet::new(&packet);
    let datagram = Datagram::in_ethernet(&packet, PORT).unwrap();
    for cipher in CIPHERS {
        let opened = Opener::new(sealed(cipher, 1, 1)).open(&datagram, datagram.header().unwrap(), |_| ());
        assert_eq!(opened, Err(Unproved::BadTag));
    }
}

#[test]
fn no_number_is_used_twice() {
    let path = path(false);
    let mut sealer = Sealer::new(protection(0));
    let mut seal = |kind, epoch, sequence| {
        let mut buffer = vec![0; path.len() + HEADER_LEN + DESCRIPTOR_LEN + TAG_LEN];
        let header = FrameHeader { kind, epoch, ..header(sequence, &[]) };
        sealer.complete(&mut buffer, &path, header).is_ok()
    };
    assert!(seal(FrameKind::Probe, 0, 0) && seal(FrameKind::Probe, 0, 1));
    assert!(seal(FrameKind::Pages, 1, 0) && seal(FrameKind::Pages, 1, 7) && seal(FrameKind::Pages, 2, 0));
    assert!(!seal(FrameKind::Pages, 2, 0), "twice");
    assert!(!seal(FrameKind::Pages, 1, 8), "an epoch that is over");
}

#[test]
fn frames_of_different_number_lane_and_kind_have_different_nonces() {
    let mut seen = std::collections::HashSet::new();
    for kind in [FrameKind::Pages, FrameKind::Probe] {
        for number in [0, 1, 255, 256, 65_535, 65_536, u32::MAX] {
            for other in [0, 1, 255, 256, u32::MAX] {
                for lane in [0, 1, 63, 256] {
                    let header = FrameHeader { kind, epoch: other, lane, ..header(number, &[]) };
                    assert!(seen.insert(super::seal::nonce(&header)), "{header:?}");
                }
            }
        }
    }
}

/// Keys by which AES and GCM are tested by their authors would prove the library and not us; this proves that what is
/// documented is what is done, so that another program could open our frames.
#[test]
fn keys_are_derived_as_documented() {
    use aws_lc_rs::{aead, hmac};
    // HKDF by its parts (RFC 5869): extract with a salt of zeroes, one block of expansion.
    let extract = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &[0; 32]), &[9; 32]);
    let info = [b"xferry pages aes-256-gcm".as_slice(), &5u64.to_be_bytes(), &[1]].concat();
    let key = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, extract.as_ref()), &info);
    let key = aead::LessSafeKey::new(aead::UnboundKey::new(&aead::AES_256_GCM, key.as_ref()).unwrap());
    let frame = frame(sealed(Cipher::Aes256Gcm, 9, 5), false, b"a page");
    let (head, body) = frame[42..].split_at(HEADER_LEN);
    // Lane 3, pages, epoch 2, sequence 4.
    let nonce = [3, 0, 1, 0, 2, 0, 0, 0, 4, 0, 0, 0];
    let mut body = body.to_vec();
    let nonce = aead::Nonce::assume_unique_for_key(nonce);
    let plain = key.open_in_place(nonce, aead::Aad::from(head), &mut body).unwrap();
    assert_eq!(&plain[DESCRIPTOR_LEN..], b"a page");
}

/// Nothing of a key is found in this process once it was dropped.
#[test]
fn keys_are_wiped() {
    let hidden = |bytes: &[u8]| -> Vec<u8> { bytes.iter().map(|byte| byte ^ 0x5a).collect() };
    for cipher in CIPHERS {
        let secret: [u8; 32] = rand::random();
        // What is looked for is kept in another form, so that it is not found where it is looked from.
        let key = hidden(&raw_key(secret, cipher));
        let kept = Secret::new(secret).page_key(1, cipher).unwrap();
        assert!(copies(&key) > 0, "{cipher:?}: while it is used it is there, or the search is wrong");
        drop(kept);
        scribble();
        assert_eq!(copies(&key), 0, "{cipher:?}");
    }
}

#[inline(never)]
fn raw_key(secret: [u8; 32], cipher: Cipher) -> Vec<u8> {
    use aws_lc_rs::hmac;
    let extract = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &[0; 32]), &secret);
    let info = [b"xferry pages ".as_slice(), cipher.name().as_bytes(), &1u64.to_be_bytes(), &[1]].concat();
    let key = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, extract.as_ref()), &info);
    let len = if cipher == Cipher::Aes128Gcm { 16 } else { 32 };
    key.as_ref()[..len].to_vec()
}

/// Writes over the stack that earlier calls used, and over small freed blocks.
#[inline(never)]
fn scribble() {
    std::hint::black_box([0xa5u8; 64 << 10]);
    let blocks: Vec<Vec<u8>> = (0..2000).map(|n| vec![0xa5; 8 + n % 600]).collect();
    std::hint::black_box(blocks);
}

/// How often the bytes that `hidden` stands for are found in this process's memory.
fn copies(hidden: &[u8]) -> usize {
    use std::os::unix::fs::FileExt;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let memory = std::fs::File::open("/proc/self/mem").unwrap();
    let mut found = 0;
    for line in maps.lines().filter(|line| line.contains(" rw-p ")) {
        let (start, end) = line.split_whitespace().next().unwrap().split_once('-').unwrap();
        let (start, end) = (u64::from_str_radix(start, 16).unwrap(), u64::from_str_radix(end, 16).unwrap());
        let mut bytes = vec![0; (end - start).min(64 << 20) as usize];
        let len = memory.read_at(&mut bytes, start).unwrap_or(0);
        let windows = bytes[..len].windows(hidden.len());
        found += windows.filter(|window| window.iter().zip(hidden).all(|(a, b)| a ^ 0x5a == *b)).count();
        bytes.fill(0);
    }
    found
}
