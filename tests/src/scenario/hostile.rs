//! What a guest could have in its memory to crash or mislead whoever moves it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail};

use crate::lab::Host;

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Bytes of a page frame's header, and of a descriptor.
const HEADER: usize = 40;
const DESCRIPTOR: usize = 16;
/// Before a datagram in a received frame: Ethernet, IPv4, UDP.
const BEFORE: usize = 14 + 20 + 8;
/// Port of the page stream.
const DATA_PORT: u16 = 4791;

/// A page's content.
pub type Page = [u8; PAGE];

/// A page that begins with these bytes, repeated as often as they fit whole where `again`.
fn page(bytes: &[u8], again: bool) -> Page {
    let mut page = [0; PAGE];
    let length = bytes.len().min(PAGE);
    page[..length].copy_from_slice(&bytes[..length]);
    if again && length > 0 {
        for chunk in page.chunks_exact_mut(length) {
            chunk.copy_from_slice(&bytes[..length]);
        }
    }
    page
}

/// A whole frame of the page stream, its checksum right, that would put something into the guest's first pages.
fn frame(version: u8, session: u64, epoch: u32, sequence: u32, payload: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER + DESCRIPTOR + payload];
    frame[..4].copy_from_slice(b"XFRY");
    frame[4] = version;
    // Pages.
    frame[5] = 1;
    frame[6..8].copy_from_slice(&1u16.to_le_bytes());
    frame[8..16].copy_from_slice(&session.to_le_bytes());
    frame[16..20].copy_from_slice(&epoch.to_le_bytes());
    frame[24..28].copy_from_slice(&sequence.to_le_bytes());
    frame[28..32].copy_from_slice(&u32::try_from(payload).unwrap_or_default().to_le_bytes());
    let descriptor = &mut frame[HEADER..HEADER + DESCRIPTOR];
    descriptor[..8].copy_from_slice(&u64::from(sequence).to_le_bytes());
    if payload == 0 {
        // All of it zero.
        descriptor[10] = 2;
        descriptor[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    } else {
        descriptor[10] = 1;
        descriptor[14..16].copy_from_slice(&u16::try_from(payload).unwrap_or_default().to_le_bytes());
    }
    frame[HEADER + DESCRIPTOR..].fill(0xee);
    let checksum = crc32c::crc32c(&frame);
    frame[32..36].copy_from_slice(&checksum.to_le_bytes());
    frame
}

/// The same as a NIC would hand it over.
fn on_the_wire(frame: &[u8]) -> Vec<u8> {
    let length = |more: usize| u16::try_from(frame.len() + more).unwrap_or_default().to_be_bytes();
    let mut out = vec![0; BEFORE];
    out[..12].copy_from_slice(&[0xff; 12]);
    out[12..14].copy_from_slice(&[8, 0]);
    out[14] = 0x45;
    out[16..18].copy_from_slice(&length(28));
    out[22..24].copy_from_slice(&[64, 17]);
    out[26..34].copy_from_slice(&[10, 77, 0, 1, 10, 77, 0, 2]);
    out[34..36].copy_from_slice(&DATA_PORT.to_be_bytes());
    out[36..38].copy_from_slice(&DATA_PORT.to_be_bytes());
    out[38..40].copy_from_slice(&length(8));
    out.extend_from_slice(frame);
    out
}

fn feedback(session: u64, epoch: u32) -> Vec<u8> {
    let mut out = b"XFBK\0\0\0\0".to_vec();
    out.extend(session.to_le_bytes());
    for number in [epoch, u32::MAX, u32::MAX] {
        out.extend(number.to_le_bytes());
    }
    out
}

/// An item of the control channel.
fn item(kind: u8, body: &str) -> Vec<u8> {
    let length = u32::try_from(body.len() + 1).unwrap_or_default().to_be_bytes();
    [&length[..], &[kind], body.as_bytes()].concat()
}

/// Texts and heads of files that somebody else would act upon.
fn others() -> Vec<Vec<u8>> {
    let mut qcow = b"QFI\xfb\0\0\0\x03\0\0\0\0\0\0\0\x48\0\0\0\x0b".to_vec();
    qcow.resize(72, 0);
    qcow.extend(b"/etc/shadow");
    let texts: [&[u8]; 10] = [
        b"{\"return\": {}, \"id\": 1}\r\n",
        b"{\"return\": {\"status\": \"completed\", \"running\": true}, \"id\": 2}\r\n",
        b"{\"event\": \"RESUME\", \"timestamp\": {\"seconds\": 1, \"microseconds\": 0}}\r\n",
        b"{\"event\": \"MIGRATION\", \"data\": {\"status\": \"failed\"}}\r\n",
        b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0",
        b"QEVM\0\0\0\x03\x01\0\0\0\0\x03ram\0\0\0\0",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",
        b"\x15\x03\x03\0\x02\x02\x2c",
        b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}\x1b]0;owned\x07\x1b[2J",
    ];
    texts.into_iter().map(<[u8]>::to_vec).chain([qcow]).collect()
}

/// Pages of all kinds: as frames of the migration `session`, as words of its two ends, as files and answers of others, and
/// some that differ from each other in one byte.
pub fn pages(session: u64) -> Vec<Page> {
    let mut pages = Vec::new();
    for version in 1..=3 {
        for epoch in 0..4 {
            for (sequence, payload) in [(0, 0), (1, 512), (2, PAGE - HEADER - DESCRIPTOR), (u32::MAX, 64)] {
                let frame = frame(version, session, epoch, sequence, payload);
                pages.push(page(&frame, true));
                pages.push(page(&on_the_wire(&frame), true));
            }
        }
    }
    pages.extend((0..4).map(|epoch| page(&feedback(session, epoch), true)));
    for body in [
        format!(r#"{{"type":"settled","session":{session},"verdict":"refused"}}"#),
        r#"{"type":"abort","reason":"says the guest"}"#.to_owned(),
        r#"{"type":"commit"}"#.to_owned(),
        r#"{"type":"done"}"#.to_owned(),
    ] {
        pages.push(page(&item(1, &body), true));
        pages.push(page(&item(2, &body), false));
    }
    for other in others() {
        pages.push(page(&other, true));
        pages.push(page(&other, false));
    }
    // Almost empty, almost full, almost the same.
    for at in [0, 7, PAGE / 2, PAGE - 1] {
        for around in [0, 0xff, 0x5a] {
            let mut page = [around; PAGE];
            page[at] ^= 1;
            pages.push(page);
        }
    }
    pages.push([0; PAGE]);
    pages.push([0xff; PAGE]);
    pages
}

/// The RAM of the VM that runs on a host, read and written through its QEMU's own page tables, so that a write counts as
/// the guest's.
pub struct GuestRam {
    memory: File,
    address: u64,
}

impl GuestRam {
    /// Of the only QEMU there.
    ///
    /// # Errors
    /// If there is none.
    pub fn open(host: &Host) -> Result<Self> {
        let pids = host.qemu_pids()?;
        let [pid] = pids[..] else { bail!("QEMU processes {pids:?} on {}", host.side()) };
        let ram = host.vm_paths().ram.display().to_string();
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).context("a QEMU's mappings")?;
        let line = maps.lines().find(|line| line.ends_with(&ram)).context("RAM is not mapped")?;
        let (start, _) = line.split_once('-').context("a mapping's address")?;
        let address = u64::from_str_radix(start, 16).context("a mapping's address")?;
        let memory = OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem"));
        Ok(Self { memory: memory.context("a QEMU's memory")?, address })
    }

    /// Writes pages, one after the other, from the guest's page `first` on.
    ///
    /// # Errors
    /// If they are not mapped.
    pub fn write(&self, first: u64, pages: &[Page]) -> Result<()> {
        let at = self.address + first * PAGE as u64;
        self.memory.write_all_at(pages.as_flattened(), at).context("writing to a guest's memory")
    }

    /// Reads `count` pages.
    ///
    /// # Errors
    /// If they are not mapped.
    pub fn read(&self, first: u64, count: usize) -> Result<Vec<Page>> {
        let mut pages = vec![[0; PAGE]; count];
        let at = self.address + first * PAGE as u64;
        self.memory.read_exact_at(pages.as_flattened_mut(), at).context("reading a guest's memory")?;
        Ok(pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_whole() {
        let frame = frame(1, 7, 2, 9, 100);
        assert_eq!(frame.len(), HEADER + DESCRIPTOR + 100);
        let mut blank = frame.clone();
        blank[32..36].fill(0);
        assert_eq!(crc32c::crc32c(&blank).to_le_bytes(), frame[32..36]);
        assert_eq!(on_the_wire(&frame).len(), BEFORE + frame.len());
        assert!(pages(7).len() > 130);
    }
}
